"""The compiled programs of the sampling engine: prefill, decode, and loading of prefix blocks.

Shapes never change, so each program compiles once. A request's tokens depend on its prompt, its
sampling parameters and its seed only, bitwise: chunk boundaries are fixed by position, the decode
batch and the cache length never shrink, and no operation mixes rows.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from persyn_jax.models import decoder
from persyn_jax.models.decoder import Array, DecoderConfig, Params

# Per layer (keys, values): of the slots [S, C, K, E]; of the prefix pool [N, P, K, E], that is N
# blocks of P tokens.
Cache = tuple[tuple[jax.Array, jax.Array], ...]


class Sampling(NamedTuple):
    """How the next token of each row is drawn."""

    temperature: Array
    """float32 [B]; 0 is greedy."""
    top_p: Array
    """float32 [B] in (0, 1]; 1 keeps the whole vocabulary."""
    seed: Array
    """uint32 [B]; the seed of the row's request."""


class PrefillRows(NamedTuple):
    """One chunk of P prompt tokens for each of R rows."""

    tokens: Array
    """int32 [R, P]"""
    slot: Array
    """int32 [R]; the number of slots = the row is not in use and writes nothing."""
    start: Array
    """int32 [R]: position of the chunk's first token, a multiple of P."""
    length: Array
    """int32 [R]: tokens of the chunk that are real."""
    store: Array
    """int32 [R]: pool block that receives the chunk; the number of blocks = none."""


def empty_cache(config: DecoderConfig, rows: int, length: int, dtype=jnp.float32) -> Cache:
    """Zeros: `rows` slots of `length` tokens, or a pool of `rows` blocks of `length` tokens."""
    shape = (rows, length, config.kv_heads, config.head_dim)
    return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers))


def prefill(
    config: DecoderConfig,
    params: Params,
    cache: Cache,
    pool: Cache,
    rows: PrefillRows,
    sampling: Sampling,
) -> tuple[Cache, Cache, jax.Array]:
    """Reads one chunk of each row's prompt into its slot.

    Returns (cache, pool, next token int32 [R]); the token means something where the chunk ends its
    prompt.
    """
    R, P = rows.tokens.shape
    chex.assert_shape([rows.slot, rows.start, rows.length, rows.store], (R,))
    positions_RP = rows.start[:, None] + jnp.arange(P, dtype=jnp.int32)[None, :]

    def attend(q_RPHE, k_RPKE, v_RPKE, memory):
        keys_SCKE, values_SCKE = (
            buffer.at[rows.slot[:, None], positions_RP].set(chunk, mode="drop")
            for buffer, chunk in zip(memory, (k_RPKE, v_RPKE), strict=True)
        )
        S, C = keys_SCKE.shape[:2]
        own_R = jnp.minimum(rows.slot, S - 1)
        mask_R1PC = (jnp.arange(C)[None, None, :] <= positions_RP[:, :, None])[:, None]
        out_RPHE = jax.nn.dot_product_attention(
            q_RPHE, keys_SCKE[own_R], values_SCKE[own_R], mask=mask_R1PC
        )
        return out_RPHE, (keys_SCKE, values_SCKE, k_RPKE, v_RPKE)

    hidden_RPD, memory = decoder.hidden_states(
        config, params, rows.tokens, positions_RP, attend, cache
    )
    cache = tuple((keys, values) for keys, values, _, _ in memory)
    pool = tuple(
        (pool_k.at[rows.store].set(k, mode="drop"), pool_v.at[rows.store].set(v, mode="drop"))
        for (pool_k, pool_v), (_, _, k, v) in zip(pool, memory, strict=True)
    )
    logits_RV = decoder.logits(params, hidden_RPD[jnp.arange(R), rows.length - 1])
    return cache, pool, sample(logits_RV, rows.start + rows.length, sampling)


