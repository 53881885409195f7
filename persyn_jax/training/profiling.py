"""A profile of some steps, on request."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax


@contextlib.contextmanager
def profiled(steps: range, folder: Path) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with a step's number before it is taken, and profiles `steps`.

    The trace goes to `folder`, for TensorBoard's or XProf's profile page. A run that begins inside
    `steps` is profiled from there; one that ends inside them keeps what it has.
    """
    running = False

    def before_step(number: int) -> None:
        nonlocal running
        if running != (number in steps):
            running = not running
            if running:
                jax.profiler.start_trace(str(folder))
            else:
                jax.profiler.stop_trace()

    try:
        yield before_step
    finally:
        if running:
            jax.profiler.stop_trace()
