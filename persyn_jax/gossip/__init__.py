"""Gossip training: workers keep their own parameters and now and then mix them with a partner's.

A *schedule* says who pushes to whom in which round (a NumPy table). A *rule* says what a push does
to the parameters (a `MixingTransformation`: pure functions of one worker, in the manner of optax).
Four workers on one device:

    >>> import jax, jax.numpy as jnp
    >>> from persyn_jax import gossip
    >>> schedule = gossip.gosgd_schedule(workers=4, rounds=50, exchange_probability=0.5, seed=0)
    >>> mixing = gossip.gosgd(schedule.bank, axis_name="worker")
    >>> step = jax.jit(jax.vmap(mixing.update, in_axes=(0, 0, 0, None), axis_name="worker"))
    >>> params_W = {"x": jnp.arange(4.0)}
    >>> state_W = jax.vmap(mixing.init)(params_W)
    >>> for t in range(schedule.rounds):
    ...     updates_W = {"x": jnp.zeros(4)}  # whatever an optax optimiser says
    ...     params_W, state_W = step(updates_W, state_W, params_W, schedule.round(t))
    >>> gossip.consensus_distance_stacked(params_W) < 1e-6
    True
    >>> round(float(state_W.sum_weight.sum()), 6)
    1.0

With a device a worker, `jax.shard_map` takes the place of `jax.vmap` and nothing else changes.
"""

from persyn_jax.gossip.base import MixingTransformation, MixState, Params, Round
from persyn_jax.gossip.exchange import mix, receive
from persyn_jax.gossip.metrics import (
    consensus_distance,
    consensus_distance_stacked,
    weighted_mean,
    weighted_mean_stacked,
)
from persyn_jax.gossip.rules import GoSGDState, gosgd, no_mixing
from persyn_jax.gossip.schedules import (
    Bank,
    Schedule,
    expected_gosgd_matrix,
    gosgd_schedule,
    shift_bank,
    xor_bank,
)

__all__ = [
    "Bank",
    "GoSGDState",
    "MixState",
    "MixingTransformation",
    "Params",
    "Round",
    "Schedule",
    "consensus_distance",
    "consensus_distance_stacked",
    "expected_gosgd_matrix",
    "gosgd",
    "gosgd_schedule",
    "mix",
    "no_mixing",
    "receive",
    "shift_bank",
    "weighted_mean",
    "weighted_mean_stacked",
    "xor_bank",
]
