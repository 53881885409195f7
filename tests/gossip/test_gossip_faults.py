import math

import numpy as np
import pytest

from persyn_jax.gossip import Schedule, topologies
from persyn_jax.gossip.compose import periodic_average
from persyn_jax.gossip.faults import drop_edges, kill, slow_links, stragglers
from persyn_jax.gossip.simulate import constant, lognormal
from persyn_jax.gossip.theory import contraction


def ring(rounds) -> Schedule:
    """Two slots, symmetric, and the exact mean in each third round."""
    return periodic_average(topologies.ring(6, rounds), 3)


def pairs(rounds) -> Schedule:
    """All eight exchange, in pairs."""
    return topologies.random_xor(8, rounds, seed=0)


def coins(rounds) -> Schedule:
    return topologies.gosgd_schedule(8, rounds, 0.4, seed=3)


FAULTS = {
    "dropped": lambda schedule: drop_edges(schedule, 0.3, seed=1),
    "dropped pairs": lambda schedule: drop_edges(schedule, 0.3, seed=1, symmetric=True),
    "killed": lambda schedule: kill(schedule, worker=2, start=5, stop=12),
    "stragglers": lambda schedule: stragglers(schedule, lognormal(1.0, 0.8), seed=2),
    "slow links": lambda schedule: slow_links(
        schedule, np.random.default_rng(0).integers(1, 4, (schedule.workers, schedule.workers))
    ),
}
SCHEDULES = [ring, pairs, coins]
every_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
every_schedule = pytest.mark.parametrize("make", SCHEDULES)


