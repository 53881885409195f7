"""The memory estimate against what XLA lays out for the compiled step on the CPU."""

import dataclasses

import jax
import pytest

from persyn_jax import gossip
from persyn_jax.bench.pod_programs import Program, compile_program
from persyn_jax.mesh import make_mesh
from persyn_jax.models.decoder import DecoderConfig
from persyn_jax.models.weights import RANDOM_TINY
from persyn_jax.training.config import LoraConfig, OptimiserConfig, TrainConfig
from persyn_jax.training.memory import estimate_training_memory

# 19 million parameters in layers and embeddings as wide as a 30M model's.
SMALL = dataclasses.replace(
    RANDOM_TINY, vocab_size=16384, layers=8, d_model=384, d_ff=1024, heads=6, head_dim=64
)
_SIZES = {"vocab_size": 49152, "layers": 30, "d_model": 576, "d_ff": 1536, "heads": 9}
SMOLLM2 = dataclasses.replace(RANDOM_TINY, **_SIZES, kv_heads=3, head_dim=64)
ROWS = TrainConfig(rows=4, row_tokens=256, row_response_tokens=64)
SHORT = TrainConfig(rows=1, row_tokens=64, row_response_tokens=16)


def measured(model: DecoderConfig, config: TrainConfig) -> int:
    """Bytes of arguments and temporaries of one worker's real step, compiled from shapes."""
    program = Program("bank", gossip.gosgd, gossip.gosgd_schedule(1, 2, 0.5, seed=0))
    compiled = compile_program(program, model, config, make_mesh(1))
    return compiled.argument_bytes + compiled.temporary_bytes


CASES = {
    "tiny": (RANDOM_TINY, ROWS),
    "tiny, all at once": (
        RANDOM_TINY,
        dataclasses.replace(ROWS, recompute="layers", compute_dtype="bfloat16", accumulate=3),
    ),
    "bfloat16": (SMALL, dataclasses.replace(ROWS, compute_dtype="bfloat16")),
    "adapters": (SMALL, dataclasses.replace(ROWS, lora=LoraConfig())),
    "adapters, a large head": (
        dataclasses.replace(SMALL, vocab_size=65536),
        dataclasses.replace(ROWS, row_response_tokens=150, lora=LoraConfig(), recompute="layers"),
    ),
    "a large head, all at once": (
        dataclasses.replace(SMALL, vocab_size=65536),
        dataclasses.replace(
            ROWS,
            row_response_tokens=150,
            recompute="layers",
            compute_dtype="bfloat16",
            accumulate=2,
        ),
    ),
    "a large head": (
        dataclasses.replace(SMALL, vocab_size=65536),
        dataclasses.replace(ROWS, row_response_tokens=150, recompute="layers"),
    ),
    "SmolLM2": (
        SMOLLM2,
        dataclasses.replace(
            ROWS, rows=8, row_tokens=128, row_response_tokens=127, recompute="layers"
        ),
    ),
    "recomputing": (SMALL, dataclasses.replace(ROWS, recompute="layers")),
    **{
        f"the update decides, {name}, {vocabulary}": (
            dataclasses.replace(SMALL, vocab_size=vocabulary),
            dataclasses.replace(SHORT, optimiser=OptimiserConfig(name=name), recompute="layers"),
        )
        for name, vocabulary in [("adamw", 65536), ("sgd", 16384), ("adafactor", 65536)]
    },
}


@pytest.mark.parametrize(("model", "config"), CASES.values(), ids=CASES)
def test_the_estimate_is_within_a_fifth(model, config):
    """Newer JAX needs less for a tiny model, and then it says up to a third too much."""
    most = 1.2 if jax.__version_info__ < (0, 11) or model != RANDOM_TINY else 1.35
    found = estimate_training_memory(model, config, "cpu").total
    assert 0.8 < found / measured(model, config) < most


def test_shards_and_bfloat16_and_recomputing_need_less():
    def total(platform="tpu", shards=1, **changes) -> float:
        config = dataclasses.replace(ROWS, **changes)
        return estimate_training_memory(SMALL, config, platform, shards).total

    assert total(shards=4) == pytest.approx(total() / 4, rel=1e-6)
    assert total(compute_dtype="bfloat16") < total() < total(accumulate=2) < total(rows=8)
    assert total(recompute="layers") < total()


def test_the_order_that_a_step_is_compiled_in_needs_less_memory(monkeypatch):
    """Than the compiler's own, where layers outweigh the head; else the two are nearly equal."""
    case = CASES["SmolLM2"]
    needed = measured(*case)
    monkeypatch.setattr("persyn_jax.training.sharded.compiler_options", lambda mesh: {})
    assert needed < 0.95 * measured(*case)
