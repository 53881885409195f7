"""Losses as pure functions of (parameters, batch): each returns (mean loss, weight it was averaged over)."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from persyn_jax.models import router, rows
from persyn_jax.models.decoder import DecoderConfig, Params
from persyn_jax.models.rows import Rows


class Pairs(NamedTuple):
    """Preference pairs: for a prompt, the teacher that won and the teacher that lost."""

    pooled: jax.Array
    """float32 [B, D]: the backbone's state of the prompt."""
    winner: jax.Array
    """int32 [B]: index of the preferred teacher."""
    loser: jax.Array
    """int32 [B]"""
    weights: jax.Array
    """float32 [B]: 1, or 0 where padded."""


def response_loss(config: DecoderConfig, recompute: bool, params: Params, batch: Rows):
    """Mean negative log-likelihood of the response tokens, in nats a token."""
    log_likelihood_BR = rows.response_log_likelihoods(config, params, batch, recompute)
    weight = jnp.sum(batch.weights)
    return -jnp.sum(log_likelihood_BR * batch.weights) / jnp.maximum(weight, 1.0), weight


def bradley_terry_loss(params: Params, batch: Pairs):
    """Binary cross-entropy of P(winner beats loser) = sigmoid(c_winner - c_loser) (PerSyn eq. 3), nats a pair."""
    chex.assert_equal_shape([batch.winner, batch.loser, batch.weights])
    coefficients_BM = router.coefficients(params, batch.pooled)
    winner_B1 = jnp.take_along_axis(coefficients_BM, batch.winner[:, None], axis=1)
    loser_B1 = jnp.take_along_axis(coefficients_BM, batch.loser[:, None], axis=1)
    weight = jnp.sum(batch.weights)
    loss_B = -jax.nn.log_sigmoid(winner_B1 - loser_B1)[:, 0]
    return jnp.sum(loss_B * batch.weights) / jnp.maximum(weight, 1.0), weight
