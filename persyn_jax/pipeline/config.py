"""The config of a whole run: one YAML file. Light: imports no JAX."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from persyn_jax.config import config_class
from persyn_jax.evaluation.sources import SourceConfig
from persyn_jax.models.spec import ModelConfig
from persyn_jax.routing.rewards import RewardConfig
from persyn_jax.sampling.config import ClientConfig, EngineConfig, ServiceConfig, TeacherConfig
from persyn_jax.training.config import (
    GossipConfig,
    LoraConfig,
    MeshConfig,
    OptimiserConfig,
    TrainConfig,
)


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
    """The router: a language model with a trained coefficient head."""

    backbone: ModelConfig | None = None
    """Null: the student itself, before training."""
    train: Literal["frozen", "lora", "full"] = "frozen"
    """What learns of the backbone with the head: nothing, adapters beside its kernels, or all. The
    first reads every prompt once, the others in each step: choose fewer `pairs`."""
    lora: LoraConfig = LoraConfig()
    """Of `train: lora`."""
    backbone_optimiser: OptimiserConfig = OptimiserConfig()
    """Of what learns of the backbone."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Part of the calibration prompts that judges the router; it learns from the others."""
    steps: Annotated[int, Field(ge=1)] = 60
    pairs: Annotated[int, Field(ge=1)] = 64
    """Preference pairs in a batch, per worker."""
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=1e-2)
    """Of the head."""
    neighbours: Annotated[int, Field(ge=1)] = 5
    """Of the kNN baseline."""


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

    @property
    def run_folder(self) -> Path:
        return self.run.folder / self.run.name

    @property
    def router_backbone(self) -> ModelConfig:
        return self.router.backbone or self.student