@every_fault
@every_schedule
def test_a_fault_takes_messages_away_and_changes_nothing_else(fault, make):
    schedule = make(30)
    faulty = fault(schedule)
    assert faulty.bank is schedule.bank
    assert faulty.branches_TK.dtype == schedule.branches_TK.dtype
    for before, after in zip(schedule.table(), faulty.table(), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
    np.testing.assert_array_equal(faulty.average_T, schedule.average_T)
    np.testing.assert_array_equal(faulty.sync_T, schedule.sync_T)
    for t in range(30):
        assert set(faulty.edges(t)) <= set(schedule.edges(t))
    assert faulty.messages().sum() < schedule.messages().sum()


@every_fault
@every_schedule
def test_a_longer_run_has_the_same_faults_first(fault, make):
    short, long = fault(make(17)), fault(make(40))
    for before, after in zip(short.table(), long.table(), strict=True):
        np.testing.assert_array_equal(before, after[:17])


@every_fault
@every_schedule
def test_busy_slots_come_first_and_others_are_the_identity(fault, make):
    faulty = fault(make(30))
    busy_TK = (faulty.weights_TKW > 0).any(axis=2)
    np.testing.assert_array_equal(faulty.branches_TK > 0, busy_TK)
    assert (np.diff(busy_TK.astype(int), axis=1) <= 0).all()


@every_fault
@every_schedule
def test_the_matrix_mode_keeps_its_slots_which_say_who_sends(fault, make):
    dense = make(30).dense()
    faulty = fault(dense)
    np.testing.assert_array_equal(faulty.branches_TK, dense.branches_TK)
    assert faulty.messages().sum() < dense.messages().sum()
    for t in range(30):
        assert set(faulty.edges(t)) <= set(dense.edges(t))


@pytest.mark.parametrize("name", ["dropped pairs", "killed", "stragglers", "slow links"])
def test_faults_of_the_matrix_mode_are_those_of_the_bank(name):
    schedule = pairs(30)
    for t in range(30):
        np.testing.assert_array_equal(
            FAULTS[name](schedule.dense()).pull_matrix(t), FAULTS[name](schedule).pull_matrix(t)
        )


def test_messages_are_lost_at_the_asked_rate_and_independently():
    schedule, rounds = pairs(5000), 5000
    faulty = drop_edges(schedule, 0.3, seed=0)
    alive_TW = faulty.weights_TKW[:, 0] > 0
    five_errors = 5 * np.sqrt(0.21 / rounds)
    np.testing.assert_allclose(alive_TW.mean(axis=0), 0.7, atol=five_errors)
    together = (alive_TW[:, 0] & alive_TW[:, 1]).mean()
    assert abs(together - 0.49) < five_errors


@pytest.mark.parametrize("make", [pairs, coins])
def test_the_law_of_what_is_left_predicts_its_contraction(make):
    faulty = drop_edges(make(4000), 0.3, seed=5)
    workers = faulty.workers
    centre_WW = np.eye(workers) - 1 / workers
    spread_T = [
        np.square(centre_WW @ faulty.pull_matrix(t) @ centre_WW).sum() / (workers - 1)
        for t in range(faulty.rounds)
    ]
    error = np.std(spread_T) / np.sqrt(len(spread_T))
    assert abs(np.mean(spread_T) - contraction(faulty).mean) < 3 * error


@pytest.mark.parametrize("make", [pairs, ring])
def test_pairs_are_lost_together(make):
    rounds = 600
    schedule = make(rounds)
    faulty = drop_edges(schedule, 0.3, seed=0, symmetric=True)
    for t in range(rounds):
        matrix_WW = faulty.pull_matrix(t)
        np.testing.assert_allclose(matrix_WW.sum(axis=0), 1, atol=1e-12)
        if not faulty.average_T[t]:
            np.testing.assert_array_equal(matrix_WW, matrix_WW.T)
    alive = faulty.messages().sum() / schedule.messages().sum()
    assert abs(alive - 0.7) < 5 * np.sqrt(0.21 / (schedule.messages().sum() / 2))


def test_extremes_of_dropping():
    schedule = ring(9)
    for symmetric in (False, True):
        kept = drop_edges(schedule, 0.0, 0, symmetric)
        np.testing.assert_array_equal(kept.weights_TKW, schedule.weights_TKW)
        np.testing.assert_array_equal(kept.branches_TK, schedule.branches_TK)
        assert drop_edges(schedule, 1.0, 0, symmetric).messages().sum() == 0
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        drop_edges(schedule, 1.5, seed=0)


@pytest.mark.parametrize("stop", [12, None])
def test_a_dead_worker_is_an_island(stop):
    schedule = ring(30)
    faulty = kill(schedule, worker=2, start=5, stop=stop)
    others = np.array([0, 1, 3, 4, 5])
    for t in range(30):
        is_dead = 5 <= t < (stop or 30)
        assert faulty.steps_TW[t, 2] == faulty.present_TW[t, 2] == (not is_dead)
        assert faulty.steps_TW[t, others].all()
        assert faulty.present_TW[t, others].all()
        matrix_WW = faulty.pull_matrix(t)
        if not is_dead:
            np.testing.assert_array_equal(matrix_WW, schedule.pull_matrix(t))
            continue
        np.testing.assert_array_equal(matrix_WW[2], np.eye(6)[2])
        np.testing.assert_array_equal(matrix_WW[:, 2], np.eye(6)[2])
        if schedule.average_T[t]:  # the mean of the others, then their ring without worker 2
            np.testing.assert_allclose(matrix_WW[np.ix_(others, others)], 1 / 5)
    both = kill(faulty, worker=4, start=0)
    assert not both.present_TW[:, 4].any()
    assert not both.present_TW[5, 2]
    with pytest.raises(ValueError, match="there are 6 workers, asked for 6"):
        kill(schedule, worker=6, start=0)


def test_who_keeps_pace_is_no_straggler():
    schedule = pairs(30)
    for time in (0.2, 1.0):
        faulty = stragglers(schedule, constant(time), seed=0)
        assert faulty.steps_TW.all()
        np.testing.assert_array_equal(faulty.weights_TKW, schedule.weights_TKW)


def test_a_late_worker_does_not_send_but_receives():
    schedule, every_W = pairs(60), np.arange(1, 9)
    faulty = stragglers(schedule, lambda rng, worker: every_W[worker], seed=0)
    done_TW = np.arange(1, 61)[:, None] % every_W == 0
    np.testing.assert_array_equal(faulty.steps_TW, done_TW)
    assert faulty.present_TW.all()
    for t in range(60):
        expected = [edge for edge in schedule.edges(t) if done_TW[t, edge[1]]]
        assert faulty.edges(t) == expected


def test_stragglers_step_as_often_as_their_times_allow():
    compute_time, rounds = lognormal(1.5, 1.0), 4000
    faulty = stragglers(pairs(rounds), compute_time, seed=0)
    rng = np.random.default_rng(0)
    rounds_a_step = np.mean([math.ceil(compute_time(rng, 0)) for _ in range(50_000)])
    np.testing.assert_allclose(faulty.steps_TW.mean(axis=0), 1 / rounds_a_step, rtol=0.06)
    assert (faulty.steps_TW[:, 0] != faulty.steps_TW[:, 1]).any()


@pytest.mark.parametrize("time", [0.0, -1.0, math.inf, math.nan])
def test_impossible_times_are_refused(time):
    with pytest.raises(ValueError, match="stragglers: a step must take a positive"):
        stragglers(pairs(5), constant(time), seed=0)


def test_a_slow_link_carries_each_nth_round():
    schedule, period_WW = pairs(200), np.ones((8, 8), int)
    period_WW[3, 5], period_WW[5, 3] = 2, 7  # to worker 3 from worker 5, and back
    faulty = slow_links(schedule, period_WW)
    for t in range(200):
        gone = {(3, 5)} if t % 2 else set()
        gone |= {(5, 3)} if t % 7 else set()
        assert faulty.edges(t) == [edge for edge in schedule.edges(t) if edge[:2] not in gone]
    for periods in (np.zeros((8, 8), int), np.ones((7, 7), int)):
        with pytest.raises(ValueError, match="slow links: periods must be >= 1, one for each pair"):
            slow_links(schedule, periods)
