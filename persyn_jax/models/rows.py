"""Token rows, and what a decoder says about them: log-likelihoods, and the state a router reads.

Training and scoring share `response_log_likelihoods`: a learnability is computed as the loss is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

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
    hidden_BRD, head = _before_responses(config, params, rows, recompute, layout)
    chosen_BR = in_chunks(
        lambda hidden_BrD, targets_Br: _chosen(
            decoder.logits(config, head, hidden_BrD), targets_Br
        ),
        hidden_BRD,
        rows.targets,
    )
    return jnp.where(rows.weights > 0, chosen_BR, 0.0)


def response_scores(
    config: DecoderConfig, params: Params, rows: Rows
) -> tuple[jax.Array, jax.Array]:
    """`response_log_likelihoods`, and the rank of each response token among all, int32 [B, R].

    The rank is 1 + the number of tokens that are likelier there; 0 where padded.
    """
    hidden_BRD, head = _before_responses(config, params, rows)

    def scores(hidden_BrD: jax.Array, targets_Br: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BrV = decoder.logits(config, head, hidden_BrD)
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
) -> tuple[jax.Array, Params]:
    """The hidden state that each response token follows [B, R, D], and the head as parameters."""
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
    head = {"head": {"kernel": decoder.head_kernel(params, layout)}}
    return jnp.take_along_axis(hidden_BTD, rows.predictors[:, :, None], axis=1), head


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
    B, R, D = hidden_BRD.shape
    if R <= CHUNK:
        return function(hidden_BRD, targets_BR)
    chunks = -(-R // CHUNK)
    padding = ((0, 0), (0, chunks * CHUNK - R))
    hidden_BRD = jnp.pad(hidden_BRD, (*padding, (0, 0))).reshape(B, chunks, CHUNK, D)
    targets_BR = jnp.pad(targets_BR, padding).reshape(B, chunks, CHUNK)
    results = jax.lax.map(
        lambda chunk: jax.checkpoint(function)(*chunk),
        (jnp.moveaxis(hidden_BRD, 1, 0), jnp.moveaxis(targets_BR, 1, 0)),
    )

    def joined(result: jax.Array) -> jax.Array:  # [chunks, B, CHUNK, ...]
        by_row = jnp.moveaxis(result, 0, 1)
        return by_row.reshape(B, chunks * CHUNK, *by_row.shape[3:])[:, :R]

    return jax.tree.map(joined, results)


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
