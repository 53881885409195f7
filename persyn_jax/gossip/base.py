"""The types that schedules, exchanges, rules and training loops meet in."""

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

    In each of K *slots* all workers send along one permutation of the bank. A worker of degree d in
    a round's graph uses d slots.
    """

    index: Array
    """int32[]: t, the number of the round."""
    sync: Array
    """bool[]: whether workers exchange in this round. Outer optimisers step in such rounds only."""
    average: Array
    """bool[]: all present workers take their exact mean, by an all-reduce, before the slots."""
    branch_K: Array
    """int32[K]: the permutation of each slot; 0 is the identity, that is: nobody sends. Slots in
    use come first."""
    weight_KW: Array
    """float[K, W]: the weight of the message that each worker gets through each slot; 0 for none.
    Averaging rules read it as the receiver's step towards the sender, sum-weight rules as the share
    of its mass that the sender gives away."""
    steps_W: Array
    """bool[W]: who takes its local step (a dead or a late worker does not)."""
    present_W: Array
    """bool[W]: who is there. The others neither send nor receive nor count in the mean."""


class MixingTransformation(NamedTuple):
    """A rule as pure functions of one worker, in the manner of `optax.GradientTransformation`.

    All three see one worker's arrays, with no axis W. They are run for all workers at once under
    `jax.shard_map` (a device each) or `jax.vmap(axis_name=...)` (all on one device).
    """

    init: Callable[[Params], MixState]
    """`init(params) -> mix_state`."""
    evaluate_at: Callable[[Params, MixState], Params]
    """`evaluate_at(params, mix_state) -> params`: where the gradient is taken, and the model that a
    worker would hand out."""
    update: Callable[[Params, MixState, Params, Round], tuple[Params, MixState]]
    """`update(updates, mix_state, params, round) -> (params, mix_state)`: applies the local step
    (updates in optax's sense: to be added) and mixes, in the rule's own order."""
