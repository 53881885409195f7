"""Run folders: the lock, atomic files, torn metrics, and every state of a stage manifest."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persyn_jax import store
from persyn_jax.config import ConfigError
from persyn_jax.store import Fingerprints

HOLDER = """
import sys, time
from pathlib import Path
from persyn_jax import store
with store.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path):
    folder = tmp_path / "run"
    store.prepare(folder)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=rf"run: in use by process {holder.pid}$"),
            store.hold(folder),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with store.hold(folder):
        assert (folder / ".lock").read_text() == str(os.getpid())
    with store.hold(folder):
        pass


def test_a_file_where_the_run_folder_should_be_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="run: cannot be a run folder"):
        store.prepare(tmp_path / "run")


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    store.write_json(path, {"name": "é\u2028", "values": [1.5, None]})
    assert store.read_json(path) == {"name": "é\u2028", "values": [1.5, None]}
    with pytest.raises(ValueError, match="Out of range float"):
        store.write_json(path, {"loss": float("nan")})
    assert store.read_json(path) == {"name": "é\u2028", "values": [1.5, None]}
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


FULL_DISK = """
import resource, sys
from pathlib import Path
from persyn_jax import records, store
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
path = Path(sys.argv[1])
"""
TEXT = 'store.write_text(path, "y" * 5000)'
ROUTES = "store.write_records(path, [records.Route('p', [0.1], 't', 1.0)] * 9000, records.Route)"


@pytest.mark.parametrize("writes", [TEXT, ROUTES])
def test_a_full_disk_keeps_the_old_file_and_leaves_no_part(tmp_path, writes):
    path = tmp_path / "report.html"
    store.write_text(path, "old")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK + writes, str(path)], capture_output=True, text=True
    )
    assert f"ConfigError: {path}: cannot be written: File too large" in done.stderr
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("content", [b"{", b"\xff", None])
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "router.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"router\.json: "):
        store.read_json(path)


def rows_of(stage: str, steps: range) -> list[dict]:
    return [{"stage": stage, "step": step, "loss": [step / 3, 1e-9]} for step in steps]


def test_metrics_are_read_as_appended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert store.read_metrics(path) == []
    rows = rows_of("train_router", range(2)) + rows_of("train_student", range(3))
    for row in rows:
        store.append_metrics(path, row)
    assert store.read_metrics(path) == rows


def test_resuming_at_any_cut_of_the_file_gives_the_undisturbed_file(tmp_path):
    """A kill leaves any prefix of the last row; the stage resumes from its checkpoint at step 2."""
    path = tmp_path / "metrics.jsonl"
    rows = rows_of("train_router", range(2)) + rows_of("train_student", range(4))
    for row in rows:
        store.append_metrics(path, row)
    undisturbed = path.read_bytes()
    last_row = undisturbed.rstrip(b"\n").rindex(b"\n") + 1
    for cut in range(last_row, len(undisturbed) + 1):
        path.write_bytes(undisturbed[:cut])
        store.truncate_metrics(path, "train_student", step=2)
        assert store.read_metrics(path) == rows[:4]
        for row in rows[4:]:
            store.append_metrics(path, row)
        assert path.read_bytes() == undisturbed


def test_truncating_touches_no_other_stage_and_needs_no_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    store.truncate_metrics(path, "train_student", step=0)
    rows = rows_of("train_router", range(3)) + rows_of("train_student", range(3))
    for row in rows:
        store.append_metrics(path, row)
    store.truncate_metrics(path, "train_student", step=0)
    assert store.read_metrics(path) == rows[:3]


def test_damage_inside_metrics_is_named_by_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for row in rows_of("train_student", range(3)):
        store.append_metrics(path, row)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:9] + b"\n" + lines[2])
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2: damaged"):
        store.truncate_metrics(path, "train_student", step=0)


FINGERPRINTS = Fingerprints(
    inputs={"prompts": "aa", "answers": "bb"}, config={"router.steps": "40"}, source="dd"
)


@pytest.fixture
def folder(tmp_path):
    """A run folder in which the stage `route` finished with one file and one folder of outputs."""
    run = tmp_path / "run"
    store.prepare(run)
    (run / "student" / "deep").mkdir(parents=True)
    (run / "routes.parquet").write_text("routes")
    (run / "student" / "config.json").write_text("{}")
    (run / "student" / "deep" / "weights").write_text("w")
    (run / "answers.parquet").write_text("of another stage")
    outputs = ["student", "routes.parquet"]
    store.finish(run, "route", FINGERPRINTS, outputs, {"routes": 3}, seconds=1.5)
    return run


