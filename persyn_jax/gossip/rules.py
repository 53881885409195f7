"""Mixing rules: each is its equation, over `send`, `average` and `mix`.

All of them treat faults alike. A worker whose update is not finite drops the whole update and
counts for nothing in this round: it neither sends nor enters the mean, and the others go on bitwise
as if its messages had not been scheduled. It still receives. A worker that does not step
(`Round.steps_W`) has an update of zero.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from persyn_jax.gossip.base import Array, MixingTransformation, Params, Round
from persyn_jax.gossip.exchange import (
    Exchange,
    average,
    incoming,
    mine,
    mix,
    outgoing,
    send,
    unlike_shards,
    when,
)


class SumWeightState(NamedTuple):
    """State of one worker under `gosgd` or `push_sum`."""

    sum_weight: Array
    """float32[]: GoSGD's alpha, 1 in total; push-sum's w, W in total."""
    pair_distance: Array
    """float32[]: squared distance to what was received in the last round, see `mix`."""


class PairState(NamedTuple):
    """State of one worker under a rule that remembers nothing else."""

    pair_distance: Array
    """float32[]: squared distance to what was received in the last round, see `mix`."""


class CentreState(NamedTuple):
    """State of one worker under `easgd`."""

    centre: Params
    """The centre's parameters: every worker holds the same copy."""


class FetchedState(NamedTuple):
    """State of one worker under `downpour`."""

    centre: Params
    """The centre's parameters: every worker holds the same copy."""
    fetched: Params
    """What this worker fetched last."""


def gosgd(exchange: Exchange) -> MixingTransformation:
    """GoSGD's sum-weight push in lock step (arXiv 1611.09726 and 1804.01852, Algorithms 1 and 2).

    A round: apply the local update, push x and a share of alpha (half of it, in the paper) along
    the round's messages, merge,

        x_r <- x_r + sum_s s / (k + sum s) (x_s - x_r),    alpha_r <- k + sum s,

    with s the weights received and k the weight kept. A message of step t is merged before step
    t + 1 begins: the order of Algorithm 1, where all workers keep pace. A weight that is sent is
    rounded down to `sum_weight_unit`; a worker that holds a single unit sends nothing.
    """

    def init(params: Params) -> SumWeightState:
        unit = sum_weight_unit()
        return _sum_weight_state(round(1 / (exchange.bank.workers * unit)) * unit)

    def update(updates: Params, mix_state: SumWeightState, params: Params, round: Round):
        unit, alpha = sum_weight_unit(), mix_state.sum_weight
        chex.assert_shape(alpha, ())
        params, ok = local_step(updates, params, round, exchange)
        params = average(params, alpha, ok, round, exchange)
        shared_K = jnp.floor(alpha * outgoing(round, exchange) / unit) * unit
        sent_K = jnp.where(ok, shared_K, 0)
        got_K = send(sent_K, round, exchange)
        total = alpha - sent_K.sum() + got_K.sum()
        gain_K = jnp.where(got_K > 0, got_K / jnp.where(total > 0, total, 1), 0)
        params, distance = mix(params, gain_K, round, exchange)
        return params, SumWeightState(total, distance.astype(alpha.dtype))

    return MixingTransformation(init, _at_params, update)


def push_sum(exchange: Exchange) -> MixingTransformation:
    """Stochastic gradient push (Assran et al. 2019, arXiv 1811.10792, Algorithm 1).

        x <- A (x + u),    w <- A w,    gradients and answers at z = x / w

    with A the push matrix of the round. The parameters of this rule are the numerators x; the model
    is `evaluate_at`.
    """

    def evaluate_at(params: Params, mix_state: SumWeightState) -> Params:
        return jax.tree.map(lambda leaf: (leaf / mix_state.sum_weight).astype(leaf.dtype), params)

    def update(updates: Params, mix_state: SumWeightState, params: Params, round: Round):
        params, ok = local_step(updates, params, round, exchange)
        params, weight = average(
            (params, mix_state.sum_weight), jnp.float32(1), ok, round, exchange
        )
        share_K = jnp.where(ok, outgoing(round, exchange), 0)
        got_K = send(weight * share_K, round, exchange)
        gain_K = jnp.where(got_K > 0, incoming(round, exchange), 0)
        kept = 1 - share_K.sum()
        params, distance = mix(params, gain_K, round, exchange, scale=kept + gain_K.sum())
        weight = (kept * weight + got_K.sum()).astype(weight.dtype)
        return params, SumWeightState(weight, distance.astype(weight.dtype))

    return MixingTransformation(lambda params: _sum_weight_state(1), evaluate_at, update)


