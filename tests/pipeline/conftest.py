"""One whole run for the session, undisturbed; and a compilation cache that all runs share."""

from dataclasses import dataclass

import pytest
from pipeline_runs import Ended, Place


@dataclass(frozen=True)
class FinishedRun:
    """An undisturbed run of `run_persyn.py`, compiled from nothing."""

    place: Place
    ended: Ended


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("finished")
    place = Place(folder, cache=tmp_path_factory.mktemp("cache"))
    ended = place.finish("run_persyn.py", "--json", "summary.json")
    assert ended.code == 0, ended.stderr
    return FinishedRun(place, ended)


@pytest.fixture
def place(tmp_path, finished_run) -> Place:
    """An empty place that need not compile what the finished run has compiled."""
    return Place(tmp_path, finished_run.place.cache)
