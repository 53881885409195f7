"""The compiled programs of the sampling engine: prefill, decode, scoring, loading of prefix blocks.

Shapes never change, so each program compiles once. A request's tokens depend on its prompt, its
sampling parameters and its seed only, bitwise: chunk boundaries are fixed by position, the decode
batch and the cache length never shrink, no operation mixes rows, and attention goes through the
cache block by block, where a block that a row does not see adds exactly nothing to it.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from persyn_jax.models import decoder
from persyn_jax.models.decoder import Array, DecoderConfig, Params
from persyn_jax.models.projection import project_few
from persyn_jax.models.rows import in_chunks
from persyn_jax.sampling.cache_attention import attend_to_cache

# Per layer (keys, values), heads side by side (F = K E numbers a token; a TPU would pad an axis E
# of 64 to twice, and one of a few heads more): of the slots [S, C, F]; of the prefix pool
# [N, P, F], that is N blocks of P tokens.
Cache = tuple[tuple[jax.Array, jax.Array], ...]

ALTERNATIVES = 20
"""How many of the most likely tokens are told with a token's log-probability, at most."""


class Sampling(NamedTuple):
    """How the next token of each row is drawn."""

    temperature: Array
    """float32 [B]; 0 is greedy."""
    top_p: Array
    """float32 [B] in (0, 1]; 1 keeps the whole vocabulary."""
    top_k: Array
    """int32 [B]; 0 keeps the whole vocabulary."""
    seed: Array
    """uint32 [B]; the seed of the row's request."""
    logprobs: Array
    """bool [B]: whether somebody wants to know this row's log-probabilities."""


class Tokens(NamedTuple):
    """Drawn tokens, and how likely they were to the model itself.

    That is at temperature 1 and with the whole vocabulary. The log-probabilities are zeros unless
    some row asked for its own.
    """

    token: jax.Array
    """int32 [B]"""
    logprob: jax.Array
    """float32 [B], of `token`."""
    top: jax.Array
    """int32 [B, A]: the A most likely tokens, likeliest first; A is ALTERNATIVES or V."""
    top_logprob: jax.Array
    """float32 [B, A]"""


class PrefillRows(NamedTuple):
    """One chunk of P prompt tokens for each of R rows.

    Rows may hold successive chunks of one prompt: in each layer all rows write their keys and
    values before any of them looks.
    """

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
    shape = (rows, length, config.kv_heads * config.head_dim)
    return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers))


def prefill(
    config: DecoderConfig,
    params: Params,
    cache: Cache,
    pool: Cache,
    rows: PrefillRows,
    sampling: Sampling,
) -> tuple[Cache, Cache, Tokens]:
    """Reads one chunk of each row's prompt into its slot.

    Returns (cache, pool, next tokens [R]); a token means something where the chunk ends its prompt.
    """
    R, P = rows.tokens.shape
    chex.assert_shape([rows.slot, rows.start, rows.length, rows.store], (R,))
    positions_RP = rows.start[:, None] + jnp.arange(P, dtype=jnp.int32)[None, :]

    def attend(q_RPHE, k_RPKE, v_RPKE, rule, memory):
        k_RPF, v_RPF = (chunk.reshape(R, P, -1) for chunk in (k_RPKE, v_RPKE))
        keys_SCF, values_SCF = (
            buffer.at[rows.slot[:, None], positions_RP].set(chunk, mode="drop")
            for buffer, chunk in zip(memory, (k_RPF, v_RPF), strict=True)
        )
        own_R = jnp.minimum(rows.slot, keys_SCF.shape[0] - 1)
        out_RPHE = attend_to_cache(q_RPHE, keys_SCF, values_SCF, rule, positions_RP, own_R)
        return out_RPHE, (keys_SCF, values_SCF, k_RPF, v_RPF)

    hidden_RPD, memory = decoder.hidden_states(
        config, params, rows.tokens, positions_RP, attend, cache
    )
    cache = tuple((keys, values) for keys, values, _, _ in memory)
    pool = tuple(
        (pool_k.at[rows.store].set(k, mode="drop"), pool_v.at[rows.store].set(v, mode="drop"))
        for (pool_k, pool_v), (_, _, k, v) in zip(pool, memory, strict=True)
    )
    last_RD = hidden_RPD[jnp.arange(R), rows.length - 1]
    logits_RV = decoder.logits(config, params, last_RD, project_few)
    return cache, pool, draw(logits_RV, rows.start + rows.length, sampling)


