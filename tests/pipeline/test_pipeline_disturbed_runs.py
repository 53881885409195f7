"""Runs that are killed, split into their scripts, repeated, or continued with another config."""

import json
import re
import shutil
from pathlib import Path

import pytest
from pipeline_runs import (
    CALIBRATION,
    SMALL,
    SMOKE,
    STAGES,
    TEACHERS,
    Place,
    assert_same_results,
    run_here,
    snapshot,
    stored_answers,
    student_rows,
    wait_until,
    whole_checkpoints,
)

pytestmark = pytest.mark.slow


def test_the_stages_as_scripts_of_their_own_give_the_same_run(place, finished_run):
    """A second run from nothing in another folder, eight processes instead of one: same bytes."""
    for stage in STAGES:
        ended = place.finish(f"{stage}.py", "--json", f"{stage}.json")
        assert ended.code == 0, ended.stderr
        summary = json.loads(ended.stdout)
        assert json.loads((place.folder / f"{stage}.json").read_text()) == summary
    assert_same_results(place, finished_run.place)
    assert place.processes() == []


def test_killed_in_generate_and_in_training_a_run_ends_like_an_undisturbed_one(
    place, finished_run, monkeypatch, capfd
):
    """On the way a second run is refused, and a damaged checkpoint passed over."""
    undisturbed = stored_answers(finished_run.place.answers)
    calibrated = CALIBRATION * TEACHERS

    first = place.start("run_persyn.py")
    wait_until(lambda: (place.run / ".lock").exists() and (place.run / ".lock").read_text())
    words = ("--config", str(SMOKE), *SMALL)
    second = run_here(
        "run_persyn.py", *words, folder=place.folder, monkeypatch=monkeypatch, capfd=capfd
    )
    assert second.code == 2
    assert second.error == f"error: runs/smoke: in use by process {first.pid}"

    place.kill_when(first, lambda: len(stored_answers(place.answers)) >= calibrated + 3)
    committed = stored_answers(place.answers)
    assert calibrated + 3 <= len(committed) < len(undisturbed), "killed in generate"

    # Checkpoints are written beside the steps: two of them are whole some time after step 10.
    place.kill_when(
        place.start("run_persyn.py"),
        lambda: len(student_rows(place.run)) >= 10 and len(whole_checkpoints(place.run)) >= 2,
    )
    after = stored_answers(place.answers)
    assert {key: after[key] for key in committed} == committed, "none lost, none asked again"
    assert set(after) == set(undisturbed)
    rows = student_rows(place.run)
    assert 10 <= len(rows) < len(student_rows(finished_run.place.run)), "killed in training"

    older, newest = whole_checkpoints(place.run)[-2:]
    damaged = next(newest.with_name(newest.name.split(".")[0]).rglob("_METADATA"))
    damaged.write_text("{}")
    third = place.finish("run_persyn.py")
    assert third.code == 0, third.stderr
    (resumed,) = re.findall(r"training from step (\d+) to", third.stderr)
    assert int(resumed) == int(older.name.split(".")[0])
    relative = damaged.relative_to(place.folder)
    assert f"checkpoint passed over: {relative} is not what was written" in third.stderr
    assert_same_results(place, finished_run.place)
    assert stored_answers(place.answers) == after
    assert list((place.run / "checkpoints").iterdir()) == []
    assert place.processes() == []


def test_another_config_is_refused_by_name_and_overwrite_redoes_what_depends_on_it(
    tmp_path, finished_run
):
    folder = shutil.copytree(finished_run.place.folder, tmp_path / "copy")
    place = Place(folder, finished_run.place.cache)
    before = snapshot(folder)
    change = "evaluation.max_tokens=3"

    refused = place.finish("run_persyn.py", change)
    assert refused.code == 2
    assert refused.error == (
        "error: runs/smoke: stage evaluate is finished, but config evaluation.max_tokens changed "
        "(16 -> 3). --overwrite redoes the stage and keeps all answers"
    )
    assert snapshot(folder) == before

    redone = place.finish("run_persyn.py", change, "--overwrite")
    assert redone.code == 0, redone.stderr
    assert re.findall(r"(\w+): finished before", redone.stderr) == list(STAGES[:6])
    after = snapshot(folder)
    changed = {Path(name).name for name in before if after[name] != before[name]}
    assert changed == {
        *("scores.parquet", "report.json", "report.html", "config.yaml"),
        *("evaluate.json", "report.json"),
    }
