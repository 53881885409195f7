"""Outer optimisers: local steps, and now and then a step on what they came to, over any exchange.

In rounds without `sync` a worker takes its local step and nothing else. In a sync round, with
theta the parameters after the last one, y those now, and W x what `pull` makes of x (the exact mean
over `complete`, a partner's half over a matching, ...), each rule is one line of algebra. A worker
that is absent keeps everything.

With W the exact mean, `slowmo` is SlowMo, `diloco` is DiLoCo, and `noloco` is SlowMo again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from persyn_jax.gossip.base import Array, MixingTransformation, Params, Round
from persyn_jax.gossip.exchange import Exchange, mine, when
from persyn_jax.gossip.rules import local_step, pull, select


class OuterState(NamedTuple):
    """State of one worker under an outer optimiser."""

    anchor: Params
    """theta, the parameters after the last sync round (`gasloc`: y of the last sync round)."""
    optimiser: Any
    """What the outer optimiser remembers: its momentum."""
    pair_distance: Array
    """float32[]: squared distance to what was received in the last sync round, see `mix`."""


def slowmo(
    exchange: Exchange, momentum: float, learning_rate: float, inner_learning_rate: float
) -> MixingTransformation:
    """SlowMo (Wang et al. 2020, arXiv 1910.00643, Algorithm 1), over any exchange.

        m <- beta m + (theta - W y) / gamma,    theta <- theta - alpha gamma m

    momentum: beta. learning_rate: alpha. inner_learning_rate: gamma.
    """

    def step(y, theta, m, mixed):
        mixed_y, distance = mixed(y)
        m = _map(lambda m, t, w: momentum * m + (t - w) / inner_learning_rate, m, theta, mixed_y)
        theta = _map(lambda t, m: t - learning_rate * inner_learning_rate * m, theta, m)
        return theta, theta, m, distance

    return _outer(exchange, _zeros, step)


def diloco(
    exchange: Exchange, optimiser: optax.GradientTransformation | None = None
) -> MixingTransformation:
    """DiLoCo (Douillard et al. 2023, arXiv 2311.08105, Algorithm 1), over any exchange.

        theta <- OuterOpt(theta, theta - W y)

    optimiser: the outer one, an optax optimiser for the outer gradient theta - W y; if not given
    the paper's, SGD with rate 0.7 and Nesterov momentum 0.9.
    """
    outer = optimiser or optax.sgd(0.7, momentum=0.9, nesterov=True)

    def step(y, theta, state, mixed):
        mixed_y, distance = mixed(y)
        updates, state = outer.update(_map(jnp.subtract, theta, mixed_y), state, theta)
        theta = optax.apply_updates(theta, updates)
        return theta, theta, state, distance

    return _outer(exchange, outer.init, step)


def noloco(exchange: Exchange, momentum: float, learning_rate: float) -> MixingTransformation:
    """NoLoCo (Kolehmainen et al. 2025, arXiv 2506.10911), over any exchange; theirs is pairs.

        m <- beta m + a W (y - theta) + a (W theta - theta),    theta <- theta + m

    momentum: beta. learning_rate: a, which in the authors' code also pulls the anchors together.
    W (y - theta) + W theta is W y: one model travels.
    """

    def step(y, theta, m, mixed):
        mixed_y, distance = mixed(y)
        m = _map(lambda m, w, t: momentum * m + learning_rate * (w - t), m, mixed_y, theta)
        theta = _map(jnp.add, theta, m)
        return theta, theta, m, distance

    return _outer(exchange, _zeros, step)


def gasloc(exchange: Exchange, momentum: float) -> MixingTransformation:
    """GASLoC (arXiv 2606.11081), over any exchange.

        theta <- W y + gamma (y - y_before)

    momentum: gamma; y_before is y of the sync round before, at first theta. W = I - alpha Lambda in
    the paper's letters. The bracket is local: with W the exact mean, the mean over the workers
    follows DiLoCo (rate 1, Nesterov momentum gamma), each worker only for gamma = 0.
    """

    def step(y, y_before, nothing, mixed):
        mixed_y, distance = mixed(y)
        theta = _map(lambda w, y, b: w + momentum * (y - b), mixed_y, y, y_before)
        return theta, y, nothing, distance

    return _outer(exchange, lambda params: (), step)


def _outer(
    exchange: Exchange, init: Callable[[Params], Any], step: Callable
) -> MixingTransformation:
    """A rule that does `step` in sync rounds.

    step: (y, anchor, optimiser state, mixed) -> (parameters, anchor, optimiser state, distance),
    with `mixed(x)` the pull of the round and its distance.
    """

    def update(updates: Params, mix_state: OuterState, params: Params, round: Round):
        params, ok = local_step(updates, params, round, exchange)
        present = mine(round.present_W, exchange)

        def sync(params, state):
            theta, anchor, optimiser, distance = step(
                params,
                state.anchor,
                state.optimiser,
                lambda tree: pull(tree, ok, round, exchange),
            )
            stepped = OuterState(anchor, optimiser, distance.astype(state.pair_distance.dtype))
            return select(present, (theta, stepped), (params, state))

        return when(round.sync, sync, params, mix_state)

    return MixingTransformation(
        init=lambda params: OuterState(params, init(params), jnp.zeros((), float)),
        evaluate_at=lambda params, mix_state: params,
        update=update,
    )


_map = jax.tree.map


def _zeros(params: Params) -> Params:
    return jax.tree.map(jnp.zeros_like, params)