def decode(
    config: DecoderConfig,
    steps: int,
    params: Params,
    cache: Cache,
    token_S: Array,
    position_S: Array,
    sampling: Sampling,
) -> tuple[Cache, Tokens]:
    """`steps` tokens for every slot, in use or not.

    token_S, position_S: int32; each slot's newest token and the position it stands at. A position
    past the cache's end writes nothing.
    Returns (cache, tokens with a leading axis of `steps`).
    """
    chex.assert_equal_shape([token_S, position_S, sampling.temperature, sampling.seed])
    slots_S = jnp.arange(token_S.shape[0])

    def one_step(carry, _):
        cache, token_S, position_S = carry

        def attend(q_S1HE, k_S1KE, v_S1KE, rule, memory):
            keys_SCF, values_SCF = (
                buffer.at[slots_S, position_S].set(new.reshape(len(slots_S), -1), mode="drop")
                for buffer, new in zip(memory, (k_S1KE, v_S1KE), strict=True)
            )
            out_S1HE = attend_to_cache(q_S1HE, keys_SCF, values_SCF, rule, position_S[:, None])
            return out_S1HE, (keys_SCF, values_SCF)

        hidden_S1D, cache = decoder.hidden_states(
            config,
            params,
            token_S[:, None],
            position_S[:, None],
            attend,
            cache,
            project=project_few,
        )
        logits_SV = decoder.logits(config, params, hidden_S1D[:, 0], project_few)
        drawn = draw(logits_SV, position_S + 1, sampling)
        return (cache, drawn.token, position_S + 1), drawn

    (cache, _, _), drawn = jax.lax.scan(one_step, (cache, token_S, position_S), None, length=steps)
    return cache, drawn


def score(config: DecoderConfig, params: Params, tokens_BT: Array, length_B: Array) -> Tokens:
    """How likely each token is after those before it, from one forward over whole rows: [B, T].

    tokens_BT: int32, padded on the right. length_B: int32, at least 1. Nothing stands before a
    row's first token: what is told of it means nothing. The tokens told of are `tokens_BT`.
    """
    B, T = tokens_BT.shape
    chex.assert_shape(length_B, (B,))
    index_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    attend = decoder.attend_causally((index_BT < length_B[:, None]).astype(jnp.int32))
    hidden_BTD, _ = decoder.hidden_states(config, params, tokens_BT, index_BT, attend)
    alternatives = min(ALTERNATIVES, config.vocab_size)

    def told(hidden_BRD: jax.Array, targets_BR: Array) -> Tokens:
        logits_NV = decoder.logits(config, params, hidden_BRD).reshape(-1, config.vocab_size)
        tokens = likelihoods(logits_NV, targets_BR.reshape(-1), alternatives)
        return jax.tree.map(lambda leaf: leaf.reshape(B, -1, *leaf.shape[1:]), tokens)

    before_BTD = jnp.roll(hidden_BTD, 1, axis=1)
    return in_chunks(told, before_BTD, tokens_BT)


