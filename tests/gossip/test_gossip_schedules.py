"""Banks and tables: what they say, and what they refuse."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from gossip_cases import random_schedule
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.gossip import (
    Bank,
    Dense,
    Law,
    Rows,
    bank_of,
    cycle,
    draw,
    gosgd_schedule,
    shift_bank,
    xor_bank,
)
from persyn_jax.gossip.schedules import packed

BANKS = [xor_bank(w) for w in (1, 2, 4, 8, 16)] + [shift_bank(w) for w in range(1, 10)]


# Banks.


@pytest.mark.parametrize("bank", BANKS, ids=lambda bank: f"{bank.workers}")
def test_over_the_branches_everyone_sends_to_everyone_exactly_once(bank):
    sends = [(sender, receiver) for row in bank.receivers_BW for sender, receiver in enumerate(row)]
    assert sorted(sends) == list(itertools.product(range(bank.workers), repeat=2))
    np.testing.assert_array_equal(bank.receivers_BW[0], np.arange(bank.workers))
    for receivers_W, senders_W in zip(bank.receivers_BW, bank.senders_BW, strict=True):
        np.testing.assert_array_equal(senders_W[receivers_W], np.arange(bank.workers))


@pytest.mark.parametrize(
    ("make", "receiver", "workers"),
    [
        (xor_bank, np.bitwise_xor, 128),
        (xor_bank, np.bitwise_xor, 256),
        (shift_bank, lambda w, k: (w + k) % 100, 100),
        (shift_bank, lambda w, k: (w + k) % 65, 65),
    ],
)
def test_large_banks_are_made_of_two_small_ones(make, receiver, workers):
    bank = make(workers)
    w, k = np.arange(workers), np.arange(workers)[:, None]
    np.testing.assert_array_equal(bank.receivers_BW[:workers], receiver(w, k))
    high, low = bank.digits
    assert high.branches + low.branches < 3 * np.sqrt(workers)
    for branch in range(workers):
        one_after_the_other = high.receivers_BW[branch // low.branches][
            low.receivers_BW[branch % low.branches]
        ]
        np.testing.assert_array_equal(bank.receivers_BW[branch], one_after_the_other)


@given(st.integers(1, 7), st.integers(0, 6), st.integers(0, 2**31))
def test_the_bank_of_permutations_has_each_of_them_once(workers, count, seed):
    rng = np.random.default_rng(seed)
    permutations = np.array([rng.permutation(workers) for _ in range(2 * count)], np.int32)
    permutations = permutations.reshape(count, 2, workers)
    bank, branches = bank_of(permutations)
    np.testing.assert_array_equal(bank.receivers_BW[branches], permutations)
    np.testing.assert_array_equal(bank.receivers_BW[0], np.arange(workers))
    assert len(np.unique(bank.receivers_BW, axis=0)) == bank.branches


# Tables and their matrices.


def equal_weights(schedule):
    return np.full(schedule.workers, 1 / schedule.workers)


tables = st.builds(
    random_schedule,
    bank=st.sampled_from([xor_bank(4), shift_bank(5), shift_bank(8)]),
    rounds=st.just(6),
    slots=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    dropped=st.floats(0, 0.5),
    average=st.floats(0, 0.5),
    absent=st.floats(0, 0.5),
)


@given(tables)
def test_matrices_move_what_the_edges_say(schedule):
    """Both readings of a row, edge by edge, after the mean of those who are there."""
    eye_WW = np.eye(schedule.workers)
    for t in range(schedule.rounds):
        pull_WW, push_WW, mean_WW = eye_WW.copy(), eye_WW.copy(), eye_WW.copy()
        for receiver, sender, weight in schedule.edges(t):
            pull_WW[receiver] += weight * (eye_WW[sender] - eye_WW[receiver])
            push_WW[:, sender] += weight * (eye_WW[receiver] - eye_WW[sender])
        present_W = schedule.present_TW[t]
        if schedule.average_T[t] and present_W.any():
            mean_WW[present_W] = present_W / present_W.sum()
        np.testing.assert_allclose(schedule.pull_matrix(t), pull_WW @ mean_WW, atol=1e-12)
        np.testing.assert_allclose(schedule.push_matrix(t), push_WW @ mean_WW, atol=1e-12)
        assert len(schedule.edges(t)) == schedule.messages()[t]


@given(tables)
def test_sum_weight_matrices_average_and_conserve_the_weighted_sum(schedule):
    weights_TW = schedule.sum_weights()
    np.testing.assert_allclose(weights_TW.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_array_equal(weights_TW[0], equal_weights(schedule))
    for t in range(schedule.rounds):
        matrix_WW = schedule.sum_weight_matrix(t, weights_TW[t])
        assert (matrix_WW >= 0).all()
        np.testing.assert_allclose(matrix_WW.sum(axis=1), 1, rtol=1e-12)
        # alpha' K x = alpha x for every x: a push moves mass and makes none.
        np.testing.assert_allclose(weights_TW[t + 1] @ matrix_WW, weights_TW[t], atol=1e-12)


@given(tables)
def test_the_matrix_mode_says_the_same(schedule):
    dense = schedule.dense()
    assert dense.bank == Dense(schedule.workers)
    assert dense.dense() is dense
    for t in range(schedule.rounds):
        np.testing.assert_allclose(dense.pull_matrix(t), schedule.pull_matrix(t), atol=1e-12)
        np.testing.assert_allclose(dense.push_matrix(t), schedule.push_matrix(t), atol=1e-12)
        assert {edge[:2] for edge in dense.edges(t)} == {edge[:2] for edge in schedule.edges(t)}
    for name in ("average_T", "sync_T", "steps_TW", "present_TW"):
        np.testing.assert_array_equal(getattr(dense, name), getattr(schedule, name))


def test_rounds_are_rows_of_the_table():
    schedule = random_schedule(shift_bank(4), 30, 2, seed=0, average=0.3, absent=0.2, late=0.2)
    table = schedule.table()
    np.testing.assert_array_equal(table.index, np.arange(30))
    for t in range(30):
        row = schedule.round(t)
        for name in row._fields:
            np.testing.assert_array_equal(getattr(row, name), getattr(table, name)[t])
        assert (row.index.dtype, row.branch_K.dtype) == (np.int32, np.int32)
        np.testing.assert_array_equal(row.weight_KW, schedule.weights_TKW[t])
        np.testing.assert_array_equal(row.present_W, schedule.present_TW[t])
        np.testing.assert_array_equal(row.steps_W, schedule.steps_TW[t])
        assert (row.sync, row.average) == (schedule.sync_T[t], schedule.average_T[t])


# Schedules that repeat, and schedules that are drawn.

ROWS = Rows(
    branches_SK=np.array([[1, 2], [3, 0], [0, 2]], np.int32),
    weights_SKW=np.random.default_rng(0).uniform(0.1, 0.5, (3, 2, 4)),
    average_S=np.array([False, True, False]),
)


def test_slots_in_use_come_first_and_unused_ones_are_the_identity():
    weights_SKW = ROWS.weights_SKW.copy()
    weights_SKW[0, 0] = weights_SKW[1, 1] = weights_SKW[2, 0] = 0
    rows = packed(ROWS._replace(weights_SKW=weights_SKW))
    np.testing.assert_array_equal(rows.branches_SK, [[2, 0], [3, 0], [2, 0]])
    np.testing.assert_array_equal(rows.weights_SKW[0], [weights_SKW[0, 1], np.zeros(4)])


@pytest.mark.parametrize("rounds", [0, 1, 3, 8])
def test_a_cycle_repeats_its_rows(rounds):
    schedule = cycle(shift_bank(4), ROWS, rounds)
    assert schedule.rounds == rounds
    assert schedule.period == 3
    for t in range(rounds):
        np.testing.assert_array_equal(schedule.weights_TKW[t], packed(ROWS).weights_SKW[t % 3])
        assert schedule.average_T[t] == ROWS.average_S[t % 3]


def test_rows_are_drawn_with_their_probabilities():
    law = Law(packed(ROWS), np.array([0.5, 0.3, 0.2]), coin=1.0)
    schedule = draw(shift_bank(4), law, 20_000, seed=3)
    first_T = schedule.branches_TK[:, 0]
    shares = [(first_T == branch).mean() for branch in packed(ROWS).branches_SK[:, 0]]
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.02)
    np.testing.assert_allclose(schedule.average_T.mean(), 0.3, atol=0.02)


def test_every_message_has_a_coin_of_its_own():
    rows = Rows(np.array([[1, 2]], np.int32), np.full((1, 2, 4), 0.5), np.zeros(1, bool))
    schedule = draw(shift_bank(4), Law(rows, np.ones(1), coin=0.3), 20_000, seed=3)
    # Slots may have changed places, where all four messages of the first were lost.
    sent_TKW = np.stack(
        [
            ((schedule.branches_TK == branch)[:, :, None] & (schedule.weights_TKW > 0)).any(axis=1)
            for branch in (1, 2)
        ],
        axis=1,
    )
    coins_TN = sent_TKW.reshape(len(sent_TKW), 8).astype(float)
    np.testing.assert_allclose(coins_TN.mean(axis=0), 0.3, atol=0.02)
    covariance_NN = np.cov(coins_TN.T)
    np.testing.assert_allclose(covariance_NN, 0.21 * np.eye(8), atol=0.01)


def test_another_seed_is_another_schedule():
    one, other = (gosgd_schedule(8, 100, 0.5, seed) for seed in (0, 1))
    assert (one.weights_TKW != other.weights_TKW).any()
    assert (one.branches_TK != other.branches_TK).any()


@given(
    rounds=st.integers(0, 20),
    more=st.integers(0, 20),
    coin=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_a_longer_schedule_begins_with_the_shorter_one(rounds, more, coin, seed):
    law = Law(packed(ROWS), np.array([0.5, 0.3, 0.2]), coin)
    short, long = (draw(shift_bank(4), law, T, seed) for T in (rounds, rounds + more))
    np.testing.assert_array_equal(short.branches_TK, long.branches_TK[:rounds])
    np.testing.assert_array_equal(short.weights_TKW, long.weights_TKW[:rounds])


# What is refused.

GOOD = random_schedule(xor_bank(4), 3, 2, seed=0)


def greedy(weight):
    """Two slots of `weight` each: everyone takes and gives twice as much."""
    rows = Rows(np.array([[1, 2]], np.int32), np.full((1, 2, 4), weight), np.zeros(1, bool))
    return cycle(xor_bank(4), rows, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: xor_bank(6), "power of two, got 6"),
        (lambda: xor_bank(0), "power of two, got 0"),
        (lambda: shift_bank(0), "at least 1, got 0"),
        (lambda: Bank(np.zeros((0, 3), np.int32)), r"must be \[B, W\], got \(0, 3\)"),
        (lambda: Bank(np.array([[1, 0]])), "branch 0 must be the identity"),
        (lambda: Bank(np.array([[0, 1], [1, 1]])), "branch 1 must permute 2 workers"),
        (
            lambda: Bank(
                shift_bank(4).receivers_BW, digits=(xor_bank(4), Bank(np.arange(4)[None]))
            ),
            "digits do not compose",
        ),
        (lambda: gosgd_schedule(4, 10, 1.5, 0), r"\[0, 1\], got 1.5"),
        (lambda: gosgd_schedule(4, 10, float("nan"), 0), r"\[0, 1\], got nan"),
        (lambda: gosgd_schedule(4, -1, 0.5, 0), "not be negative, got -1"),
        (lambda: GOOD.round(3), "3 rounds, asked for round 3"),
        (lambda: GOOD.round(-1), "asked for round -1"),
        (lambda: replace(GOOD, bank=xor_bank(8)), "weights of 4 workers, a bank of 8"),
        (lambda: replace(GOOD, sync_T=GOOD.sync_T[:2]), r"sync_T must be \(3,\), got \(2,\)"),
        (lambda: replace(GOOD, branches_TK=GOOD.branches_TK + 4), r"branches must lie in \[0, 4\)"),
        (lambda: replace(GOOD, weights_TKW=-GOOD.weights_TKW), r"weights must lie in \[0, 1\]"),
        (lambda: greedy(float("nan")), r"weights must lie in \[0, 1\]"),
        (
            lambda: greedy(0.75).pull_matrix(0),
            "in round 0 worker 0 takes 1.5 of a model, at most 1",
        ),
        (
            lambda: greedy(0.75).push_matrix(0),
            "in round 0 worker 0 gives 1.5 of a model, at most 1",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
