"""Stage generate in chunks: what is asked for by and by comes to the same."""

import shutil

import pytest
from pipeline_runs import SMALL, SMOKE, run_here

from persyn_jax.pipeline import generate
from persyn_jax.pipeline.answers import in_all
from persyn_jax.pipeline.generate import in_chunks
from persyn_jax.records import Route
from persyn_jax.sampling.config import ClientConfig

ROUTES = [Route(str(number), [0.0, 1.0], "a", 1.0) for number in range(10)]


def test_chunks_are_the_routes_in_order(monkeypatch):
    monkeypatch.setattr(generate, "_CHUNK", 4)
    chunks = list(in_chunks(ROUTES, ClientConfig()))
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]
    assert [route for chunk in chunks for route in chunk] == ROUTES
    assert list(in_chunks([], ClientConfig())) == []


@pytest.mark.parametrize("budget", [{"budget_usd": 0.0}, {"budget_tokens": 5}])
def test_a_budget_is_for_all_of_them_together(monkeypatch, budget):
    monkeypatch.setattr(generate, "_CHUNK", 4)
    assert list(in_chunks(ROUTES, ClientConfig(**budget))) == [ROUTES]


def test_summaries_add_up_and_an_unknown_price_stays_unknown():
    def summary(answers, **asked):
        return {"answers": answers, "failed_answers": 1, "measured": {"asked": asked}}

    first = summary(4, a={"answers": 3, "usd": 0.5}, b={"answers": 1, "usd": None})
    second = summary(2, a={"answers": 1, "usd": 0.25}, b={"answers": 1, "usd": 1.0})
    assert in_all([first, second, summary(1)]) == {
        "answers": 7,
        "failed_answers": 3,
        "measured": {"asked": {"a": {"answers": 4, "usd": 0.75}, "b": {"answers": 2, "usd": None}}},
    }


def test_in_chunks_the_stage_writes_the_same_bytes(finished_run, tmp_path, monkeypatch, capfd):
    shutil.copytree(finished_run.place.folder / "runs", tmp_path / "runs")
    run = tmp_path / "runs" / "smoke"
    names = ("answers.parquet", "examples.parquet")
    before = {name: (run / name).read_bytes() for name in names}
    for name in (*names, "stages/generate.json"):
        (run / name).unlink()
    monkeypatch.setattr(generate, "_CHUNK", 7)
    ended = run_here(
        "generate.py",
        *("--config", str(SMOKE), *SMALL),
        folder=tmp_path,
        monkeypatch=monkeypatch,
        capfd=capfd,
    )
    assert ended.code == 0, ended.stderr
    assert {name: (run / name).read_bytes() for name in names} == before
