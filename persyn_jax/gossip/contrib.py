"""New and less settled rules. They pass the same contract tests as the others."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from persyn_jax.gossip.base import Array, MixingTransformation, Params, Round
from persyn_jax.gossip.exchange import Exchange, mine
from persyn_jax.gossip.rules import local_step, pull, select


class D2State(NamedTuple):
    """State of one worker."""

    correction: Params
    """x_t - x_{t-1} - u_{t-1}: what the last exchange did to this worker's own step."""
    pair_distance: Array
    """float32[]: squared distance to what was received in the last round, see `mix`."""


def d2(exchange: Exchange) -> MixingTransformation:
    """D2, averaging that unlike data do not bias (Tang et al. 2018, arXiv 1803.07068, Algorithm 1):

        x_{t+1} = W (2 x_t - x_{t-1} + u_t - u_{t-1}),    x_1 = W (x_0 + u_0).

    W must be symmetric with eigenvalues above -1/3, and the same in every round. A worker that is
    absent keeps everything.
    """

    def update(updates: Params, mix_state: D2State, params: Params, round: Round):
        stepped, ok = local_step(updates, params, round, exchange)
        corrected = jax.tree.map(jnp.add, stepped, mix_state.correction)
        mixed, distance = pull(corrected, ok, round, exchange)
        correction = jax.tree.map(jnp.subtract, mixed, stepped)
        moved = mixed, D2State(correction, distance.astype(mix_state.pair_distance.dtype))
        return select(mine(round.present_W, exchange), moved, (params, mix_state))

    return MixingTransformation(
        lambda params: D2State(jax.tree.map(jnp.zeros_like, params), jnp.zeros((), float)),
        lambda params, mix_state: params,
        update,
    )
