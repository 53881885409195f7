"""How unlike the workers are, without moving a parameter: in what they answer, and by a free
estimate of the consensus distance."""

import chex
import jax
import jax.numpy as jnp

from persyn_jax.gossip.base import Array


def output_divergence(logits_WBV: Array) -> jax.Array:
    """float32[]: generalised Jensen-Shannon divergence between the workers' outputs, in nats.

    H(mean_w p_w) - mean_w H(p_w), averaged over the rows B of a probe batch that all workers
    answered: 0 if they agree, at most log W.

    logits_WBV: logits or log-probabilities; -inf is a probability of 0.
    """
    chex.assert_rank(logits_WBV, 3)
    log_p_WBV = jax.nn.log_softmax(jnp.asarray(logits_WBV, jnp.float32))
    log_mean_BV = jax.nn.logsumexp(log_p_WBV, axis=0) - jnp.log(logits_WBV.shape[0])
    # The mean of KL(p_w || mean), plus sum_v (mean - p_w) = 0: that makes every term positive and
    # takes away what rounding does at first order, or workers that nearly agree would drown in it.
    ratio_WBV = log_p_WBV - log_mean_BV[None]
    terms_WBV = jnp.where(
        ratio_WBV > -20,  # beyond, with p_w nearly 0, the mean is what is left
        jnp.exp(log_p_WBV) * (ratio_WBV + jnp.expm1(-ratio_WBV)),
        jnp.exp(log_mean_BV)[None],
    )
    return jnp.sum(terms_WBV, axis=-1).mean()


def estimated_consensus_distance(pair_distance_W: Array, heard_W: Array) -> jax.Array:
    """float32[]: an unbiased estimate of the consensus distance, without communication.

    With a partner that is equally likely any of the other workers E||x_i - x_j||^2 =
    2 eps / (W - 1), so eps is estimated by (W - 1) / 2 times the mean over the round's messages.
    It is that of the moment of the exchange: after the local step, before the mixing. NaN in a
    round without messages.

    pair_distance_W: float32[W], `pair_distance` of each worker's mixing state.
    heard_W: int32[W], from how many workers each heard: `(round.weight_KW > 0).sum(axis=0)`.
    """
    chex.assert_equal_shape([pair_distance_W, heard_W])
    chex.assert_rank(pair_distance_W, 1)
    others = pair_distance_W.shape[0] - 1
    return others / 2 * jnp.asarray(pair_distance_W).sum() / jnp.asarray(heard_W).sum()