def test_an_unfinished_stage_has_no_manifest(folder):
    assert store.finished(folder, "generate", FINGERPRINTS) is None


def test_a_finished_stage_gives_its_manifest_back(folder):
    manifest = store.finished(folder, "route", FINGERPRINTS)
    assert manifest.summary == {"routes": 3}
    assert manifest.seconds == 1.5
    assert list(manifest.outputs) == [
        "routes.parquet",
        "student/config.json",
        "student/deep/weights",
    ]
    on_disk = json.loads((folder / "stages" / "route.json").read_text())
    assert list(on_disk) == [
        "stage",
        "inputs",
        "config",
        "source",
        "outputs",
        "summary",
        "seconds",
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": {"router.steps": "50"}}, r"config router\.steps changed \(40 -> 50\)"),
        ({"config": {}}, r"config router\.steps changed \(40 -> none\)"),
        ({"source": "d2"}, r"source changed \(dd -> d2\)"),
        ({"inputs": {"prompts": "a2", "answers": "bb"}}, r"input prompts changed \(aa -> a2\)"),
        ({"inputs": {"prompts": "aa"}}, r"input answers changed \(bb -> none\)"),
        (
            {"inputs": {"prompts": "aa", "answers": "bb", "x": "e"}},
            r"input x changed \(none -> e\)",
        ),
    ],
)
def test_a_changed_fingerprint_is_named(folder, changed, message):
    now = dataclasses.replace(FINGERPRINTS, **changed)
    with pytest.raises(ConfigError, match=rf"stage route is finished, but {message}\. --overwrite"):
        store.finished(folder, "route", now)


def test_a_missing_or_changed_output_is_named(folder):
    (folder / "routes.parquet").write_text("routeS")
    (folder / "student" / "deep" / "weights").unlink()
    with pytest.raises(
        ConfigError,
        match=r"output routes\.parquet has changed; output student/deep/weights is missing",
    ):
        store.finished(folder, "route", FINGERPRINTS)


def test_discard_removes_the_manifest_and_its_outputs_only(folder):
    (folder / "routes.parquet").unlink()  # half done by a kill before
    (folder / "student" / "notes.txt").write_text("the user's own")
    store.discard(folder, "route")
    store.discard(folder, "route")
    assert store.finished(folder, "route", FINGERPRINTS) is None
    left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    assert left == ["answers.parquet", "checkpoints", "stages", "student", "student/notes.txt"]


def test_an_adopted_stage_is_finished_there_too_and_follows_the_source(folder, tmp_path):
    other = tmp_path / "other"
    store.prepare(other)
    for content in ("routes", "routes again"):
        (folder / "routes.parquet").write_text(content)
        store.finish(folder, "route", FINGERPRINTS, ["routes.parquet", "student"], {}, 1.0)
        store.adopt(folder, other, "route")
        manifest = store.read_manifest(folder, "route")
        assert store.finished(other, "route", FINGERPRINTS) == manifest
        assert (other / "routes.parquet").read_text() == content
    (other / "routes.parquet").write_text("changed")
    store.adopt(folder, other, "route")  # does nothing: the change is for `finished` to tell
    with pytest.raises(ConfigError, match=r"routes\.parquet has changed"):
        store.finished(other, "route", FINGERPRINTS)
    with pytest.raises(ConfigError, match="stage score is not finished"):
        store.adopt(folder, other, "score")


@pytest.mark.parametrize("content", ["{", "[]", '{"stage": "route"}'])
def test_a_damaged_manifest_is_named(folder, content):
    (folder / "stages" / "route.json").write_text(content)
    with pytest.raises(ConfigError, match=r"route\.json: "):
        store.finished(folder, "route", FINGERPRINTS)


@pytest.mark.parametrize("target", ["../outside.txt", "student/../../outside.txt"])
def test_a_manifest_cannot_reach_outside_its_folder(folder, target):
    outside = folder.parent / "outside.txt"
    outside.write_text("keep")
    path = folder / "stages" / "route.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"outputs": {target: "00"}}))
    with pytest.raises(ConfigError, match="not inside the run folder"):
        store.discard(folder, "route")
    assert outside.read_text() == "keep"


@settings(max_examples=30)
@given(cut=st.integers(0, 400))
def test_a_torn_manifest_never_passes_for_a_finished_stage(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("run")
    store.prepare(folder)
    store.finish(folder, "route", FINGERPRINTS, [], {}, seconds=1.0)
    path = folder / "stages" / "route.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole) - 2)])  # without its closing brace
    with pytest.raises(ConfigError, match=r"route\.json: not valid JSON"):
        store.finished(folder, "route", FINGERPRINTS)
