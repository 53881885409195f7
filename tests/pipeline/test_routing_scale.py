"""The bench of routing, on few prompts: every answer is asked for and counted, limits are kept."""

import json
import runpy
import sys
import tracemalloc
from pathlib import Path

import numpy as np

from persyn_jax.pipeline import answers, generate
from persyn_jax.pipeline.config import RoutingConfig
from persyn_jax.pipeline.routing_scale import RoutingScaleConfig, measure
from persyn_jax.sampling.replies import Reply
from persyn_jax.store import tables

ROOT = Path(__file__).parents[2]
PROMPTS, CALIBRATION, TEACHERS = 60, 20, 3


def test_stages_run_on_what_was_drawn(tmp_path, monkeypatch, capfd):
    summary = tmp_path / "scale.json"
    routing = "[{strategy: knn}, {strategy: router, most_share: {t0: 0.1}, budget_usd: 0.002}]"
    counts = (f"prompts={PROMPTS}", f"calibration={CALIBRATION}", f"teachers={TEACHERS}")
    words = [*counts, f"routing={routing}", "answer_seconds=0", "--json", str(summary)]
    monkeypatch.setattr(sys, "argv", ["routing_scale.py", *words])
    runpy.run_path(str(ROOT / "scripts" / "routing_scale.py"), run_name="__main__")
    drawn, _, limited, generated = json.loads(summary.read_text())["measured"]
    assert drawn["summary"]["calibration_answers"] == CALIBRATION * TEACHERS
    assert limited["summary"]["by_teacher"]["t0"]["share"] <= 0.1
    assert 0 < limited["summary"]["expected_usd"] <= 0.002
    assert generated["summary"]["answers"] == PROMPTS
    assert generated["summary"]["answers_generated"] == PROMPTS + CALIBRATION * (TEACHERS - 1)
    assert "in all" in capfd.readouterr().out


LONG = 100_000  # characters, of each prompt and of each answer


def answered_at_once(asked, client, service, commit, spent):
    """`ask_all`, with answers that do not compress."""
    rng = np.random.default_rng(0)
    for _, questions in asked:
        for question in questions:
            text = rng.bytes(LONG // 2).hex()
            commit([(question, Reply(text, None, "stop", 1, 1, "", 0.0))])
    return {}


def peak_bytes(folder: Path, prompts: int) -> int:
    """Of what the stages route and generate have in memory at once."""
    config = RoutingScaleConfig(
        prompts=prompts,
        calibration=CALIBRATION,
        teachers=2,
        prompt_characters=LONG,
        routing=[RoutingConfig(most_share={"t0": 0.3}, budget_usd=1e3, least_margin=0.1)],
    )
    stages = measure(config, "http://127.0.0.1:9/v1", folder)
    next(stages)  # all that they read is drawn
    tracemalloc.start()
    *_, generated = stages
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert generated.summary["answers"] == generated.summary["examples"] == prompts
    return peak


def test_memory_does_not_grow_with_texts(tmp_path, monkeypatch):
    """More prompts, each with a long text and a long answer: no more of them at the same time."""
    monkeypatch.setattr(tables, "_GROUP_ROWS", 8)
    monkeypatch.setattr(generate, "_CHUNK", 8)
    monkeypatch.setattr(answers, "ask_all", answered_at_once)
    _, few, many = (peak_bytes(tmp_path / str(n), n) for n in (59, 60, 120))
    assert many - few < 60 * LONG / 10