def d_psgd(exchange: Exchange) -> MixingTransformation:
    """D-PSGD, averaging with neighbours after the step (Lian et al. 2017, arXiv 1705.09056).

        x <- W (x + u)

    with W the pull matrix of the round. Averaging before the step, x <- W x + u, is `delayed` of
    this rule. Over `local_sgd_schedule` it is local SGD; over any schedule it is the "adapt then
    combine" of the diffusion literature.
    """

    def update(updates: Params, mix_state: PairState, params: Params, round: Round):
        params, ok = local_step(updates, params, round, exchange)
        params, distance = pull(params, ok, round, exchange)
        return params, PairState(distance.astype(mix_state.pair_distance.dtype))

    return MixingTransformation(lambda params: PairState(_zero()), _at_params, update)


def peer_average(exchange: Exchange, rate: float = 0.5) -> MixingTransformation:
    """levanter's elastic peer averaging: x <- (1 - rate) (x + u) + rate mean(peers heard).

    The round says whom a worker reads, not with what weight. No mass is conserved: a baseline.
    """

    def update(updates: Params, mix_state: PairState, params: Params, round: Round):
        params, ok = local_step(updates, params, round, exchange)
        params = average(params, jnp.float32(1), ok, round, exchange)
        heard_K = send(jnp.where(ok, outgoing(round, exchange), 0), round, exchange) > 0
        gain_K = heard_K * (rate / jnp.maximum(heard_K.sum(), 1))
        params, distance = mix(params, gain_K, round, exchange)
        return params, PairState(distance.astype(mix_state.pair_distance.dtype))

    return MixingTransformation(lambda params: PairState(_zero()), _at_params, update)


def all_reduce(exchange: Exchange) -> MixingTransformation:
    """Fully synchronous SGD: x <- x + mean of the updates. Every round, whatever the schedule.

    The mean is over the workers that are present, step, and have a finite update.
    """

    def update(updates: Params, mix_state: tuple, params: Params, round: Round):
        here, ok = mine(round.present_W, exchange), is_finite(updates, exchange)
        counts = here & ok & mine(round.steps_W, exchange)
        total = lax.psum(counts.astype(jnp.float32), exchange.axis_name)

        def mean(leaf):
            wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
            summed = lax.psum(jnp.where(counts, wide, 0), exchange.axis_name)
            return jnp.where(here, summed / jnp.maximum(total, 1), 0).astype(leaf.dtype)

        return optax.apply_updates(params, jax.tree.map(mean, updates)), mix_state

    return MixingTransformation(lambda params: (), _at_params, update)


def easgd(exchange: Exchange, moving_rate: float) -> MixingTransformation:
    """Elastic averaging (Zhang et al. 2015, arXiv 1412.6651), synchronous: in sync rounds

        x_m <- x_m - a (x_m - c),    c <- c + a sum_m (x_m - c).

    moving_rate: a = eta rho; the centre is stable for W a <= 1. The centre starts where the workers
    start, which must be the same place.
    """

    def update(updates: Params, mix_state: CentreState, params: Params, round: Round):
        params, ok = local_step(updates, params, round, exchange)
        meets = ok & mine(round.present_W, exchange)

        def meet(params, centre):
            pulled = jax.tree.map(
                lambda x, c: jnp.where(meets, moving_rate * (x - c), 0), params, centre
            )
            return jax.tree.map(jnp.subtract, params, pulled), _add_sum(centre, pulled, exchange)

        params, centre = when(round.sync, meet, params, mix_state.centre)
        return params, CentreState(centre)

    return MixingTransformation(CentreState, _at_params, update)


