"""Mixing rules: each is its equation, over `receive` and `mix`."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from persyn_jax.gossip.base import Array, MixingTransformation, Params, Round
from persyn_jax.gossip.exchange import mix, receive
from persyn_jax.gossip.schedules import Bank

SUM_WEIGHT_UNIT = 2.0**-24
"""Sum weights are multiples of this. Up to 1, float32 adds such numbers without rounding, so their
total never changes (plain halves were seen to drift by 1e-6 in a few thousand rounds)."""


class GoSGDState(NamedTuple):
    """State of one worker."""

    sum_weight: Array
    """float32[]: alpha, a multiple of SUM_WEIGHT_UNIT. Over all workers it totals 1."""


def gosgd(bank: Bank, axis_name: str) -> MixingTransformation:
    """GoSGD's sum-weight push in lock step (arXiv 1611.09726 and 1804.01852, Algorithms 1 and 2).

    A round: apply the local update, push (x, alpha / 2) if the worker's coin says so, merge,

        x_r <- x_r + s / (k + s) (x_s - x_r),    alpha_r <- k + s,

    with s the weight received and k the weight kept. A message of step t is merged before step
    t + 1 begins: the order of Algorithm 1, where all workers keep pace. Half a weight is rounded
    down to SUM_WEIGHT_UNIT; a worker that holds a single unit sends nothing.

    A worker whose update is not finite drops the whole update, does not push and keeps its whole
    sum weight; it still receives. The others go on bitwise as if its coin had said no.
    """

    def init(params: Params) -> GoSGDState:
        units = round(1 / (bank.workers * SUM_WEIGHT_UNIT))
        return GoSGDState(sum_weight=jnp.float32(units * SUM_WEIGHT_UNIT))

    def update(updates: Params, mix_state: GoSGDState, params: Params, round: Round):
        chex.assert_shape(round.push_W, (bank.workers,))
        chex.assert_shape(mix_state.sum_weight, ())
        chex.assert_type(mix_state.sum_weight, jnp.float32)
        ok = _all_finite(updates)
        updates = jax.tree.map(lambda leaf: jnp.where(ok, leaf, 0), updates)
        params = optax.apply_updates(params, updates)

        pushes = jnp.asarray(round.push_W)[lax.axis_index(axis_name)] & ok  # data, not control flow
        half_units = jnp.floor(mix_state.sum_weight / (2 * SUM_WEIGHT_UNIT))
        sent = jnp.where(pushes, half_units * SUM_WEIGHT_UNIT, 0)
        kept = mix_state.sum_weight - sent
        received = receive(sent, round.branch, bank, axis_name)
        gain = received / (kept + received)

        def merge(own, other):
            # A message without weight is not looked at: it may hold NaN, and 0 * NaN is NaN.
            # Standing between product and sum, the select also rules out a fused multiply-add,
            # which XLA uses in some layouts only: so the result is bitwise the same in all.
            return own + jnp.where(received > 0, gain * (other - own), 0)

        params = mix(params, round.branch, merge, bank, axis_name)
        return params, GoSGDState(sum_weight=kept + received)

    return MixingTransformation(init, lambda params, mix_state: params, update)


def no_mixing() -> MixingTransformation:
    """Every worker for itself: the local update and nothing else. The baseline."""
    return MixingTransformation(
        init=lambda params: (),
        evaluate_at=lambda params, mix_state: params,
        update=lambda updates, mix_state, params, round: (
            optax.apply_updates(params, updates),
            mix_state,
        ),
    )


def _all_finite(updates: Params) -> jax.Array:
    """bool[]: whether every number of `updates` is finite."""
    finite = jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), updates)
    return jax.tree.reduce(jnp.logical_and, finite, jnp.bool_(True))
