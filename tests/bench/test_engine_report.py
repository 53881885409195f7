"""The engine's programs as the compiler leaves them: here for host devices, in CI also for TPUs."""

import jax
import pytest

from persyn_jax.bench.engine_report import EngineProgram, report_engine, report_lines
from persyn_jax.models.spec import ModelConfig
from persyn_jax.models.weights import load_config
from persyn_jax.sampling.config import EngineConfig

TINY = load_config(ModelConfig(weights="random:tiny"))
SHAPES = EngineConfig(
    slots=2, cache_length=32, prefill_rows=2, prefill_chunk=8, prefix_blocks=4, tensor=2
)


def test_an_engine_cut_over_two_devices_is_as_it_should_be():
    reports = report_engine(TINY, SHAPES, jax.devices())
    assert [r.name for r in reports] == ["prefill", "decode", "load blocks", "score"]
    assert [r.failure for r in reports] == [None] * 4
    cache = 2 * TINY.layers * 2 * 32 * TINY.kv_heads * TINY.head_dim * 4 // 2
    pool = 2 * TINY.layers * 4 * 8 * TINY.kv_heads * TINY.head_dim * 4 // 2
    assert [r.cache_bytes for r in reports] == [cache + pool, cache, cache, 0]
    # Two sums over the devices in a layer, and one for the embeddings if they are cut.
    assert all(r.collectives["all-reduce"] >= 2 * TINY.layers for r in reports[:2])
    assert len(report_lines(reports)) == 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"host_transfers": 2}, "decode: 2 transfers to or from the host"),
        ({"reused_bytes": 99}, "decode: the cache is copied, 99 bytes are reused"),
        ({"collectives": {"all-gather": 1}}, "decode: something is gathered"),
    ],
)
def test_what_should_not_be_is_named(change, reason):
    good = EngineProgram("decode", 100, 100, 0, 0, 0, {"all-reduce": 4})
    failure = good._replace(**change).failure
    assert failure is None if reason is None else reason in failure
