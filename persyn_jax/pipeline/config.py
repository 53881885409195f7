"""The config of a whole run: one YAML file. Light: imports no JAX."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from persyn_jax.config import config_class
from persyn_jax.evaluation.sources import SourceConfig
from persyn_jax.models.spec import ModelConfig
from persyn_jax.routing.preferences import PairWeights
from persyn_jax.routing.rewards import RewardConfig
from persyn_jax.routing.selection import licence_gate
from persyn_jax.routing.strategies import StrategyConfig, StrategyName
from persyn_jax.sampling.config import ClientConfig, EngineConfig, ServiceConfig, TeacherConfig
from persyn_jax.sampling.spending import price
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
class VerifierQuality:
    """Quality is the score of each prompt's verifier, in [0, 1] (the paper's math setting)."""

    kind: Literal["verifier"] = "verifier"


@config_class
class RewardModelQuality:
    """Quality is the reward model's scalar, without bounds (the paper's instruction setting)."""

    kind: Literal["reward_model"]
    model: ModelConfig
    """A Hugging Face folder or hub id of a `*ForSequenceClassification` model with one label."""


@config_class
class LikelihoodQuality:
    """Quality is the mean log-likelihood of a response token under a larger model, in nats."""

    kind: Literal["likelihood"]
    model: ModelConfig


@config_class
class JudgeQuality:
    """Quality is the score that a language model gives when it is asked to judge."""

    kind: Literal["judge"]
    judge: TeacherConfig
    """Who judges: an endpoint as a teacher's. Greedy unless its `sampling` says otherwise; give it
    as many `max_tokens` as its reasoning takes, for a verdict that is cut off does not count."""
    template: str = (
        "Judge how good the answer to the question below is: whether it is correct, helpful and to "
        "the point. Explain shortly, then end with your score from 1 (worst) to 10 (best) in "
        "double square brackets, such as [[5]].\n\n"
        "# Question\n\n{question}\n\n# Answer\n\n{answer}"
    )
    """The judge's prompt. `{question}`, `{answer}` and `{reference}` are filled in; with
    `{reference}`, prompts without a reference answer have no quality."""
    pattern: str = r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]"
    """Regular expression of the score; its one group is the number. The last match counts."""
    lowest: float = 1.0
    """Of the scale. A score outside it is taken for none."""
    highest: float = 10.0

    def __post_init__(self):
        for name in ("{question}", "{answer}"):
            if name not in self.template:
                raise ValueError(f"template: must hold {name}")
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r}: no regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"pattern {self.pattern!r}: must have one group, has {groups}")
        if self.lowest >= self.highest:
            raise ValueError(f"lowest {self.lowest} must be below highest {self.highest}")


QualityConfig = Annotated[
    VerifierQuality | RewardModelQuality | LikelihoodQuality | JudgeQuality,
    Field(discriminator="kind"),
]


BackboneTraining = Literal["frozen", "lora", "full"]


@config_class
class RouterConfig:
    """The router: a language model with a trained coefficient head."""

    backbone: ModelConfig | None = None
    """Null: the student itself, before training."""
    train: BackboneTraining = "frozen"
    """What learns of the backbone with the head: nothing, adapters beside its kernels, or all. The
    first reads every prompt once, the others in each step: choose fewer `pairs`."""
    lora: LoraConfig = LoraConfig()
    """Of `train: lora`."""
    backbone_optimiser: OptimiserConfig = OptimiserConfig()
    """Of what learns of the backbone."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Part of the calibration prompts that judges the router; it learns from the others, and so do
    all other strategies."""
    steps: Annotated[int, Field(ge=1)] = 60
    pairs: Annotated[int, Field(ge=1)] = 64
    """Preference pairs in a batch, per worker."""
    pair_weights: PairWeights = "equal"
    """Of the preference pairs in the loss. `equal`, as in the paper: the router counts how often a
    teacher wins. `difference`: how much it wins by, which matters where the best answers to a
    prompt are rare, and their lead is large."""
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=1e-2)
    """Of the head."""
    neighbours: Annotated[int, Field(ge=1)] = 5
    """Of the kNN baseline."""


@config_class
class RoutingConfig(StrategyConfig):
    """Who is asked, by which strategy and within which limits. See `routing.selection`."""

    strategy: StrategyName = "router"
    """`oracle` needs the answers of all teachers to all prompts in the answer store."""
    refuse_licences: list[str] = Field(default_factory=list)
    """Licences of teachers that the student's own forbids: no prompt is routed to them. Calibration
    asks all `teachers`; one that must not be asked at all is left out there."""
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


GENERATED = "persyn_generated"
"""The benchmark that is made of the run's own eval prompts."""


