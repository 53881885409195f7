"""What a run's estimate counts, on the smoke config."""

import pytest
from pipeline_runs import small_config

from persyn_jax.models import weights
from persyn_jax.pipeline.estimate import estimate
from persyn_jax.records import Prompt
from persyn_jax.training.memory import estimate_training_memory


def prompts(**counts: int) -> list[Prompt]:
    return [
        Prompt(
            id=f"{split}{number}",
            messages=[{"role": "user", "content": "2 + 2?"}],
            source="adding",
            split=split,
            answer="4",
            verifier="exact",
            source_licence="CC0-1.0",
        )
        for split, count in counts.items()
        for number in range(count)
    ]


def memory(*overrides: str) -> float:
    return estimate(small_config(*overrides), prompts(train=1)).training_memory_gb


def test_routing_asks_one_teacher_a_prompt_beyond_the_calibration():
    found = estimate(small_config(), prompts(calibration=4, train=10, eval=3))
    assert found.prompts == {"calibration": 4, "train": 10, "eval": 3}
    assert found.answers_generated == 3 * 4 + 10
    assert found.answers_generate_then_select == 3 * (4 + 10)
    assert found.tokens["train_student"] > found.tokens["train_router"] > 0


def test_training_memory_is_a_process_and_so_much_a_worker():
    alone, two, four = (memory(f"gossip.workers={workers}") for workers in (1, 2, 4))
    assert two - alone == pytest.approx((four - two) / 2)
    config = small_config()
    worker = estimate_training_memory(weights.load_config(config.student), config.training, "cpu")
    assert two - alone >= worker.total / 1e9
    assert alone - (two - alone) > 0.3  # a process that has imported JAX is no smaller


def test_longer_rows_need_more_memory_and_recomputing_less():
    rows = "training.rows=64"
    assert memory(rows, "training.recompute=layers") < memory(rows) < memory("training.rows=128")
