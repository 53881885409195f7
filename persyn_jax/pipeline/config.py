"""The config of a whole run: one YAML file. Light: imports no JAX."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from persyn_jax.config import config_class
from persyn_jax.evaluation.sources import SourceConfig
from persyn_jax.models.spec import ModelConfig
from persyn_jax.routing.rewards import RewardConfig
from persyn_jax.routing.selection import licence_gate
from persyn_jax.routing.strategies import StrategyConfig, StrategyName
from persyn_jax.sampling.config import ClientConfig, EngineConfig, ServiceConfig, TeacherConfig
from persyn_jax.sampling.spending import price
from persyn_jax.training.config import GossipConfig, MeshConfig, OptimiserConfig, TrainConfig


@config_class
class RunSection:
    """Where a run lives and what it starts from."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    """The run folder is `folder/name`."""
    folder: Path = Path("runs")
    seed: Annotated[int, Field(ge=0)] = 0
    platform: Literal["cpu", "gpu", "tpu"] = "cpu"
    answers: Path = Path("runs/answers.sqlite")
    """The answer store, shared by runs; on a local disk."""


@config_class
class RouterConfig:
    """The router: a frozen backbone with a trained coefficient head."""

    backbone: ModelConfig | None = None
    """Null: the student itself, before training."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Part of the calibration prompts that judges the router; it learns from the others."""
    steps: Annotated[int, Field(ge=1)] = 60
    pairs: Annotated[int, Field(ge=1)] = 64
    """Preference pairs in a batch, per worker."""
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=1e-2)
    neighbours: Annotated[int, Field(ge=1)] = 5
    """Of the kNN baseline."""


@config_class
class RoutingConfig(StrategyConfig):
    """Who is asked, by which strategy and within which limits. See `routing.selection`."""

    strategy: StrategyName = "router"
    """`oracle` needs the answers of all teachers to all prompts in the answer store."""
    refuse_licences: list[str] = Field(default_factory=list)
    """Licences of teachers that the student's own forbids: those teachers are never asked."""
    least_margin: Annotated[float, Field(ge=0)] | None = None
    """A prompt whose best score is less than this above the second goes to the best constant
    teacher; null: none does."""
    most_share: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """The largest share of the prompts, by teacher; 1 for one that is not named."""
    budget_usd: Annotated[float, Field(ge=0)] | None = None
    """US dollars that the answers still to be asked for are expected to cost, at most; null is no
    limit. Needs the prices of all teachers. The calibration answers are paid by then."""
    budget_tokens: Annotated[int, Field(ge=0)] | None = None
    """The same in tokens, of prompts and answers together."""

    def __post_init__(self):
        if self.budget_usd is not None and self.budget_tokens is not None:
            raise ValueError("budget_usd and budget_tokens: only one of them can limit the routes")


@config_class
class EvaluationConfig:
    """How the student is examined: greedy answers to the eval prompts."""

    max_tokens: Annotated[int, Field(ge=1)] = 64
    engine: EngineConfig = EngineConfig()


@config_class
class RunConfig:
    """Everything that describes a run."""

    run: RunSection
    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    """Where prompts come from, by name."""
    teachers: Annotated[list[TeacherConfig], Field(min_length=2)]
    service: ServiceConfig | None = None
    """The run's own sampling service; needed by teachers without a base_url."""
    client: ClientConfig = ClientConfig()
    student: ModelConfig
    rewards: RewardConfig = RewardConfig()
    router: RouterConfig = RouterConfig()
    routing: RoutingConfig = RoutingConfig()
    mesh: MeshConfig = MeshConfig()
    gossip: GossipConfig = GossipConfig()
    training: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        names = [teacher.name for teacher in self.teachers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"teachers: names must differ, {twice[0]!r} is given twice")
        lost = [t.name for t in self.teachers if t.base_url is None and self.service is None]
        if lost:
            raise ValueError(
                f"teachers: {lost[0]!r} has no base_url and the config has no service section"
            )
        _check_routing(self.routing, self.teachers)

    @property
    def run_folder(self) -> Path:
        return self.run.folder / self.run.name

    @property
    def router_backbone(self) -> ModelConfig:
        return self.router.backbone or self.student


def _check_routing(routing: RoutingConfig, teachers: list[TeacherConfig]) -> None:
    """What would only be found out after the calibration answers are paid for."""
    names = [teacher.name for teacher in teachers]
    named = {
        "strong": [routing.strong] if routing.strong is not None else [],
        "family": routing.family,
        "most_share": routing.most_share,
    }
    for key, given in named.items():
        for name in given:
            if name not in names:
                raise ValueError(f"routing.{key}: no teacher {name!r}, only {', '.join(names)}")
    licence_gate([teacher.licence for teacher in teachers], routing.refuse_licences)
    if routing.budget_usd is not None:
        for teacher in teachers:
            if price(teacher, 0, 0) is None:
                raise ValueError(
                    f"routing.budget_usd {routing.budget_usd:g}: the price of teacher "
                    f"{teacher.name!r} is unknown; give its usd_per_million_prompt_tokens and "
                    "usd_per_million_completion_tokens, or use routing.budget_tokens"
                )
