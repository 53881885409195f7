"""What the compiler makes of the sampling engine for TPU chips that are not there."""

import math
import re
from typing import Any, NamedTuple

import jax

from persyn_jax.bench.hlo import KINDS
from persyn_jax.models import decoder
from persyn_jax.models.decoder import DecoderConfig
from persyn_jax.sampling import programs
from persyn_jax.sampling.compiled import compile_programs
from persyn_jax.sampling.config import EngineConfig
from persyn_jax.sampling.placement import Placement

# Instructions that wait for the host, or hand it something, while a program runs.
_HOST = re.compile(r" (infeed|outfeed|send|recv)(-done)?\(|callback|MoveToHost|MoveToDevice")


class EngineProgram(NamedTuple):
    """A compiled program of the engine. Bytes are those of one device."""

    name: str
    cache_bytes: int
    """Of the cache (and pool) that it is given."""
    reused_bytes: int
    """Of its arguments, how much its results are written over."""
    temporary_bytes: int
    code_bytes: int
    host_transfers: int
    collectives: dict[str, int]

    @property
    def failure(self) -> str | None:
        """Why it is not what it should be: one line."""
        if self.host_transfers:
            return f"{self.name}: {self.host_transfers} transfers to or from the host"
        if self.name != "score" and self.reused_bytes < self.cache_bytes:
            return f"{self.name}: the cache is copied, {self.reused_bytes} bytes are reused"
        if self.collectives.get("all-gather") or self.collectives.get("all-to-all"):
            return f"{self.name}: something is gathered: {self.collectives}"
        return None


def report_engine(model: DecoderConfig, config: EngineConfig, devices: Any) -> list[EngineProgram]:
    """All programs of an engine, compiled for the first `config.tensor` of the devices."""
    placement = Placement(model, config, devices)
    shapes = jax.eval_shape(lambda: decoder.unroll(decoder.init(model, jax.random.key(0))))
    params = placement.params(shapes, config.dtype)

    def empty(rows: int, length: int) -> programs.Cache:
        shape = jax.eval_shape(lambda: programs.empty_cache(model, rows, length, config.dtype))
        return placement.cache(shape)

    cache = empty(config.slots, config.cache_length)
    pool = empty(config.prefix_blocks, config.prefill_chunk)
    compiled = compile_programs(model, config, placement, params, cache, pool)
    cache_bytes, pool_bytes = _bytes(cache), _bytes(pool)
    reports = [
        _report("prefill", compiled.prefill, cache_bytes + pool_bytes),
        _report("decode", compiled.decode, cache_bytes),
        _report("load blocks", compiled.load_blocks, cache_bytes),
    ]
    return reports + [_report("score", program, 0) for program in compiled.score.values()]


def report_lines(reports: list[EngineProgram]) -> list[str]:
    """A table of the programs."""
    lines = [f"{'program':12}{'cache MB':>10}{'reused MB':>11}{'temp MB':>9}{'code MB':>9}  host"]
    for r in reports:
        sizes = (r.cache_bytes, r.reused_bytes, r.temporary_bytes, r.code_bytes)
        cache, reused, temporary, code = (f"{size / 1e6:.1f}" for size in sizes)
        sent = ", ".join(f"{count} {kind}" for kind, count in r.collectives.items() if count)
        lines.append(
            f"{r.name:12}{cache:>10}{reused:>11}{temporary:>9}{code:>9}{r.host_transfers:6}  {sent}"
        )
    return lines


def _report(name: str, compiled: Any, cache_bytes: int) -> EngineProgram:
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return EngineProgram(
        name=name,
        cache_bytes=cache_bytes,
        reused_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        host_transfers=len(_HOST.findall(text)),
        collectives={kind: len(re.findall(rf" {kind}(-start)?\(", text)) for kind in KINDS},
    )


def _bytes(cache: programs.Cache) -> int:
    """Of one device's part, without padding."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(cache)
    )
