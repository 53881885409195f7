import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.gossip import (
    Bank,
    Schedule,
    expected_gosgd_matrix,
    gosgd_schedule,
    shift_bank,
    xor_bank,
)

BANKS = [xor_bank(w) for w in (1, 2, 4, 8, 16)] + [shift_bank(w) for w in range(1, 10)]


@pytest.mark.parametrize("bank", BANKS, ids=lambda bank: f"{bank.workers}")
def test_over_the_branches_everyone_sends_to_everyone_exactly_once(bank):
    sends = [(sender, receiver) for row in bank.receivers for sender, receiver in enumerate(row)]
    assert sorted(sends) == list(itertools.product(range(bank.workers), repeat=2))
    assert bank.receivers[0] == tuple(range(bank.workers))
    assert all(
        receiver != sender for row in bank.receivers[1:] for sender, receiver in enumerate(row)
    )


@given(
    workers=st.integers(1, 9),
    rounds=st.integers(0, 40),
    more=st.integers(0, 40),
    probability=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_a_longer_schedule_begins_with_the_shorter_one(workers, rounds, more, probability, seed):
    short = gosgd_schedule(workers, rounds, probability, seed)
    long = gosgd_schedule(workers, rounds + more, probability, seed)
    np.testing.assert_array_equal(short.branches_T, long.branches_T[:rounds])
    np.testing.assert_array_equal(short.push_TW, long.push_TW[:rounds])


def test_another_seed_is_another_schedule():
    one, other = (gosgd_schedule(8, 100, 0.5, seed) for seed in (0, 1))
    assert (one.push_TW != other.push_TW).any()
    assert (one.branches_T != other.branches_T).any()


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("probability", [0.02, 0.4])
def test_coins_are_independent_and_fall_at_the_asked_rate(workers, probability):
    rounds = 20_000
    push_TW = gosgd_schedule(workers, rounds, probability, seed=3).push_TW
    five_sigma = 5 * np.sqrt(probability * (1 - probability) / rounds)
    np.testing.assert_allclose(push_TW.mean(axis=0), probability, atol=five_sigma)
    # A common coin would give a mean of p; independent ones give p^2.
    both = (push_TW[:, 0] & push_TW[:, 1]).mean()
    assert abs(both - probability**2) < 5 * np.sqrt(probability**2 / rounds)


@pytest.mark.parametrize("workers", [2, 5, 8])
def test_receivers_are_uniform_over_the_others_and_branch_0_means_no_coin(workers):
    schedule = gosgd_schedule(workers, 20_000, 0.3, seed=4)
    np.testing.assert_array_equal(schedule.branches_T == 0, ~schedule.push_TW.any(axis=1))
    counts = np.bincount(schedule.branches_T, minlength=workers)[1:]
    share = 1 / (workers - 1)
    five_sigma = 5 * np.sqrt(share / counts.sum())
    np.testing.assert_allclose(counts / counts.sum(), share, atol=five_sigma)


def test_rounds_are_rows_of_the_table():
    schedule = gosgd_schedule(4, 30, 0.5, seed=0)
    for t in range(30):
        row = schedule.round(t)
        assert (row.branch.dtype, row.push_W.dtype) == (np.int32, np.bool_)
        assert row.branch == schedule.branches_T[t]
        np.testing.assert_array_equal(row.push_W, schedule.push_TW[t])
    assert schedule.messages().sum() == schedule.push_TW.sum()


def test_extremes():
    assert gosgd_schedule(4, 50, 0.0, seed=0).messages().sum() == 0
    assert (gosgd_schedule(4, 50, 1.0, seed=0).messages() == 4).all()
    alone = gosgd_schedule(1, 50, 1.0, seed=0)
    assert alone.messages().sum() == 0
    assert (alone.branches_T == 0).all()
    np.testing.assert_array_equal(alone.mixing_matrix(0, np.ones(1)), [[1.0]])
    np.testing.assert_array_equal(expected_gosgd_matrix(0.5, np.ones(1)), [[1.0]])


@given(workers=st.integers(2, 8), probability=st.floats(0.05, 1), seed=st.integers(0, 2**31))
def test_matrices_average_and_conserve_the_weighted_sum(workers, probability, seed):
    schedule = gosgd_schedule(workers, 30, probability, seed)
    weights = schedule.sum_weights()
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
    for t in range(30):
        matrix_WW = schedule.mixing_matrix(t, weights[t])
        assert (matrix_WW >= 0).all()
        np.testing.assert_allclose(matrix_WW.sum(axis=1), 1, rtol=1e-12)
        # alpha' K x = alpha x for every x: a push moves mass and makes none.
        np.testing.assert_allclose(weights[t + 1] @ matrix_WW, weights[t], rtol=1e-12)


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_expected_matrix_is_the_mean_over_all_coins_and_permutations(workers):
    p = 0.3
    sum_weight_W = np.random.default_rng(0).dirichlet(np.ones(workers))
    bank = shift_bank(workers)
    mean_WW = np.zeros((workers, workers))
    for coins in itertools.product([False, True], repeat=workers):
        probability = p ** sum(coins) * (1 - p) ** (workers - sum(coins))
        branches_T = np.arange(1, workers, dtype=np.int32)
        schedule = Schedule(bank, branches_T, np.tile(coins, (workers - 1, 1)))
        for t in range(workers - 1):
            matrix_WW = schedule.mixing_matrix(t, sum_weight_W)
            mean_WW += probability / (workers - 1) * matrix_WW
    np.testing.assert_allclose(expected_gosgd_matrix(p, sum_weight_W), mean_WW, atol=1e-14)


@pytest.mark.parametrize("bank", [xor_bank(8), shift_bank(5)], ids=["xor", "shift"])
def test_when_all_push_consensus_contracts_as_theory_says(bank):
    # K = (1-b) I + b P with uniform receivers: E||Kx - mean||^2 = lambda ||x - mean||^2,
    # lambda = (1-b)^2 + b^2 - 2b(1-b)/(M-1); here b = 1/2.
    workers = bank.workers
    x_W = np.random.default_rng(1).normal(size=workers)
    branches_T = np.arange(1, workers, dtype=np.int32)
    schedule = Schedule(bank, branches_T, np.ones((workers - 1, workers), bool))
    equal_W = np.full(workers, 1 / workers)
    mixed_TW = np.stack([schedule.mixing_matrix(t, equal_W) @ x_W for t in range(workers - 1)])
    measured = mixed_TW.var(axis=1).mean() / x_W.var()
    np.testing.assert_allclose(measured, (workers - 2) / (2 * (workers - 1)), rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: xor_bank(6), "power of two, got 6"),
        (lambda: xor_bank(0), "power of two, got 0"),
        (lambda: shift_bank(0), "at least 1, got 0"),
        (lambda: Bank(()), "branch 0 must be the identity"),
        (lambda: Bank(((1, 0),)), "branch 0 must be the identity"),
        (lambda: Bank(((0, 1), (1, 1))), "branch 1 must permute 2 workers"),
        (lambda: Bank(((0, 1), (1, 0, 2))), "branch 1 must permute 2 workers"),
        (lambda: gosgd_schedule(4, 10, 1.5, 0), r"\[0, 1\], got 1.5"),
        (lambda: gosgd_schedule(4, 10, float("nan"), 0), r"\[0, 1\], got nan"),
        (lambda: gosgd_schedule(4, -1, 0.5, 0), "not be negative, got -1"),
        (lambda: gosgd_schedule(0, 10, 0.5, 0), "at least 1, got 0"),
        (lambda: gosgd_schedule(4, 10, 0.5, 0).round(10), "10 rounds, asked for round 10"),
        (lambda: gosgd_schedule(4, 10, 0.5, 0).round(-1), "asked for round -1"),
        (lambda: Schedule(xor_bank(2), np.array([2]), np.ones((1, 2), bool)), r"in \[0, 2\)"),
        (lambda: Schedule(xor_bank(2), np.array([0]), np.ones((1, 3), bool)), "must be"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