def decode(
    config: DecoderConfig,
    steps: int,
    params: Params,
    cache: Cache,
    token_S: Array,
    position_S: Array,
    sampling: Sampling,
) -> tuple[Cache, jax.Array]:
    """`steps` tokens for every slot, in use or not.

    token_S, position_S: int32; each slot's newest token and the position it stands at. A position
    past the cache's end writes nothing.
    Returns (cache, tokens int32 [steps, S]).
    """
    chex.assert_equal_shape([token_S, position_S, sampling.temperature, sampling.seed])
    slots_S = jnp.arange(token_S.shape[0])

    def one_step(carry, _):
        cache, token_S, position_S = carry

        def attend(q_S1HE, k_S1KE, v_S1KE, memory):
            keys_SCKE, values_SCKE = (
                buffer.at[slots_S, position_S].set(new[:, 0], mode="drop")
                for buffer, new in zip(memory, (k_S1KE, v_S1KE), strict=True)
            )
            C = keys_SCKE.shape[1]
            mask_S11C = (jnp.arange(C)[None, :] <= position_S[:, None])[:, None, None]
            out_S1HE = jax.nn.dot_product_attention(q_S1HE, keys_SCKE, values_SCKE, mask=mask_S11C)
            return out_S1HE, (keys_SCKE, values_SCKE)

        hidden_S1D, cache = decoder.hidden_states(
            config, params, token_S[:, None], position_S[:, None], attend, cache
        )
        logits_SV = decoder.logits(params, hidden_S1D[:, 0])
        token_S = sample(logits_SV, position_S + 1, sampling)
        return (cache, token_S, position_S + 1), token_S

    (cache, _, _), tokens = jax.lax.scan(one_step, (cache, token_S, position_S), None, length=steps)
    return cache, tokens


def load_blocks(cache: Cache, pool: Cache, slot: Array, blocks: Array) -> Cache:
    """Copies pool blocks into a slot.

    slot: int32 []. blocks: int32 [C / P], the pool block for each block of the slot; the number of
    blocks in the pool = leave that part of the slot as it is.
    """

    def copy(buffer_SCKE, pool_NPKE):
        N, P = pool_NPKE.shape[:2]
        S, C, K, E = buffer_SCKE.shape
        chex.assert_shape(blocks, (C // P,))
        blocked = buffer_SCKE.reshape(S, C // P, P, K, E)
        target = jnp.where(blocks < N, jnp.arange(C // P), C // P)  # past the end: dropped
        chunks = pool_NPKE[jnp.minimum(blocks, N - 1)]
        return blocked.at[slot, target].set(chunks, mode="drop").reshape(S, C, K, E)

    return jax.tree.map(copy, cache, pool)


def sample(logits_BV: jax.Array, position_B: Array, sampling: Sampling) -> jax.Array:
    """The next token of every row, int32 [B]: greedy at temperature 0, else from the top-p set.

    The randomness of a row comes from its request's seed and the position that the token will
    stand at.
    """
    chex.assert_rank(logits_BV, 2)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw():
        temperature_B1 = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
        # Below 0 before dividing: a tiny temperature then makes -inf of the others, never inf.
        below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
        scaled_BV = below_BV / temperature_B1
        kept_BV = jax.lax.cond(
            jnp.any(sampling.top_p < 1),
            lambda: _keep_top_p(scaled_BV, sampling.top_p),
            lambda: scaled_BV,
        )
        noise_BV = jax.vmap(
            lambda seed, position: jax.random.gumbel(
                jax.random.fold_in(jax.random.key(seed), position), logits_BV.shape[1:]
            )
        )(sampling.seed, position_B)
        drawn_B = jnp.argmax(kept_BV + noise_BV, axis=-1).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, drawn_B, greedy_B)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy_B)


def _keep_top_p(logits_BV: jax.Array, top_p_B: Array) -> jax.Array:
    """-inf outside the smallest set of most likely tokens whose probability reaches top_p."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    kept_B = jnp.sum(before_BV < top_p_B[:, None], axis=-1)
    threshold_B1 = jnp.take_along_axis(sorted_BV, kept_B[:, None] - 1, axis=-1)
    # Rounding could drop the tail of a row with top_p 1, and only beside neighbours that have less.
    keep_BV = (logits_BV >= threshold_B1) | (top_p_B[:, None] >= 1)
    return jnp.where(keep_BV, logits_BV, -jnp.inf)
