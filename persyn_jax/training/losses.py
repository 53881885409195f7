"""Losses as pure functions of (parameters, batch): each returns (mean loss, weight behind it)."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from persyn_jax.models import router, rows
from persyn_jax.models.adapters import with_adapters
from persyn_jax.models.decoder import Array, DecoderConfig, Params
from persyn_jax.models.layout import WHOLE, Layout
from persyn_jax.models.recompute import Recompute
from persyn_jax.models.rows import Rows


class Pairs(NamedTuple):
    """Preference pairs: for a prompt, the teacher that won and the teacher that lost."""

    pooled: Array
    """float32 [B, D]: the backbone's state of the prompt."""
    winner: Array
    """int32 [B]: index of the preferred teacher."""
    loser: Array
    """int32 [B]"""
    weights: Array
    """float32 [B]: 1, or 0 where padded."""


class PromptPairs(NamedTuple):
    """Preference pairs whose prompts are read anew in every step, by a backbone that learns."""

    tokens: Array
    """int32 [B, T]: prompts, padded on the right."""
    lengths: Array
    """int32 [B]: their real tokens, at least 1."""
    winner: Array
    """int32 [B]: index of the preferred teacher."""
    loser: Array
    """int32 [B]"""
    weights: Array
    """float32 [B]: 1, or 0 where padded."""


class Standardisation(NamedTuple):
    """A head reads (state - mean) / scale."""

    mean_D: Array
    """float32"""
    scale: float


def response_loss(
    config: DecoderConfig,
    recompute: Recompute,
    params: Params,
    batch: Rows,
    layout: Layout = WHOLE,
) -> tuple[jax.Array, jax.Array]:
    """Mean negative log-likelihood of the response tokens, in nats a token: (loss, tokens).

    EOS counts where it was generated. A batch without response tokens has loss 0. With a layout,
    parameters and batch are one chip's, and the mean is over all chips of the worker.
    """
    targets = layout.share((batch.predictors, batch.targets, batch.weights))
    batch = Rows(batch.tokens, batch.positions, batch.segments, *targets)
    weight = layout.total(jnp.sum(batch.weights))
    # Each token's share in the mean, times -1: then the sum is the loss, and its cotangent 1.
    batch = batch._replace(weights=-batch.weights / jnp.maximum(weight, 1.0))
    own = rows.response_log_likelihood_sum(config, params, batch, recompute, layout)
    return layout.total(own), weight


def adapter_loss(
    config: DecoderConfig,
    recompute: Recompute,
    adapters: Params,
    batch: Rows,
    base: Params,
    layout: Layout = WHOLE,
) -> tuple[jax.Array, jax.Array]:
    """`response_loss` of a frozen base with adapters, `config.lora_scale` theirs."""
    return response_loss(config, recompute, with_adapters(base, adapters), batch, layout)


def bradley_terry_loss(params: Params, batch: Pairs) -> tuple[jax.Array, jax.Array]:
    """Mean binary cross-entropy of the preferences, in nats a pair: (loss, pairs).

    P(winner beats loser) = sigmoid(c_winner - c_loser) (PerSyn eq. 3).
    """
    chex.assert_equal_shape([batch.winner, batch.loser, batch.weights])
    coefficients_BM = router.coefficients(params, batch.pooled)
    winner_B1 = jnp.take_along_axis(coefficients_BM, batch.winner[:, None], axis=1)
    loser_B1 = jnp.take_along_axis(coefficients_BM, batch.loser[:, None], axis=1)
    weight = jnp.sum(batch.weights)
    loss_B = -jax.nn.log_sigmoid(winner_B1 - loser_B1)[:, 0]
    return jnp.sum(loss_B * batch.weights) / jnp.maximum(weight, 1.0), weight


def router_loss(
    config: DecoderConfig,
    standard: Standardisation,
    params: Params,
    batch: PromptPairs,
    base: Params | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`bradley_terry_loss` of {"backbone": ..., "head": ...}: the backbone learns with its head.

    backbone: a decoder's parameters; with a frozen base, adapters of it.
    """
    backbone = params["backbone"] if base is None else with_adapters(base, params["backbone"])
    state_BD = rows.last_states(config, backbone, batch.tokens, batch.lengths)
    pooled_BD = (state_BD - standard.mean_D[None]) / standard.scale
    pairs = Pairs(pooled_BD, batch.winner, batch.loser, batch.weights)
    return bradley_terry_loss(params["head"], pairs)
