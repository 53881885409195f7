"""The consensus experiment against closed forms, a brute-force expectation, and a reference table
that an independent simulation of Algorithms 1 and 2 gave."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from persyn_jax.bench import consensus
from persyn_jax.bench.consensus import ConsensusConfig, run_consensus
from persyn_jax.bench.consensus_table import HEADER, row_line, summary_lines
from persyn_jax.gossip import simulate, topologies

SCRIPT = Path(__file__).parents[2] / "scripts" / "gossip_consensus.py"

WORKERS, DIMENSION = 8, 64  # of nearly all tests, which so share their compiled programs
NOISE = 5 * np.sqrt(2 / (7 * 64))  # of eps, relative: it is chi-squared

# eps / d of 8 workers by exchange probability.
ROUND = {0.01: 1403, 0.02: 675, 0.05: 285, 0.1: 139, 0.2: 71.4, 0.4: 36.0, 0.5: 29.2, 1.0: 14.8}
TICK = {0.01: 1421, 0.02: 709, 0.05: 287, 0.1: 143, 0.2: 74.9, 0.4: 39.8, 0.5: 33.2, 1.0: 19.3}


def asynchronous(p, seeds):
    """Mean eps / d of the two clocks over the seeds."""
    config = ConsensusConfig(exchange_probabilities=[p], seeds=seeds)
    rows = [
        row
        for seed in seeds
        for row in consensus.event_driven_rows(config, p, round(1500 / p), seed)
    ]
    return {
        name: np.mean([row.measured for row in rows if row.schedule == name])
        for name in consensus.CLOCKS
    }


@pytest.mark.parametrize(
    "p", [pytest.param(p, marks=pytest.mark.slow) if p < 0.4 else p for p in sorted(ROUND)]
)
def test_the_reference_table_is_met_within_5_per_cent(p):
    seeds = [0] if p < 0.02 else [0, 1, 2]  # one run of 150,000 rounds takes a minute
    assert asynchronous(p, seeds) == {
        "GoSGD round": pytest.approx(ROUND[p], rel=0.05),
        "GoSGD tick": pytest.approx(TICK[p], rel=0.05),
    }


@pytest.mark.parametrize("clock", sorted(consensus.CLOCKS))
def test_the_prediction_is_the_expectation_over_the_noise(clock):
    """Algorithms 1 and 2 with their queues, each awakening's noise being a coordinate of its own:
    then eps is the expected eps of one coordinate."""
    workers = 3
    events = simulate.asynchronous_run(
        workers, 0.6, 110, 0, consensus.CLOCKS[clock], simulate.constant(0.0)
    )
    series = consensus.event_driven(events, dimension=2, seed=0)
    count = len(events.time_E)
    x, alpha = np.zeros((workers, count)), np.full(workers, 1 / workers)
    queues: list[list[tuple]] = [[] for _ in x]
    expected = []
    for event, (i, j) in enumerate(zip(events.worker_E, events.receiver_E, strict=True)):
        for x_j, alpha_j in queues[i]:
            x[i] = alpha_j / (alpha[i] + alpha_j) * x_j + alpha[i] / (alpha[i] + alpha_j) * x[i]
            alpha[i] = alpha_j + alpha[i]
        queues[i] = []
        x[i, event] += 1
        if j != i:
            alpha[i] /= 2
            queues[j].append((x[i].copy(), alpha[i]))
        expected.append(np.square(x - x.mean(axis=0)).sum())
    expected_T = np.array(expected)[workers - 1 :: workers]
    assert len(series.predicted_T) == len(series.measured_T) == 100
    np.testing.assert_allclose(series.predicted_T, expected_T[:100], rtol=1e-10)


@pytest.mark.parametrize("period", [1, 2, 5])
def test_local_sgd_has_its_closed_form_before_and_after_the_mean(period):
    schedule = topologies.local_sgd_schedule(WORKERS, 100, period)
    before, after = consensus.lock_step(schedule, "d_psgd", DIMENSION, seed=0)
    alone = 1 + np.arange(100) % period
    np.testing.assert_allclose(before.predicted_T, (WORKERS - 1) * alone, atol=1e-9)
    np.testing.assert_allclose(after.predicted_T, (WORKERS - 1) * (alone % period), atol=1e-9)
    np.testing.assert_allclose(before.measured_T, before.predicted_T, rtol=NOISE)
    np.testing.assert_allclose(after.measured_T, after.predicted_T, rtol=NOISE, atol=1e-9)


@pytest.mark.parametrize("rule", sorted(consensus.RULES))
def test_workers_that_never_exchange_drift_apart_for_ever(rule):
    _, after = consensus.lock_step(topologies.silent(WORKERS, 50), rule, DIMENSION, seed=1)
    np.testing.assert_allclose(after.predicted_T, (WORKERS - 1) * np.arange(1, 51), rtol=1e-12)
    np.testing.assert_allclose(after.measured_T, after.predicted_T, rtol=NOISE)


@pytest.mark.parametrize("workers", [3, 8])
def test_equal_weights_give_the_level_at_which_pushes_undo_the_noise(workers):
    """The fall of eps by a lone push, averaged over all pairs of a sender and a receiver."""
    x = np.random.default_rng(0).normal(size=workers)
    x -= x.mean()
    after = []
    for sender in range(workers):
        for receiver in set(range(workers)) - {sender}:
            moved = x.copy()
            moved[receiver] += (x[sender] - x[receiver]) / 3
            after.append(np.square(moved - moved.mean()).sum())
    kept = np.mean(after) / np.square(x).sum()
    p = 0.3
    level = consensus.equal_weights_level(workers, p)
    np.testing.assert_allclose(level * (1 - kept) * workers * p, workers - 1)


def test_the_standard_error_knows_that_neighbours_are_alike():
    """100 autoregressive series, for which it is known."""
    memory, length = 0.9, 20_000
    series = np.random.default_rng(0).normal(size=(length, 100))
    for t in range(1, length):
        series[t] += memory * series[t - 1]
    errors = [consensus.standard_error(one) for one in series.T]
    exact = 1 / (1 - memory) / np.sqrt(length)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("workers", [5, 8])
def test_every_schedule_stays_within_4_standard_errors_of_its_prediction(workers):
    config = ConsensusConfig(
        workers=workers, exchange_probabilities=[1.0], seeds=[3], rounds_per_exchange=100
    )
    rows = list(run_consensus(config))
    assert len({row.schedule for row in rows}) == len(rows) >= 20
    for row in rows:
        assert row.measured == pytest.approx(row.predicted, abs=4 * row.difference_error + 1e-9)
        assert row.rounds == (100 if row.p else 1000) or row.schedule == "GoSGD tick"
    lines = [HEADER, *map(row_line, rows)]
    assert len({len(line) for line in lines}) == 1
    head, only = summary_lines(rows)
    assert len(head) == len(only)


def test_bytes_are_those_of_the_models_that_travel():
    config = ConsensusConfig(exchange_probabilities=[1.0], seeds=[0])
    pushes = topologies.gosgd_schedule(8, 100, 1.0, 0)
    (row,) = consensus.lock_step_rows("x", "gosgd", pushes, config, 1.0, 0)
    assert row.bytes == 100 * 8 * 4 * (64 + 1)
    means = topologies.local_sgd_schedule(8, 100, 50)
    (row,) = consensus.lock_step_rows("x", "d_psgd", means, config, None, 0)
    assert row.bytes == 2 * 2 * 7 * 4 * 64


def test_the_script_writes_its_rows_and_a_plot(tmp_path):
    words = ["--preset", "quick", "--workers", "3", "--json", "rows.json", "--plot", "levels.png"]
    words += ["exchange_probabilities=[0.5,1.0]", "rounds_per_exchange=100"]
    result = subprocess.run(
        [sys.executable, SCRIPT, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stderr) == (0, "")
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["config"]["workers"] == 3
    fields = {field.name for field in dataclasses.fields(consensus.ConsensusRow)}
    assert all(set(row) == fields for row in written["rows"])
    assert {row["p"] for row in written["rows"]} == {0.5, 1.0, None}
    assert (tmp_path / "levels.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_single_worker_is_refused_in_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, SCRIPT, "--workers", "1"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "workers: input should be greater than or equal to 2, got 1" in line
