"""Config of a training run."""

from typing import Annotated, Literal

from pydantic import Field

from persyn_jax.config import config_class
from persyn_jax.models.recompute import Recompute

ComputeDtype = Literal["float32", "bfloat16"]
LoraTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]


@config_class
class OptimiserConfig:
    """What turns a gradient into a step: clipping, the optimiser, decoupled weight decay, and a
    learning rate with linear warm-up. See `training.optimisers`."""

    name: Literal["adamw", "adafactor", "muon", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak. The same size suits all but `sgd`: the others' steps have a root mean square of about
    this at most."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After warm-up."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Part of all steps."""
    end_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Of `cosine`: the part of the peak that it falls to."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Times the learning rate, and never of norms and biases."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Longest global norm of a gradient; null: any."""
    b1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment; `muon` uses Adam for all that is no matrix."""
    b2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of `sgd` (null: 0.9) and `muon` (null: 0.95), both with Nesterov's look ahead."""

    def __post_init__(self):
        if self.momentum is not None and self.name not in ("sgd", "muon"):
            raise ValueError(f"momentum {self.momentum}: {self.name} has none (sgd and muon do)")
        if self.name not in ("adamw", "muon") and (self.b1, self.b2, self.eps) != (
            0.9,
            0.999,
            1e-8,
        ):
            raise ValueError(f"b1, b2, eps: {self.name} has none (adamw and muon do)")
        if self.schedule == "constant" and self.end_fraction:
            raise ValueError(f"end_fraction {self.end_fraction}: a constant schedule does not fall")


@config_class
class LoraConfig:
    """Low-rank adapters beside kernels that stay as they are (LoRA, arXiv 2106.09685). They alone
    are trained, mixed and saved in checkpoints. See `models.adapters`."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[int, Field(ge=1)] = 32
    """What an adapter adds is multiplied by alpha / rank."""
    targets: Annotated[tuple[LoraTarget, ...], Field(min_length=1)] = (
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    )
    """Which kernels of every layer have an adapter."""

    def __post_init__(self):
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets {list(self.targets)}: one is given twice")


@config_class
class MeshConfig:
    """The chips of one worker; there are gossip.workers times as many in all."""

    fsdp: Annotated[int, Field(ge=1)] = 1
    """Chips among which a worker's rows, parameters and optimiser state are divided."""
    tensor: Annotated[int, Field(ge=1)] = 1
    """Chips among which attention heads and feed-forward features are divided."""


@config_class
class GossipConfig:
    """Who trains and how often parameters are mixed (GoSGD)."""

    workers: Annotated[int, Field(ge=1)] = 2
    """M: each on mesh.fsdp * mesh.tensor devices of its own, with its own data, parameters and
    optimiser state."""
    exchange_probability: Annotated[float, Field(ge=0, le=1)] = 0.25
    """p: chance that a worker pushes after a step; every worker throws its own coin."""
    audit: bool = False
    """Check in every step that no exchange makes or loses mass, and stop with the first that does.
    For debugging: it costs two all-reduces of the parameters a step."""


@config_class
class TrainConfig:
    """Supervised fine-tuning of the student."""

    epochs: Annotated[int, Field(ge=1)] = 1
    examples: Annotated[int, Field(ge=2)] | None = None
    """How many of the usable answers are used, those held out included, drawn by the run's seed;
    null: all. Of two runs on the same prompts, both draw the same prompts as far as they can."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Of the order of examples, of what is held out and of who gossips; null: the run's."""
    rows: Annotated[int, Field(ge=1)] = 1
    """Rows of a batch, per worker."""
    row_tokens: Annotated[int, Field(ge=2)] = 256
    """Length of a row; conversations are packed into it."""
    row_response_tokens: Annotated[int, Field(ge=1)] = 64
    """Room for response tokens in a row (logits exist for these only)."""
    lora: LoraConfig | None = None
    """Null: full fine-tuning, of all parameters."""
    optimiser: OptimiserConfig = OptimiserConfig()
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Batches whose gradients are added up before a step is taken: `rows` of each at a time."""
    compute_dtype: ComputeDtype = "float32"
    """What the loss computes in; parameters, optimiser and mixing are float32 always."""
    recompute: Recompute = "nothing"
    """What the backward pass computes again instead of keeping it: less memory, more work."""
    held_out: Annotated[int, Field(ge=1)] = 8
    """Conversations kept out of training for the held-out loss."""
    measure_every: Annotated[int, Field(ge=1)] = 10
    """Steps between measurements of held-out loss and consensus distance."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 20
    """Steps between checkpoints of all workers."""
    time_exchange: bool = False
    """Time the exchange alone before the first step, so that a step's seconds can be split; takes
    a compilation and, for a moment, room for a second copy of the parameters."""
    async_checkpoints: bool = True
    """Write checkpoints in the background, from a copy, while training goes on."""
    step_seconds: Annotated[float, Field(gt=0)] = 3600.0
    """The longest that a step may take, with what is measured and saved after it; then the process
    ends. The first, which compiles, may take any time."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go besides metrics.jsonl; each needs its own package."""
    profile_steps: Annotated[str, Field(pattern=r"^[0-9]+:[0-9]+$")] | None = None
    """`10:15` records a profile of steps 10 to 14."""

    def __post_init__(self):
        if self.profile_steps is not None and not self.profiled:
            raise ValueError(f"profile_steps {self.profile_steps!r}: holds no step")

    @property
    def profiled(self) -> range:
        """The numbers of the steps to profile."""
        first, end = map(int, (self.profile_steps or "0:0").split(":"))
        return range(first, end)
