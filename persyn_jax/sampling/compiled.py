"""The engine's programs, compiled once for its shapes, and the arrays that the host hands them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from persyn_jax.models.decoder import DecoderConfig, Params
from persyn_jax.sampling import programs
from persyn_jax.sampling.config import EngineConfig
from persyn_jax.sampling.placement import Placement
from persyn_jax.sampling.programs import Cache, PrefillRows, Sampling
from persyn_jax.sampling.requests import Request

_SHORTEST_SCORED_ROW = 128
_IDLE = Request(tokens=(0,), max_tokens=1)


class Programs(NamedTuple):
    """Compiled: any other shape is an error. Caches and pools are donated."""

    prefill: Callable
    """(params, cache, pool, rows, sampling) -> (cache, pool, tokens)"""
    decode: Callable
    """(params, cache, token_S, position_S, sampling) -> (cache, tokens)"""
    load_blocks: Callable
    """(cache, pool, slot, blocks) -> cache"""
    score: dict[int, Callable]
    """By length of the rows, shortest first: (params, tokens_BT, length_B) -> tokens"""


def compile_programs(
    shape: DecoderConfig,
    config: EngineConfig,
    placement: Placement,
    params: Params,
    cache: Cache,
    pool: Cache,
) -> Programs:
    """Compiles all of them, several at a time."""
    like, whole = placement.like, placement.whole
    rows = whole((no_rows(config), sampling([], config.prefill_rows)))
    idle = whole((*no_slots(config), sampling([], config.slots)))
    jobs = {
        "prefill": _Job(
            partial(programs.prefill, shape),
            (params, cache, pool, *rows),
            donated=(1, 2),
            results=(like(cache), like(pool), None),
        ),
        "decode": _Job(
            partial(programs.decode, shape, config.decode_steps),
            (params, cache, *idle),
            donated=(1,),
            results=(like(cache), None),
        ),
        "load_blocks": _Job(
            programs.load_blocks,
            (cache, pool, *whole((np.int32(0), no_blocks(config)))),
            donated=(0,),
            results=like(cache),
        ),
    }
    for length in score_lengths(config):
        tokens_BT = np.zeros((config.score_rows, length), np.int32)
        scored = whole((tokens_BT, np.ones(config.score_rows, np.int32)))
        jobs[f"score {length}"] = _Job(partial(programs.score, shape), (params, *scored), (), None)
    with ThreadPoolExecutor() as threads:
        done = dict(zip(jobs, threads.map(_Job.compile, jobs.values()), strict=True))
    return Programs(
        prefill=done["prefill"],
        decode=done["decode"],
        load_blocks=done["load_blocks"],
        score={length: done[f"score {length}"] for length in score_lengths(config)},
    )


class _Job(NamedTuple):
    function: Callable
    arguments: tuple
    donated: tuple[int, ...]
    results: Any
    """Shardings of what comes out; None, at any level, leaves them to the compiler."""

    def compile(self) -> Callable:
        wrapped = jax.jit(self.function, donate_argnums=self.donated, out_shardings=self.results)
        return wrapped.lower(*self.arguments).compile()


def score_lengths(config: EngineConfig) -> list[int]:
    """Lengths of scored rows: that of the cache, and quarters of it as long as they are long."""
    lengths = [config.cache_length] if config.score_rows else []
    while lengths and lengths[0] // 4 >= _SHORTEST_SCORED_ROW:
        lengths.insert(0, lengths[0] // 4)
    return lengths


def no_rows(config: EngineConfig) -> PrefillRows:
    """Rows of a prefill that read nothing."""
    rows = config.prefill_rows
    return PrefillRows(
        tokens=np.zeros((rows, config.prefill_chunk), np.int32),
        slot=np.full(rows, config.slots, np.int32),
        start=np.zeros(rows, np.int32),
        length=np.ones(rows, np.int32),
        store=np.full(rows, config.prefix_blocks, np.int32),
    )


def no_slots(config: EngineConfig) -> tuple[np.ndarray, np.ndarray]:
    """(token_S, position_S) of slots that decode nothing."""
    tokens_S = np.zeros(config.slots, np.int32)
    return tokens_S, np.full(config.slots, config.cache_length, np.int32)


def no_blocks(config: EngineConfig) -> np.ndarray:
    """Blocks of a slot, none of which is loaded."""
    return np.full(config.cache_length // config.prefill_chunk, config.prefix_blocks, np.int32)


def sampling(requests: Sequence[Request], rows: int) -> Sampling:
    """The requests' sampling parameters, padded with greedy rows."""
    padded = [*requests, *[_IDLE] * (rows - len(requests))]
    return Sampling(
        temperature=np.array([request.temperature for request in padded], np.float32),
        top_p=np.array([request.top_p for request in padded], np.float32),
        top_k=np.array([request.top_k for request in padded], np.int32),
        seed=np.array([request.seed % 2**32 for request in padded], np.uint32),
        logprobs=np.array([request.logprobs is not None for request in padded], bool),
    )
