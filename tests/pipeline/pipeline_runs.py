"""Runs of the real scripts on the smoke config made smaller, and what is left on the disk."""

import contextlib
import hashlib
import json
import os
import runpy
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from persyn_jax import config
from persyn_jax.pipeline.config import RunConfig

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke.yaml"
CALIBRATION, TRAIN, EVAL, TEACHERS = 12, 20, 8, 3
# Many short steps, so that a kill can fall between two checkpoints; one answer at a time, so that a
# kill can fall between two answers.
SMALL = (
    *(
        f"sources.{source}.counts={{calibration: {CALIBRATION // 2}, train: {TRAIN // 2},"
        f" eval: {EVAL // 2}}}"
        for source in ("reversing", "adding")
    ),
    "client.concurrency=1",
    "router.steps=20",
    "training={epochs: 5, rows: 1, row_tokens: 320, row_response_tokens: 128, held_out: 4,"
    " measure_every: 4, checkpoint_every: 4}",
)
TABLES = (
    *("prompts", "calibration_answers", "measurements", "rewards", "routes", "answers"),
    *("examples", "scores"),
)
STAGES = (
    "calibrate",
    "score",
    "train_router",
    "route",
    "generate",
    "train_student",
    "evaluate",
    "report",
)
MARK = "PERSYN_TEST_MARK"


def small_config(*overrides: str) -> RunConfig:
    return config.load(RunConfig, SMOKE, [*SMALL, *overrides])


@dataclass(frozen=True)
class Place:
    """A working directory in which scripts run, and the environment they run in."""

    folder: Path
    cache: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "smoke"

    @property
    def answers(self) -> Path:
        return self.folder / "runs" / "answers.sqlite"

    def start(self, script: str, *words: str) -> subprocess.Popen:
        """The script with the small smoke config, as a user starts it."""
        command = [sys.executable, ROOT / "scripts" / script, "--config", SMOKE, *SMALL, *words]
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            MARK: str(self.folder),
        }
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, script: str, *words: str) -> "Ended":
        """The same, waited for."""
        child = self.start(script, *words)
        stdout, stderr = child.communicate(timeout=240)
        return Ended(child.returncode, stdout, stderr)

    def processes(self) -> list[psutil.Process]:
        """Everything that was started from here and is still there: children inherit the mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.folder):
                    found.append(process)
        return found

    def kill_when(self, child: subprocess.Popen, moment: Callable[[], bool]) -> None:
        """kill -9 at that moment; returns when no process is left."""
        wait_until(moment, still=lambda: child.poll() is None)
        child.kill()
        child.communicate()
        wait_until(lambda: not self.processes())


@dataclass(frozen=True)
class Ended:
    """A script that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """Its one line of error; fails if there is none, or a traceback, or a second one."""
        assert "Traceback" not in self.stderr, self.stderr
        (line,) = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        return line


def run_here(
    script: str, *words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> Ended:
    """The script inside this process, from `folder`: for what ends before it computes anything."""
    capfd.readouterr()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script, *words])
    terminate = signal.getsignal(signal.SIGTERM)
    code = 0
    try:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    finally:
        signal.signal(signal.SIGTERM, terminate)
    return Ended(code, *capfd.readouterr())


def wait_until(condition: Callable[[], bool], still: Callable[[], bool] = lambda: True) -> None:
    """Polls often: what is waited for may pass within a second."""
    deadline = time.monotonic() + 120
    while not condition():
        assert still(), "it ended before the moment came"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.005)


def stored_answers(path: Path) -> dict[str, tuple]:
    """All rows of the answer store by key, times included, through a connection of our own."""
    if not path.exists():
        return {}
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        try:
            return {row[0]: row for row in connection.execute("SELECT * FROM answers")}
        except sqlite3.OperationalError:  # its table is being made
            return {}


def timeless_answers(path: Path) -> list[tuple]:
    """The rows without what another run cannot share: times, and the port of the service."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        names = [row[1] for row in connection.execute("PRAGMA table_info(answers)")]
        kept = [n for n in names if n not in ("server", "latency_seconds", "created_at")]
        return connection.execute(f"SELECT {', '.join(kept)} FROM answers ORDER BY key").fetchall()


def student_rows(run: Path) -> list[dict]:
    """The finished rows of the student's training in metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["stage"] == "train_student"]


def whole_checkpoints(run: Path) -> list[Path]:
    """The manifests of the checkpoints that are written to the end, oldest first."""
    return sorted((run / "checkpoints").glob("*/*.manifest.json"))


def timeless_metrics(run: Path) -> list[str]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in row.items() if k != "measured"}) for row in rows]


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """(hash, time of change) of every file, but for the lock, which says who is at work."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def assert_same_results(one: Place, other: Place) -> None:
    """Byte for byte: tables, router, student, answers; metrics and the report but for timings."""
    names = [*(f"{table}.parquet" for table in TABLES), "config.yaml"]
    for folder in ("router", "student"):
        names += [str(path.relative_to(one.run)) for path in (one.run / folder).rglob("*")]
    for name in names:
        assert (one.run / name).read_bytes() == (other.run / name).read_bytes(), name
    assert timeless_metrics(one.run) == timeless_metrics(other.run)
    assert timeless_answers(one.answers) == timeless_answers(other.answers)
    reports = [json.loads((place.run / "report.json").read_text()) for place in (one, other)]
    for report in reports:
        assert set(report.pop("stages")) == set(STAGES[:-1])
    assert json.dumps(reports[0]) == json.dumps(reports[1])
