import itertools
import math

import numpy as np
import pytest
from gossip_matrices import matrices, mean, shift_matrix

from persyn_jax.gossip import topologies as topo

# EquiTopo.


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("draws", [1, 4, 50])
def test_equi_static_is_a_mean_of_cyclic_shifts(workers, draws):
    # W = (1/M) sum_m A(a_m), A(a) = I / n + (1 - 1/n) P^a: circulant, and n W / (n - 1) off the
    # diagonal counts draws.
    for make, unit in ((topo.d_equi_static, draws), (topo.u_equi_static, 2 * draws)):
        W_WW = make(workers, 1, draws, seed=5).pull_matrix(0)
        np.testing.assert_allclose(np.roll(W_WW, 1, axis=(0, 1)), W_WW, atol=1e-14)
        np.testing.assert_allclose(np.diag(W_WW), 1 / workers)
        if workers > 1:
            counts = W_WW[0, 1:] * workers / (workers - 1) * unit
            np.testing.assert_allclose(counts, counts.round(), atol=1e-10)
            assert counts.sum().round() == unit


@pytest.mark.parametrize("make", [topo.d_equi_static, topo.u_equi_static])
@pytest.mark.parametrize("workers", [8, 32])
def test_equi_static_keeps_its_promise(make, workers):
    draws = topo.equi_static_draws(workers, rate=0.5, failure_probability=0.5)
    norms = [
        np.linalg.norm(make(workers, 1, draws, seed).pull_matrix(0) - mean(workers), 2)
        for seed in range(40)
    ]
    assert np.mean(np.array(norms) < 0.5) >= 0.5
    assert max(norms) > 0.05, "it is not simply the complete graph"


def test_equi_static_draws_by_the_formula():
    # 8 ln(2 n / p) / (3 eps^2), rounded up: 8 ln(320) / 0.75 = 61.53.
    assert topo.equi_static_draws(16, rate=0.5, failure_probability=0.1) == 62


@pytest.mark.parametrize("workers", [2, 5, 8, 9])
def test_ou_equi_dyn_pairs_greedily_along_a_shift(workers):
    expected = set()
    for shift, start in itertools.product(range(1, workers), range(workers)):
        free, pairs = set(range(workers)), set()
        for i in [*range(start, workers), *range(start)]:
            if {i, (i + shift) % workers} <= free:
                pairs.add(frozenset({i, (i + shift) % workers}))
                free -= {i, (i + shift) % workers}
        expected.add(frozenset(pairs))
    schedule = topo.ou_equi_dyn(workers, 1, seed=0)
    receivers_BW = schedule.bank.receivers_BW[np.unique(schedule.law.rows.branches_SK)]
    assert {
        frozenset(frozenset({i, j}) for i, j in enumerate(receivers_W) if i != j)
        for receivers_W in receivers_BW.tolist()
    } == expected


def test_ou_equi_dyn_of_16_workers_contracts_as_the_authors():
    # At eta = 1/2, over all (a, s), with the authors' own program: lambda, and the idle share.
    schedule = topo.ou_equi_dyn(16, 1, seed=0, weight=0.5 * 15 / 16)
    gram_WW = sum(W.T @ W * p for W, p in law_matrices(schedule))
    assert np.linalg.norm(gram_WW - mean(16), 2) == pytest.approx(0.5411393, abs=1e-7)
    idle = (schedule.law.rows.weights_SKW == 0).mean(axis=(1, 2))
    assert idle @ schedule.law.probability_S == pytest.approx(0.1)


# Random schedules and their laws.

RANDOM = {
    "random_shift": (topo.random_shift, range(1, 21)),
    "random_matching": (topo.random_matching, range(1, 21)),
    "random_xor": (topo.random_xor, (1, 2, 4, 8, 16)),
    "ou_equi_dyn": (topo.ou_equi_dyn, range(1, 9)),
    "common_coin": (lambda w, t, s: topo.common_coin(w, t, 0.3, s), range(1, 10)),
}


def law_matrices(schedule):
    """(matrix, probability) of each row of the law, edge by edge; for coins that always land."""
    assert schedule.law.coin == 1
    rows, bank = schedule.law.rows, schedule.bank
    for branches_K, weights_KW, p in zip(
        rows.branches_SK, rows.weights_SKW, schedule.law.probability_S, strict=True
    ):
        W_WW = np.eye(bank.workers)
        for branch, weights_W in zip(branches_K, weights_KW, strict=True):
            for sender, receiver in enumerate(bank.receivers_BW[branch]):
                W_WW[receiver, sender] += weights_W[receiver]
                W_WW[receiver, receiver] -= weights_W[receiver]
        yield W_WW, p


