"""One whole run for the session, undisturbed; and a compilation cache that all runs share."""

import dataclasses
import fcntl
import json
from dataclasses import dataclass

import pytest
from pipeline_runs import Ended, Place


@dataclass(frozen=True)
class FinishedRun:
    """An undisturbed run of `run_persyn.py`, compiled from nothing."""

    place: Place
    ended: Ended


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, worker_id) -> FinishedRun:
    """One for all processes of the test run: whoever comes first makes it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "finished"
    shared.mkdir(exist_ok=True)
    place, told = Place(shared / "run", cache=shared / "cache"), shared / "ended.json"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            place.folder.mkdir()
            place.cache.mkdir()
            ended = place.finish("run_persyn.py", "--json", "summary.json")
            assert ended.code == 0, ended.stderr
            told.write_text(json.dumps(dataclasses.asdict(ended)))
    return FinishedRun(place, Ended(**json.loads(told.read_text())))


@pytest.fixture
def place(tmp_path, finished_run) -> Place:
    """An empty place that need not compile what the finished run has compiled."""
    return Place(tmp_path, finished_run.place.cache)
