"""Config of a training run."""

from typing import Annotated

from pydantic import Field

from persyn_jax.config import config_class


@config_class
class OptimiserConfig:
    """AdamW with global-norm clipping; linear warm-up, then cosine decay to zero."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Part of all steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0


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
    """M: each on a device of its own, with its own data, parameters and optimiser state."""
    exchange_probability: Annotated[float, Field(ge=0, le=1)] = 0.25
    """p: chance that a worker pushes after a step; every worker throws its own coin."""
    audit: bool = False
    """Check in every step that no exchange makes or loses mass, and stop with the first that does.
    For debugging: it costs two all-reduces of the parameters a step."""


@config_class
class TrainConfig:
    """Supervised fine-tuning of the student."""

    epochs: Annotated[int, Field(ge=1)] = 1
    rows: Annotated[int, Field(ge=1)] = 1
    """Rows of a batch, per worker."""
    row_tokens: Annotated[int, Field(ge=2)] = 256
    """Length of a row; conversations are packed into it."""
    row_response_tokens: Annotated[int, Field(ge=1)] = 64
    """Room for response tokens in a row (logits exist for these only)."""
    optimiser: OptimiserConfig = OptimiserConfig()
    recompute: bool = False
    """Recompute activations in the backward pass: less memory, more work."""
    held_out: Annotated[int, Field(ge=1)] = 8
    """Conversations kept out of training for the held-out loss."""
    measure_every: Annotated[int, Field(ge=1)] = 10
    """Steps between measurements of held-out loss and consensus distance."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 20
    """Steps between checkpoints of all workers."""
    async_checkpoints: bool = True
    """Write checkpoints in the background, from a copy, while training goes on."""
    step_seconds: Annotated[float, Field(gt=0)] = 3600.0
    """The longest that a step may take, the first (which compiles) apart; then the process ends."""