def load_blocks(cache: Cache, pool: Cache, slot: Array, blocks: Array) -> Cache:
    """Copies pool blocks into a slot.

    slot: int32 []. blocks: int32 [C / P], the pool block for each block of the slot; the number of
    blocks in the pool = leave that part of the slot as it is.
    """

    def copy(buffer_SCF, pool_NPF):
        N, P = pool_NPF.shape[:2]
        S, C, F = buffer_SCF.shape
        chex.assert_shape(blocks, (C // P,))
        blocked = buffer_SCF.reshape(S, C // P, P, F)
        target = jnp.where(blocks < N, jnp.arange(C // P), C // P)  # past the end: dropped
        chunks = pool_NPF[jnp.minimum(blocks, N - 1)]
        return blocked.at[slot, target].set(chunks, mode="drop").reshape(S, C, F)

    return jax.tree.map(copy, cache, pool)


def draw(logits_BV: jax.Array, position_B: Array, sampling: Sampling) -> Tokens:
    """The next token of every row, with its log-probability if any row asks for one."""
    token_B = sample(logits_BV, position_B, sampling)
    alternatives = min(ALTERNATIVES, logits_BV.shape[1])

    def looked_up():
        return likelihoods(logits_BV, token_B, alternatives)

    def not_asked():
        shape = (logits_BV.shape[0], alternatives)
        return Tokens(token_B, jnp.zeros(shape[0]), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))

    return jax.lax.cond(jnp.any(sampling.logprobs), looked_up, not_asked)


def likelihoods(logits_BV: jax.Array, token_B: Array, alternatives: int) -> Tokens:
    """What the model's own distribution says of the tokens, and of the most likely ones.

    All are looked up in one array: the most likely token's value equals the maximum exactly.
    """
    logprobs_BV = jax.nn.log_softmax(logits_BV)
    top_logprob_BA, top_BA = jax.lax.top_k(logprobs_BV, alternatives)
    own_B1 = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)
    return Tokens(jnp.asarray(token_B), own_B1[:, 0], top_BA.astype(jnp.int32), top_logprob_BA)


def sample(logits_BV: jax.Array, position_B: Array, sampling: Sampling) -> jax.Array:
    """The next token of every row, int32 [B]: greedy at temperature 0, else from the kept set.

    The top_k most likely tokens are kept, and of their distribution the smallest set that reaches
    top_p. The randomness of a row comes from its request's seed and the position that the token
    will stand at.
    """
    chex.assert_rank(logits_BV, 2)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def drawn():
        temperature_B1 = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
        # Below 0 before dividing: a tiny temperature then makes -inf of the others, never inf.
        below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
        scaled_BV = below_BV / temperature_B1
        kept_BV = jax.lax.cond(
            jnp.any((sampling.top_p < 1) | (sampling.top_k > 0)),
            lambda: _keep_likely(scaled_BV, sampling.top_k, sampling.top_p),
            lambda: scaled_BV,
        )
        noise_BV = jax.vmap(
            lambda seed, position: jax.random.gumbel(
                jax.random.fold_in(jax.random.key(seed), position), logits_BV.shape[1:]
            )
        )(sampling.seed, position_B)
        drawn_B = jnp.argmax(kept_BV + noise_BV, axis=-1).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, drawn_B, greedy_B)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, lambda: greedy_B)


def _keep_likely(logits_BV: jax.Array, top_k_B: Array, top_p_B: Array) -> jax.Array:
    """-inf outside the top_k tokens, and of those outside the smallest set that reaches top_p.

    Tokens as likely as the last one kept are kept too.
    """
    V = logits_BV.shape[1]
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    k_B1 = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, V), V)[:, None]
    sorted_BV = jnp.where(jnp.arange(V)[None, :] < k_B1, sorted_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    # Rounding could drop the tail of a row with top_p 1, and only beside neighbours that have less.
    within_BV = (before_BV < top_p_B[:, None]) | (top_p_B[:, None] >= 1)
    kept_B1 = jnp.minimum(jnp.sum(within_BV, axis=-1, keepdims=True), k_B1)
    threshold_B1 = jnp.take_along_axis(sorted_BV, kept_B1 - 1, axis=-1)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)
