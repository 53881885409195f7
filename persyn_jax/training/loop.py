"""The training loop: a generator that takes steps; who consumes it logs, measures and saves."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from persyn_jax import mesh as meshes
from persyn_jax.gossip import Schedule
from persyn_jax.training.step import StepMetrics, TrainState, TrainStep


class Taken(NamedTuple):
    """A step that has been taken."""

    number: int
    state: TrainState
    """After it; donated, so gone, when the next step is asked for."""
    metrics: StepMetrics
    """NumPy, [W]."""


def run_steps(
    step: TrainStep,
    state: TrainState,
    batch_at: Callable[[int], Any],
    schedule: Schedule,
    numbers: range,
    mesh: Mesh,
) -> Iterator[Taken]:
    """Takes the steps of these absolute numbers, from `state`, which is donated.

    step: of all workers, from `on_mesh`. batch_at: number -> batch of all workers, [W, ...].
    Raises FloatingPointError as soon as a worker's loss or gradient is not finite. The rule has
    kept the others clean (see `gossip.gosgd`), but that worker's optimiser state is spoilt.
    """
    for number in numbers:
        batch = jax.device_put(batch_at(number), meshes.per_worker(mesh))
        round = jax.device_put(schedule.round(number), meshes.replicated(mesh))
        state, metrics = step(state, batch, round)
        metrics = jax.tree.map(np.asarray, metrics)
        if not np.isfinite([metrics.loss, metrics.gradient_norm]).all():
            raise FloatingPointError(
                f"training step {number}: not finite: loss by worker {metrics.loss.tolist()}, "
                f"gradient norm by worker {metrics.gradient_norm.tolist()}"
            )
        yield Taken(number, state, metrics)


def uniform_mean(stacked: Any) -> Any:
    """The paper's model: the uniform mean of the workers (GoSGD, Algorithm 1, line 11).

    stacked: leaves [W, ...]. The mean is taken in float64; leaves are NumPy of their own dtype.
    """

    def mean(leaf):
        # Shard by shard: an array that is asked for as a whole keeps the copy that it hands out.
        rows_W = np.concatenate([np.asarray(shard.data) for shard in leaf.addressable_shards])
        return rows_W.mean(axis=0, dtype=np.float64).astype(leaf.dtype)

    return jax.tree.map(mean, stacked)
