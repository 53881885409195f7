"""The two types that schedules, rules and training loops meet in."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = Any
"""A pytree of floating-point arrays; the same tree serves for updates."""
MixState = Any
"""A pytree that belongs to the rule."""


class Round(NamedTuple):
    """One row of a schedule: everything that tells this round from another.

    Every worker is given the same row (a replicated argument, never closed over), so one compiled
    program serves all rounds, and control flow that follows it is the same on all workers.
    """

    branch: Array
    """int32[]: index into the bank of permutations; 0 is the identity, that is: nobody sends."""
    push_W: Array
    """bool[W]: the coins, whether each worker pushes."""


class MixingTransformation(NamedTuple):
    """A rule as pure functions of one worker, in the manner of `optax.GradientTransformation`.

    All three see one worker's arrays, with no axis W. They are run for all workers at once under
    `jax.shard_map` (a device each) or `jax.vmap(axis_name=...)` (all on one device).
    """

    init: Callable[[Params], MixState]
    """`init(params) -> mix_state`."""
    evaluate_at: Callable[[Params, MixState], Params]
    """`evaluate_at(params, mix_state) -> params`: where the gradient is taken."""
    update: Callable[[Params, MixState, Params, Round], tuple[Params, MixState]]
    """`update(updates, mix_state, params, round) -> (params, mix_state)`: applies the local step
    (updates in optax's sense: to be added) and mixes, in the rule's own order."""
