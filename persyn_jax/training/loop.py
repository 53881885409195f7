"""The training loop: a generator that takes steps; who consumes it logs, measures and saves."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from persyn_jax import mesh as meshes
from persyn_jax.gossip import Schedule
from persyn_jax.training.meters import Part, timed
from persyn_jax.training.step import StepMetrics, TrainState, TrainStep


class Taken(NamedTuple):
    """A step that has been taken."""

    number: int
    state: TrainState
    """After it; donated, so gone, when the next step is asked for."""
    metrics: StepMetrics
    """NumPy, [W]."""
    seconds: Mapping[Part, float]
    """`compute`: until the metrics were there; the exchange is part of the step's program, and the
    next batch is made meanwhile. `input`: making the first batch, which nothing hides."""


def run_steps(
    step: TrainStep,
    state: TrainState,
    batch_at: Callable[[int], Any],
    schedule: Schedule,
    numbers: range,
    mesh: Mesh,
) -> Iterator[Taken]:
    """Takes the steps of these absolute numbers, from `state`, which is donated.

    step: of all workers, compiled. batch_at: number -> batch of all workers, placed. The next batch
    is made while a step runs.

    Raises FloatingPointError as soon as a worker's loss or gradient is not finite. The rule has
    kept the others clean (see `gossip.gosgd`), but that worker's optimiser state is spoilt.
    """
    seconds: dict[Part, float] = {}
    batch = None
    if numbers:
        with timed(seconds, "input"):
            batch = batch_at(numbers.start)
    for number in numbers:
        with timed(seconds, "compute"):
            round = meshes.place(schedule.round(number), meshes.replicated(mesh))
            state, metrics = step(state, batch, round)
            batch = batch_at(number + 1) if number + 1 in numbers else None
            metrics = meshes.read(metrics, mesh)
        if not np.isfinite([metrics.loss, metrics.gradient_norm]).all():
            raise FloatingPointError(
                f"training step {number}: not finite: loss by worker {metrics.loss.tolist()}, "
                f"gradient norm by worker {metrics.gradient_norm.tolist()}"
            )
        yield Taken(number, state, metrics, seconds)
        seconds = {}


def uniform_mean(stacked: Any, mesh: Mesh) -> Any:
    """The paper's model: the uniform mean of the workers (GoSGD, Algorithm 1, line 11).

    stacked: leaves [W, ...]. The mean is taken in float64; leaves come back one after the other as
    NumPy of their own dtype, on every process.
    """

    def mean(leaf):
        return leaf.astype(jnp.float64).mean(axis=0).astype(leaf.dtype)

    with jax.enable_x64(True):
        average = jax.jit(mean, out_shardings=meshes.replicated(mesh))
        return jax.tree.map(lambda leaf: np.array(average(leaf)), stacked)


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether this process has been asked to end (SIGTERM).

    On several processes all of them must ask it together: it is true for all if it is for one.
    """
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())

    def stops() -> bool:
        if jax.process_count() == 1:
            return asked.is_set()
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.array(asked.is_set()))))

    try:
        yield stops
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[int], None]]:
    """Ends the process, naming its rank and step, when a step takes longer than `seconds`.

    Yields a function to call with the number of the step that begins; before the first call nothing
    is watched. A peer that is stuck, not dead, would otherwise hold all others without a word: JAX
    only notices those that are gone. There is no way back from a collective, hence `os._exit`.
    """
    began: dict[str, tuple[int, float]] = {}  # the newest step
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(min(1.0, seconds / 4)):
            step, since = began.get("step", (0, math.inf))
            if time.monotonic() - since > seconds:
                print(
                    f"error: rank {jax.process_index()}: training step {step} has not "
                    f"finished in {seconds:g} s (training.step_seconds): a process or a device is "
                    "stuck; the same command goes on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield lambda step: began.update(step=(step, time.monotonic()))
    finally:
        ended.set()
