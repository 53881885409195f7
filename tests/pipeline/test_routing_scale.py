"""The bench of routing, on few prompts: every answer is asked for and counted, limits are kept."""

import json
import runpy
import sys
from pathlib import Path

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
