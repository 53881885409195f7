"""How far apart the workers are, and where their middle is.

Two forms of each: one worker's, inside the step with its axis name (it costs an all-reduce of the
parameters, so not in every step), and the stacked one in NumPy for arrays [W, ...] on the host.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from persyn_jax.gossip.base import Array, Params


def consensus_distance(params: Params, axis_name: str) -> jax.Array:
    """float32[]: GoSGD's eps = sum_m ||x_m - xbar||^2 over the workers, the same value on each."""

    def squared_distance(leaf):
        wide = leaf.astype(jnp.float32)
        return jnp.sum((wide - lax.pmean(wide, axis_name)) ** 2)

    return lax.psum(sum(map(squared_distance, jax.tree.leaves(params))), axis_name)


def weighted_mean(params: Params, sum_weight: jax.Array, axis_name: str) -> Params:
    """sum_m alpha_m x_m / sum_m alpha_m, which no push moves. The same on each worker."""
    total = lax.psum(sum_weight, axis_name)

    def mean(leaf):
        weighted = sum_weight / total * leaf.astype(jnp.float32)
        return lax.psum(weighted, axis_name).astype(leaf.dtype)

    return jax.tree.map(mean, params)


def consensus_distance_stacked(params_W: Params) -> float:
    """`consensus_distance` of arrays [W, ...], accumulated in float64."""
    return sum(
        float(np.square(leaf_W - leaf_W.mean(axis=0)).sum())
        for leaf_W in (np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params_W))
    )


def weighted_mean_stacked(params_W: Params, weight_W: Array) -> Params:
    """`weighted_mean` of arrays [W, ...], as float64 arrays [...].

    With equal weights it is the model that GoSGD returns (Algorithm 1, line 11).
    """
    return jax.tree.map(
        lambda leaf: np.average(np.asarray(leaf, np.float64), axis=0, weights=weight_W), params_W
    )