@pytest.mark.parametrize("name", RANDOM)
def test_draws_follow_the_law(name):
    make, takes = RANDOM[name]
    rounds = 2000
    for workers in (w for w in takes if w in (1, 4, 5)):
        schedule = make(workers, rounds, 11)
        expected = {}
        for W_WW, p in law_matrices(schedule):
            expected[W_WW.tobytes()] = expected.get(W_WW.tobytes(), 0) + p
        drawn = [W_WW.tobytes() for W_WW in matrices(schedule)]
        assert set(drawn) <= set(expected)
        assert sum(expected.values()) == pytest.approx(1)
        for matrix, p in expected.items():
            five_sigma = 5 * np.sqrt(p * (1 - p) / rounds)
            assert abs(drawn.count(matrix) / rounds - p) <= five_sigma + 1e-12


@pytest.mark.parametrize(
    ("name", "heard"),
    [
        # The share of rounds in which a worker hears somebody.
        ("random_shift", lambda w: 1),
        ("random_xor", lambda w: 1),
        ("random_matching", lambda w: 1 if w % 2 == 0 else (w - 1) / w),
        ("common_coin", lambda w: 0.3),
    ],
)
def test_everyone_hears_everyone_else_equally_often(name, heard):
    make, takes = RANDOM[name]
    for workers in takes:
        if workers == 1:
            continue
        mean_WW = sum(W_WW * p for W_WW, p in law_matrices(make(workers, 1, 0)))
        off_diagonal = mean_WW[~np.eye(workers, dtype=bool)]
        np.testing.assert_allclose(off_diagonal, heard(workers) / 2 / (workers - 1), rtol=1e-12)


@pytest.mark.parametrize("workers", range(2, 12))
def test_round_robin_matchings_meet_every_pair_once(workers):
    schedule = topo.random_matching(workers, 1, 0)
    meetings = [
        frozenset({i, j})
        for receivers_W in schedule.bank.receivers_BW[1:].tolist()
        for i, j in enumerate(receivers_W)
        if i < j
    ]
    assert len(meetings) == math.comb(workers, 2)
    assert set(meetings) == {frozenset(pair) for pair in itertools.combinations(range(workers), 2)}
    idle = (schedule.bank.receivers_BW[1:] == np.arange(workers)).sum(axis=1)
    assert (idle == workers % 2).all()


@pytest.mark.parametrize("name", ["random_shift", "random_matching", "random_xor"])
def test_all_uniform_families_contract_alike(name):
    # lambda = (1-b)^2 + b^2 - 2 b (1-b) / (M-1) at b = 1/2, an even number of workers.
    workers = 8
    gram_WW = sum(W.T @ W * p for W, p in law_matrices(RANDOM[name][0](workers, 1, 0)))
    expected = (workers - 2) / (2 * (workers - 1))
    np.testing.assert_allclose(np.linalg.norm(gram_WW - mean(workers), 2), expected, rtol=1e-12)


def test_weight_of_a_random_shift_is_od_equi_dyn():
    # W = (1 - eta) I + eta A(a), A(a) = I / n + (n - 1) / n P^a.
    workers, eta = 5, 0.8
    schedule = topo.random_shift(workers, 20, seed=3, weight=eta * (workers - 1) / workers)
    possible = [
        (1 - eta) * np.eye(workers)
        + eta * (np.eye(workers) / workers + (1 - 1 / workers) * shift_matrix(workers, a))
        for a in range(1, workers)
    ]
    for W_WW in matrices(schedule):
        assert any(np.allclose(W_WW, matrix, atol=1e-14) for matrix in possible)


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_a_common_coin_moves_all_or_nobody(probability):
    rounds = 4000
    messages = topo.common_coin(6, rounds, probability, seed=1).messages()
    assert set(messages.tolist()) <= {0, 6}
    five_sigma = 5 * np.sqrt(probability * (1 - probability) / rounds)
    assert abs((messages == 6).mean() - probability) <= five_sigma


@pytest.mark.parametrize("workers", [2, 5, 8])
def test_random_pull_reads_one_uniform_other_each_independently(workers):
    rounds = 4000
    W_TWW = matrices(topo.random_pull(workers, rounds, seed=2, weight=0.25))
    off_TWW = W_TWW * ~np.eye(workers, dtype=bool)
    np.testing.assert_array_equal((off_TWW > 0).sum(axis=2), 1)
    assert set(off_TWW.ravel().tolist()) == {0, 0.25}
    share = 1 / (workers - 1)
    five_sigma = 5 * np.sqrt(share * (1 - share) / rounds)
    read_WW = (off_TWW > 0).mean(axis=0)[~np.eye(workers, dtype=bool)]
    np.testing.assert_allclose(read_WW, share, atol=five_sigma + 1e-12)
    if workers > 2:  # workers 0 and 1 read the same third one as often as independence says
        same = ((off_TWW[:, 0] > 0) & (off_TWW[:, 1] > 0)).any(axis=1).mean()
        expected = (workers - 2) * share**2
        assert abs(same - expected) <= 5 * np.sqrt(expected / rounds)
