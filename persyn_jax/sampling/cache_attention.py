"""Attention to the key-value cache, block by block, as far as something is in it.

Shapes: B rows of T queries; the cache of S slots of C tokens, F = K E numbers each; N tokens of a
block; P rows in the order in which they are worked off, W of them at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from persyn_jax.models.attention import AttentionRule, soft_capped
from persyn_jax.models.decoder import Array

_AT_LEAST = 8
"""Rows of a group, at least, where there are so many."""
_GROUPS = 4
"""Groups that more rows are worked off in."""


def attend_to_cache(
    q_BTHE: jax.Array,
    keys_SCF: jax.Array,
    values_SCF: jax.Array,
    rule: AttentionRule,
    positions_BT: Array,
    slot_B: Array | None = None,
) -> jax.Array:
    """Attention of T queries a row to the cache, up to each query's own position: [B, T, H, E].

    slot_B: the slot each row looks at; None: row b looks at slot b.

    The softmax is accumulated block by block (FlashAttention, arXiv 2205.14135), from the first to
    the last position that a row asks about. Rows are worked off in groups, those with most blocks
    together, so that with more than 8 rows the cost follows what all of them have in the cache, or
    in their windows, and not the longest; up to 8 are one group, which reads as far as that one.
    And yet no row depends on which others are in its group: each adds its own blocks in their
    order, and one it does not see leaves maximum, sum and output as they are, bitwise. Positions
    past the cache belong to rows that are not in use.
    """
    B, T, H, E = q_BTHE.shape
    S, C, F = keys_SCF.shape
    K, N = F // E, cache_block(C)
    # A row that is not in use looks at one token: nobody divides by 0.
    positions_BT = jnp.where(positions_BT < C, positions_BT, 0)
    work = _plan(rule, positions_BT, C, N)
    W, row_P = work.group, work.row_P
    in_blocks = (S, C // N, N, F)
    keys_SNNF, values_SNNF = keys_SCF.reshape(in_blocks), values_SCF.reshape(in_blocks)
    q_BKGTE = jnp.moveaxis(q_BTHE.reshape(B, T, K, H // K, E), 1, 3)
    slot_P = row_P if slot_B is None else jnp.asarray(slot_B)[row_P]
    ordered = (q_BKGTE[row_P], positions_BT[row_P], work.oldest_PT, slot_P, work.first_P)

    def add_block(step, carry):
        after = jnp.sum(work.done <= step)  # blocks that all rows have looked at
        start = W * (step - jnp.where(after > 0, work.done[after - 1], 0))
        q_WKGTE, positions_WT, oldest_WT, slot_W, first_W = _rows(ordered, start, W)
        block_W = first_W + after
        read_W = jnp.minimum(block_W, C // N - 1)  # a row that has no more looks at nothing new
        k_WNKE, v_WNKE = (
            buffer[slot_W, read_W].reshape(W, N, K, E) for buffer in (keys_SNNF, values_SNNF)
        )
        place_WN = block_W[:, None] * N + jnp.arange(N)[None, :]
        seen_WTN = place_WN[:, None, :] <= positions_WT[:, :, None]
        if oldest_WT is not None:
            seen_WTN &= place_WN[:, None, :] >= oldest_WT[:, :, None]
        added = _add(_rows(carry, start, W), q_WKGTE, k_WNKE, v_WNKE, seen_WTN, rule)
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0),
            carry,
            added,
        )

    # Finite, so that a block before a query's window adds exp(-inf) and not NaN.
    nothing = jnp.full((len(row_P), K, H // K, T), jnp.finfo(jnp.float32).min)
    carry = (nothing, jnp.zeros_like(nothing), jnp.zeros((*nothing.shape, E), jnp.float32))
    _, total, out_PKGTE = jax.lax.fori_loop(0, work.done[-1], add_block, carry)
    out_PTKGE = jnp.moveaxis(out_PKGTE / total[..., None], 3, 1)
    out_PTHE = out_PTKGE.reshape(-1, T, H, E).astype(q_BTHE.dtype)
    return jnp.zeros_like(q_BTHE).at[row_P[:B]].set(out_PTHE[:B])


def cache_block(length: int) -> int:
    """Tokens of the cache that attention reads at once: 128, or what divides the length."""
    return next(size for size in range(min(128, length), 0, -1) if length % size == 0)


class _Plan(NamedTuple):
    """In which order rows look at their blocks: all at their first, then those that have a second
    at that, ..., `group` rows at a time."""

    group: int
    """W"""
    row_P: jax.Array
    """int32: those with most blocks first. Behind the B rows are copies of row 0 that have none."""
    first_P: jax.Array
    """int32: the first block that the row looks at."""
    oldest_PT: jax.Array | None
    """The first position that each query sees; None without a window."""
    done: jax.Array
    """int32 [C / N]: steps after which all rows have looked at their first block, second, ..."""


def _plan(rule: AttentionRule, positions_BT: Array, length: int, block: int) -> _Plan:
    B = positions_BT.shape[0]
    oldest_BT, first_B = None, jnp.zeros(B, jnp.int32)
    if rule.window is not None and not (isinstance(rule.window, int) and rule.window >= length):
        oldest_BT = jnp.maximum(positions_BT - rule.window + 1, 0)
        first_B = jnp.min(oldest_BT, axis=1) // block
    blocks_B = jnp.max(positions_BT, axis=1) // block - first_B + 1
    W = B if B <= _AT_LEAST else max(_AT_LEAST, -(-B // _GROUPS))
    padding = -B % W
    row_P = jnp.pad(jnp.argsort(-blocks_B, stable=True), (0, padding))
    blocks_P = jnp.where(jnp.arange(B + padding) < B, blocks_B[row_P], 0)
    rows_with_more = jnp.sum(blocks_P[None, :] > jnp.arange(length // block)[:, None], axis=1)
    done = jnp.cumsum(-(-rows_with_more // W))
    return _Plan(W, row_P, first_B[row_P], None if oldest_BT is None else oldest_BT[row_P], done)


def _rows(tree, start: jax.Array, count: int):
    """`count` rows from `start` on of every array."""
    return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, start, count), tree)


def _add(
    carry: tuple[jax.Array, jax.Array, jax.Array],
    q_WKGTE: jax.Array,
    k_WNKE: jax.Array,
    v_WNKE: jax.Array,
    seen_WTN: jax.Array,
    rule: AttentionRule,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A block more for W rows. carry: highest score, sum of weights, weighted sum of values."""
    highest, total, out_WKGTE = carry
    scores_WKGTN = jnp.einsum(
        "WKGTE,WNKE->WKGTN", q_WKGTE, k_WNKE, preferred_element_type=jnp.float32
    )
    scores_WKGTN = soft_capped(scores_WKGTN * rule.scale, rule.softcap)
    scores_WKGTN = jnp.where(seen_WTN[:, None, None], scores_WKGTN, -jnp.inf)
    new_highest = jnp.maximum(highest, jnp.max(scores_WKGTN, axis=-1))
    shrink = jnp.exp(highest - new_highest)
    weights_WKGTN = jnp.exp(scores_WKGTN - new_highest[..., None])
    mixed_WKGTE = _mix(weights_WKGTN.astype(v_WNKE.dtype), v_WNKE)
    total = total * shrink + jnp.sum(weights_WKGTN, axis=-1)
    return new_highest, total, out_WKGTE * shrink[..., None] + mixed_WKGTE


def _mix(weights_WKGTN: jax.Array, v_WNKE: jax.Array) -> jax.Array:
    """The weighted sum of values, float32 [W, K, G, T, E]."""

    def multiplied(weights_WKGTN, v_WNKE):
        return jnp.einsum(
            "WKGTN,WNKE->WKGTE", weights_WKGTN, v_WNKE, preferred_element_type=jnp.float32
        )

    def reduced(weights_WKGTN, v_WNKE):
        weights_WNKG = jnp.moveaxis(weights_WKGTN[:, :, :, 0], 3, 1).astype(jnp.float32)
        values_WNKE = v_WNKE.astype(jnp.float32)
        mixed_WKGE = jnp.sum(weights_WNKG[..., None] * values_WNKE[:, :, :, None], axis=1)
        return mixed_WKGE[:, :, :, None]

    if weights_WKGTN.shape[3] > 1:
        return multiplied(weights_WKGTN, v_WNKE)
    # For one query a row, XLA's product on CPU takes longer to turn the values than to multiply.
    return jax.lax.platform_dependent(weights_WKGTN, v_WNKE, cpu=reduced, default=multiplied)