def downpour(exchange: Exchange) -> MixingTransformation:
    """Downpour SGD (Dean et al. 2012), synchronous: in sync rounds

        c <- c + sum_m (x_m - f_m),    x_m <- c,    f_m <- c.

    with f_m what worker m fetched last. A worker that misses such a round keeps its progress for
    the next. The centre starts where the workers start, which must be the same place.
    """

    def update(updates: Params, mix_state: FetchedState, params: Params, round: Round):
        params, ok = local_step(updates, params, round, exchange)
        meets = ok & mine(round.present_W, exchange)

        def meet(params, centre, fetched):
            progress = jax.tree.map(lambda x, f: jnp.where(meets, x - f, 0), params, fetched)
            centre = _add_sum(centre, progress, exchange)
            return select(meets, centre, params), centre, select(meets, centre, fetched)

        params, centre, fetched = when(
            round.sync, meet, params, mix_state.centre, mix_state.fetched
        )
        return params, FetchedState(centre, fetched)

    return MixingTransformation(lambda params: FetchedState(params, params), _at_params, update)


def no_mixing(exchange: Exchange) -> MixingTransformation:
    """Every worker for itself: the local update and nothing else. The baseline."""

    def update(updates: Params, mix_state: tuple, params: Params, round: Round):
        params, _ = local_step(updates, params, round, exchange)
        return params, mix_state

    return MixingTransformation(lambda params: (), _at_params, update)


# What rules have in common.


def local_step(
    updates: Params, params: Params, round: Round, exchange: Exchange
) -> tuple[Params, jax.Array]:
    """The parameters after this worker's own update, and whether that was finite (bool[]).

    An update that is not finite is dropped whole, and so is that of a worker that does not step.
    """
    # Else XLA makes them twice: for the look whether they are finite, and to be added. A barrier
    # around all leaves would make them vary alike over a worker's chips (JAX 0.10).
    updates = jax.tree.map(lax.optimization_barrier, updates)
    ok = is_finite(updates, exchange)
    steps = ok & mine(round.steps_W, exchange)
    updates = jax.tree.map(lambda leaf: jnp.where(steps, leaf, 0), updates)
    return optax.apply_updates(params, updates), ok


def is_finite(updates: Params, exchange: Exchange) -> jax.Array:
    """bool[]: whether every number of this worker's `updates` is finite, in all of its shards."""
    # Less itself, what is not finite is NaN, and so is a sum with it: one pass, without an array of
    # answers (or, for times 0, of zeros). A maximum would not do: on CPU, XLA's does not see NaN.
    finite = jax.tree.map(lambda leaf: jnp.isfinite(jnp.sum(leaf - leaf)), updates)
    ok = jax.tree.reduce(jnp.logical_and, finite, jnp.bool_(True))
    unlike = unlike_shards(ok, exchange)
    return lax.pmin(ok.astype(jnp.int32), unlike) > 0 if unlike else ok


def pull(
    params: Params, ok: jax.Array, round: Round, exchange: Exchange
) -> tuple[Params, jax.Array]:
    """W x with W the pull matrix of the round, and the squared distance to what was received."""
    params = average(params, jnp.float32(1), ok, round, exchange)
    gain_K = send(jnp.where(ok, outgoing(round, exchange), 0), round, exchange)
    return mix(params, gain_K, round, exchange)


def select(condition: jax.Array, yes: Params, no: Params) -> Params:
    """`yes` where the condition, bool[], holds, else `no`, for trees of one structure."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def sum_weight_unit() -> float:
    """Sum weights are multiples of this: 2^-24, or 2^-53 under jax_enable_x64. Up to 1, floating
    point adds such numbers without rounding, so their total never changes (plain halves were seen
    to drift by 1e-6 in a few thousand rounds)."""
    return float(jnp.finfo(jnp.result_type(float)).eps) / 2


def _add_sum(centre: Params, parts: Params, exchange: Exchange) -> Params:
    return jax.tree.map(lambda c, part: c + lax.psum(part, exchange.axis_name), centre, parts)


def _at_params(params: Params, mix_state) -> Params:
    return params


def _zero() -> jax.Array:
    return jnp.zeros((), float)


def _sum_weight_state(weight: float) -> SumWeightState:
    return SumWeightState(jnp.asarray(weight, float), _zero())
