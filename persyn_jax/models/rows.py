"""Token rows, and what a decoder says about them: log-likelihoods, and the state a router reads.

Training and scoring share them: a learnability is computed as the loss is.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from persyn_jax import mesh as meshes
from persyn_jax.models import decoder
from persyn_jax.models.decoder import Array, DecoderConfig, Params
from persyn_jax.models.layout import WHOLE, Layout
from persyn_jax.models.recompute import Recompute

CHUNK = 64
"""Tokens of each row whose logits exist at a time."""


@dataclass(frozen=True)
class Conversation:
    """A prompt and its response as token ids, with EOS last if the teacher ended the response."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


class Rows(NamedTuple):
    """B rows of T tokens: one or several conversations a row, at most R response tokens in it."""

    tokens: Array
    """int32 [B, T]; 0 where padded."""
    positions: Array
    """int32 [B, T]: position of a token in its own conversation."""
    segments: Array
    """int32 [B, T]: 1, 2, ... for the conversations of a row; 0 where padded."""
    predictors: Array
    """int32 [B, R]: index of the token that each response token follows."""
    targets: Array
    """int32 [B, R]: the response tokens."""
    weights: Array
    """float32 [B, R]: 1 for a response token, 0 where padded."""


def pack(rows: Sequence[Sequence[Conversation]], length: int, responses: int) -> Rows:
    """Lays out each sequence of conversations in one row, as NumPy.

    Raises ValueError for a conversation without a prompt (nothing precedes its response), and for a
    row with more than `length` tokens or `responses` response tokens.
    """
    B = len(rows)
    packed = Rows(
        tokens=np.zeros((B, length), np.int32),
        positions=np.zeros((B, length), np.int32),
        segments=np.zeros((B, length), np.int32),
        predictors=np.zeros((B, responses), np.int32),
        targets=np.zeros((B, responses), np.int32),
        weights=np.zeros((B, responses), np.float32),
    )
    for b, conversations in enumerate(rows):
        start, first = 0, 0
        for number, conversation in enumerate(conversations, 1):
            if not conversation.prompt:
                raise ValueError(f"row {b}: a conversation has no prompt")
            end, last = start + conversation.length, first + len(conversation.response)
            if end > length or last > responses:
                raise ValueError(
                    f"row {b} holds {end} tokens and {last} response tokens; "
                    f"it has room for {length} and {responses}"
                )
            packed.tokens[b, start:end] = conversation.prompt + conversation.response
            packed.positions[b, start:end] = np.arange(conversation.length)
            packed.segments[b, start:end] = number
            before = start + len(conversation.prompt) - 1
            packed.predictors[b, first:last] = before + np.arange(last - first)
            packed.targets[b, first:last] = conversation.response
            packed.weights[b, first:last] = 1.0
            start, first = end, last
    return packed


def response_log_likelihoods(
    config: DecoderConfig,
    params: Params,
    rows: Rows,
    recompute: Recompute = "nothing",
    layout: Layout = WHOLE,
) -> jax.Array:
    """log p(response token | all before it in its conversation), float32 [B, R]; 0 where padded.

    Logits exist for response tokens only, and for CHUNK of each row at a time. recompute, layout:
    see `decoder.hidden_states`.
    """
    hidden_BRD, kernel_VD = _before_responses(config, params, rows, recompute, layout)
    return _log_likelihoods(config, hidden_BRD, kernel_VD, rows.targets, rows.weights)


def response_log_likelihood_sum(
    config: DecoderConfig,
    params: Params,
    rows: Rows,
    recompute: Recompute = "nothing",
    layout: Layout = WHOLE,
) -> jax.Array:
    """The sum of `response_log_likelihoods` times their weights, float32 []: what a loss wants.

    Here weights may be any numbers, 0 where nothing counts. The gradient needs each logit once: see
    `_weighted_sum`.
    """
    hidden_BRD, kernel_VD = _before_responses(config, params, rows, recompute, layout)
    varying = meshes.vary_alike((hidden_BRD, kernel_VD, rows.targets, rows.weights))
    return _weighted_sum(config, *varying)