@config_class
class BenchmarkTask:
    """A benchmark as lm-eval knows it."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    """Of a task or a group of tasks: lm-eval's own, or one of `evaluation.tasks`."""
    asks: Literal["chat", "likelihoods"] = "chat"
    """How the model is asked: for an answer, through its chat template, or for the log-likelihoods
    of given texts, without."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Worked examples before a question; null: as the task has it."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Of an answer. Null: as the task has it; for `persyn_generated`, `evaluation.max_tokens`."""
    metric: str
    """Which of lm-eval's metrics is the score of an item; `verifier`: none, but that of the
    prompt's own verifier (only `persyn_generated` has one)."""
    filter: str = "none"
    """Which of lm-eval's filters the metric is of."""
    data: Path | None = None
    """A .jsonl file for tasks that read NAME.jsonl in the folder that lm-eval runs in, such as
    `svamp_local` and `livebench_local`."""

    def __post_init__(self):
        if (self.metric == "verifier") != (self.name == GENERATED):
            raise ValueError(f"metric verifier is that of {GENERATED!r}, and of no other task")
        if self.data is not None and self.name == GENERATED:
            raise ValueError(f"data: {GENERATED!r} reads the run's own eval prompts")
        if self.max_tokens is not None and self.asks == "likelihoods":
            raise ValueError("max_tokens: where likelihoods are asked, there is no answer")


def _paper_benchmarks() -> list[BenchmarkTask]:
    """The paper's six, zero-shot but for GSM8K, and the run's own prompts, which need no hub.

    Ours, where the sources do not settle it: TruthfulQA's MC2 form; math-verify's verdict on MATH,
    which finds the boxed answer of a zero-shot chat; IFEval's strict score by prompt.
    """
    return [
        BenchmarkTask(name="ifeval", num_fewshot=0, metric="prompt_level_strict_acc"),
        BenchmarkTask(name="truthfulqa_mc2", asks="likelihoods", num_fewshot=0, metric="acc"),
        BenchmarkTask(name="livebench", num_fewshot=0, metric="score"),
        BenchmarkTask(name="gsm8k", num_fewshot=5, metric="exact_match", filter="flexible-extract"),
        BenchmarkTask(name="minerva_math", num_fewshot=0, max_tokens=1024, metric="math_verify"),
        BenchmarkTask(name="svamp", num_fewshot=0, metric="exact_match", filter="last-number"),
        BenchmarkTask(name=GENERATED, num_fewshot=0, metric="verifier"),
    ]


@config_class
class BenchmarksConfig:
    """How the student is examined by others' benchmarks, through lm-eval."""

    tasks: Annotated[list[BenchmarkTask], Field(min_length=1)] = Field(
        default_factory=_paper_benchmarks
    )
    engine: EngineConfig = EngineConfig(cache_length=2048)
    """Of the service that lm-eval asks; `cache_length` has room for worked examples, question and
    answer."""

    def __post_init__(self):
        names = [task.name for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tasks: names must differ, {twice[0]!r} is given twice")


@config_class
class RunConfig:
    """Everything that describes a run."""

    run: RunSection
    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    """Where prompts come from, by name."""
    teachers: Annotated[list[TeacherConfig], Field(min_length=2)]
    service: ServiceConfig | None = None
    """The run's own sampling service; needed by teachers without a base_url or answers."""
    client: ClientConfig = ClientConfig()
    student: ModelConfig
    quality: QualityConfig = VerifierQuality()
    """What the quality of an answer is (PerSyn eq. 2)."""
    rewards: RewardConfig = RewardConfig()
    router: RouterConfig = RouterConfig()
    routing: RoutingConfig = RoutingConfig()
    mesh: MeshConfig = MeshConfig()
    gossip: GossipConfig = GossipConfig()
    training: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    benchmarks: BenchmarksConfig = BenchmarksConfig()

    def __post_init__(self):
        names = [teacher.name for teacher in self.teachers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"teachers: names must differ, {twice[0]!r} is given twice")
        lost = [t.name for t in self.teachers if t.needs_service and self.service is None]
        if lost:
            raise ValueError(
                f"teachers: {lost[0]!r} has no base_url, no file of answers, and the config has no "
                "service section"
            )
        if self.own_judge and self.service is None:
            raise ValueError("quality.judge: has no base_url and the config has no service section")
        _check_routing(self.routing, self.teachers)

    @property
    def run_folder(self) -> Path:
        return self.run.folder / self.run.name

    @property
    def own_judge(self) -> bool:
        """Whether the run's own service judges."""
        return isinstance(self.quality, JudgeQuality) and self.quality.judge.needs_service

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
