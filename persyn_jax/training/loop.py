"""The training loop: a generator that takes steps; who consumes it logs, measures and saves."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from persyn_jax import mesh as meshes
from persyn_jax.gossip import Schedule
from persyn_jax.training.config import OptimiserConfig
from persyn_jax.training.step import StepMetrics, TrainState


def make_optimiser(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    """AdamW for a run of `steps` steps."""
    learning_rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=max(1, round(config.warmup_fraction * steps)),
        decay_steps=max(2, steps),
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate, weight_decay=config.weight_decay),
    )


def run_steps(
    step: Callable[[TrainState, Any, Any], tuple[TrainState, StepMetrics]],
    state: TrainState,
    batch_at: Callable[[int], Any],
    schedule: Schedule,
    steps: range,
    mesh: Mesh,
) -> Iterator[tuple[int, TrainState, StepMetrics]]:
    """Takes `steps` (absolute numbers) from `state`; yields (number, state after it, metrics as NumPy [W]).

    batch_at(number) is the batch of all workers, [W, ...]. The state yielded is given up when the next step is asked for:
    it is donated. Raises FloatingPointError as soon as a worker's loss is not finite.
    """
    for number in steps:
        batch = jax.device_put(batch_at(number), meshes.per_worker(mesh))
        round = jax.device_put(schedule.round(number), meshes.replicated(mesh))
        state, metrics = step(state, batch, round)
        metrics = jax.tree.map(np.asarray, metrics)
        if not np.isfinite(metrics.loss).all():
            raise FloatingPointError(f"step {number}: loss by worker is {metrics.loss.tolist()}")
        yield number, state, metrics


def uniform_mean(stacked: Any) -> Any:
    """The paper's model: the uniform mean of the workers (GoSGD, Algorithm 1, line 11), as NumPy in the leaves' dtype."""
    return jax.tree.map(
        lambda leaf: np.asarray(leaf).mean(axis=0, dtype=np.float64).astype(leaf.dtype), stacked
    )