def response_scores(
    config: DecoderConfig, params: Params, rows: Rows
) -> tuple[jax.Array, jax.Array]:
    """`response_log_likelihoods`, and the rank of each response token among all, int32 [B, R].

    The rank is 1 + the number of tokens that are likelier there; 0 where padded.
    """
    hidden_BRD, kernel_VD = _before_responses(config, params, rows)

    def scores(hidden_BrD: jax.Array, targets_Br: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BrV = _logits(config, hidden_BrD, kernel_VD)
        own_Br1 = jnp.take_along_axis(logits_BrV, targets_Br[:, :, None], axis=2)
        rank_Br = 1 + jnp.sum(logits_BrV > own_Br1, axis=2, dtype=jnp.int32)
        return _chosen(logits_BrV, targets_Br), rank_Br

    chosen_BR, rank_BR = in_chunks(scores, hidden_BRD, rows.targets)
    real_BR = rows.weights > 0
    return jnp.where(real_BR, chosen_BR, 0.0), jnp.where(real_BR, rank_BR, 0)


def _before_responses(
    config: DecoderConfig,
    params: Params,
    rows: Rows,
    recompute: Recompute = "nothing",
    layout: Layout = WHOLE,
) -> tuple[jax.Array, jax.Array]:
    """The hidden state that each response token follows [B, R, D], and the head [V, D]."""
    chex.assert_equal_shape([rows.tokens, rows.positions, rows.segments])
    chex.assert_equal_shape([rows.predictors, rows.targets, rows.weights])
    hidden_BTD, _ = decoder.hidden_states(
        config,
        params,
        rows.tokens,
        rows.positions,
        decoder.attend_causally(rows.segments),
        recompute=recompute,
        layout=layout,
    )
    before_BRD = jnp.take_along_axis(hidden_BTD, rows.predictors[:, :, None], axis=1)
    return before_BRD, decoder.head_kernel(params, layout)


def _logits(config: DecoderConfig, hidden_BRD: jax.Array, kernel_VD: jax.Array) -> jax.Array:
    return decoder.logits(config, {"head": {"kernel": kernel_VD}}, hidden_BRD)


def _log_likelihoods(
    config: DecoderConfig,
    hidden_BRD: jax.Array,
    kernel_VD: jax.Array,
    targets_BR: Array,
    weights_BR: Array,
) -> jax.Array:
    def chosen(hidden_BrD: jax.Array, targets_Br: jax.Array) -> jax.Array:
        return _chosen(_logits(config, hidden_BrD, kernel_VD), targets_Br)

    return jnp.where(weights_BR != 0, in_chunks(chosen, hidden_BRD, targets_BR), 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(
    config: DecoderConfig,
    hidden_BRD: jax.Array,
    kernel_VD: jax.Array,
    targets_BR: Array,
    weights_BR: Array,
) -> jax.Array:
    """Sum of the log-likelihoods times their weights.

    A chunk's logits exist once: where a gradient is wanted, what it is but for a factor (the
    cotangent of the sum) is made while they are there. Three products a chunk instead of four.
    """
    log_likelihood_BR = _log_likelihoods(config, hidden_BRD, kernel_VD, targets_BR, weights_BR)
    return jnp.sum(log_likelihood_BR * weights_BR)


def _sum_forward(
    config: DecoderConfig,
    hidden_BRD: jax.Array,
    kernel_VD: jax.Array,
    targets_BR: Array,
    weights_BR: Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def weighted(*chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights_Br, chosen_Br = chunk[-1], _log_likelihoods(config, *chunk)
        return jnp.sum(chosen_Br * weights_Br), chosen_Br

    gradient_of = jax.grad(weighted, argnums=(0, 1), has_aux=True)

    def of_chunk(chunk: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        hidden_BrD, targets_Br, weights_Br = chunk
        (dhidden_BrD, d_VD), chosen_Br = gradient_of(hidden_BrD, kernel_VD, targets_Br, weights_Br)
        return d_VD, (dhidden_BrD, chosen_Br)

    def add(sum_VD: jax.Array, chunk: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        d_VD, of_tokens = of_chunk(chunk)
        return sum_VD + d_VD, of_tokens

    R, whole = hidden_BRD.shape[1], (hidden_BRD, targets_BR, weights_BR)
    if R <= CHUNK:
        dkernel_VD, (dhidden_BRD, log_likelihood_BR) = of_chunk(whole)
    else:
        dkernel_VD, chunks = jax.lax.scan(add, jnp.zeros_like(kernel_VD), _cut(whole))
        dhidden_BRD, log_likelihood_BR = _join(chunks, R)
    total = jnp.sum(log_likelihood_BR * weights_BR)
    return total, (dhidden_BRD, dkernel_VD, log_likelihood_BR)


def _sum_backward(
    config: DecoderConfig, gradients: tuple[jax.Array, ...], factor: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    dhidden_BRD, dkernel_VD, dweights_BR = (
        (factor * gradient).astype(gradient.dtype) for gradient in gradients
    )
    return dhidden_BRD, dkernel_VD, None, dweights_BR


_weighted_sum.defvjp(_sum_forward, _sum_backward)


def _chosen(logits_BRV: jax.Array, targets_BR: Array) -> jax.Array:
    """The log-softmax of one entry a token: bitwise as in `jax.nn.log_softmax`'s whole array."""
    own_BR1 = jnp.take_along_axis(logits_BRV, targets_BR[:, :, None], axis=2)
    highest_BR1 = jax.lax.stop_gradient(jnp.max(logits_BRV, axis=2, keepdims=True))
    total_BR1 = jnp.sum(jnp.exp(logits_BRV - highest_BR1), axis=2, keepdims=True)
    return (own_BR1 - highest_BR1 - jnp.log(total_BR1))[:, :, 0]


def in_chunks(function: Callable, hidden_BRD: jax.Array, targets_BR: Array) -> Any:
    """`function(hidden, targets)` over CHUNK of the R tokens at a time; its results together.

    So that [B, R, V] logits never exist, neither on the way forward nor back. Each token's logits
    stay whole: chunks of the vocabulary would change sums, these only change how XLA orders a few.
    function returns a pytree of arrays [B, CHUNK, ...].
    """
    R = hidden_BRD.shape[1]
    if R <= CHUNK:
        return function(hidden_BRD, targets_BR)
    chunks = _cut((hidden_BRD, targets_BR))
    return _join(jax.lax.map(lambda chunk: jax.checkpoint(function)(*chunk), chunks), R)


def _cut(arrays: Any) -> Any:
    """[B, R, ...] -> [chunks, B, CHUNK, ...] of each, the last chunk filled up with zeros."""

    def cut(array_BR: jax.Array) -> jax.Array:
        B, R, *rest = array_BR.shape
        chunks = -(-R // CHUNK)
        padding = ((0, 0), (0, chunks * CHUNK - R), *((0, 0) for _ in rest))
        filled = jnp.pad(array_BR, padding)
        return jnp.moveaxis(filled.reshape(B, chunks, CHUNK, *rest), 1, 0)

    return jax.tree.map(cut, arrays)


def _join(chunks: Any, R: int) -> Any:
    """What `_cut` cut: [chunks, B, r, ...] -> [B, R, ...] of each."""

    def join(array: jax.Array) -> jax.Array:
        by_row = jnp.moveaxis(array, 0, 1)
        B, count, size, *rest = by_row.shape
        return by_row.reshape(B, count * size, *rest)[:, :R]

    return jax.tree.map(join, chunks)


def last_states(
    config: DecoderConfig, params: Params, tokens_BT: Array, length_B: Array
) -> jax.Array:
    """The final hidden state of each row's last real token, float32 [B, D]: what the router reads.

    tokens_BT: int32, padded on the right. length_B: int32, at least 1.
    """
    chex.assert_rank(tokens_BT, 2)
    B, T = tokens_BT.shape
    chex.assert_shape(length_B, (B,))
    index_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    segments_BT = (index_BT < length_B[:, None]).astype(jnp.int32)
    attend = decoder.attend_causally(segments_BT)
    hidden_BTD, _ = decoder.hidden_states(config, params, tokens_BT, index_BT, attend)
    return hidden_BTD[jnp.arange(B), length_B - 1].astype(jnp.float32)
