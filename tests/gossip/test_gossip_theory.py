import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persyn_jax.gossip import (
    Law,
    Rows,
    cycle,
    draw,
    gosgd_schedule,
    shift_bank,
    topologies,
    xor_bank,
)
from persyn_jax.gossip.banks import Bank, bank_of
from persyn_jax.gossip.compose import stretch
from persyn_jax.gossip.graphs import from_matrices
from persyn_jax.gossip.theory import (
    contraction,
    expected_gram,
    expected_matrix,
    predicted_consensus,
    predicted_consensus_of_table,
    rounds_to_exact_consensus,
    second_moment,
    spectral_gap,
)


def random_law(seed, workers, slots=2, rows=3, coin=0.4, means=True) -> tuple[Bank, Law]:
    """Any permutations, any weights by receiver, the exact mean in the first row."""
    rng = np.random.default_rng(seed)
    permutations = [[rng.permutation(workers) for _ in range(slots)] for _ in range(rows)]
    bank, branches_SK = bank_of(np.array(permutations))
    weights_SKW = rng.uniform(0, 1 / slots, (rows, slots, workers))
    weights_SKW[bank.receivers_BW[branches_SK] == np.arange(workers)] = 0  # nothing to oneself
    weights_SKW = np.take_along_axis(weights_SKW, bank.senders_BW[branches_SK], axis=2)
    average_S = np.arange(rows) < means
    return bank, Law(Rows(branches_SK, weights_SKW, average_S), rng.dirichlet(np.ones(rows)), coin)


def uniform_law(bank, weight, coin) -> Law:
    branches_SK = np.arange(1, bank.branches, dtype=np.int32)[:, None]
    weights_SKW = np.full((bank.branches - 1, 1, bank.workers), weight)
    rows = Rows(branches_SK, weights_SKW, np.zeros(bank.branches - 1, bool))
    return Law(rows, np.full(bank.branches - 1, 1 / (bank.branches - 1)), coin)


def random_schedules(rounds=4000):
    yield "gosgd_schedule", topologies.gosgd_schedule(8, rounds, 0.3, seed=0)
    yield "gosgd_schedule, odd", topologies.gosgd_schedule(7, rounds, 0.6, seed=1)
    yield "common_coin", topologies.common_coin(8, rounds, 0.4, seed=2)
    yield "random_shift", topologies.random_shift(7, rounds, seed=3, weight=1 / 3)
    yield "random_xor", topologies.random_xor(8, rounds, seed=4)
    yield "random_matching", topologies.random_matching(6, rounds, seed=5)
    yield "random_matching, odd", topologies.random_matching(7, rounds, seed=6)
    yield "ou_equi_dyn", topologies.ou_equi_dyn(7, rounds, seed=7, weight=0.4)
    yield "any", draw(*random_law(8, 6, means=False), rounds, 8)
    yield "any, means", draw(*random_law(9, 5), rounds, 9)


RANDOM = [pytest.param(schedule, id=name) for name, schedule in random_schedules()]


def every_matrix(bank, law):
    """(probability, W) of all rows and all coins, by walking through the messages."""
    workers = bank.workers
    for s, probability in enumerate(law.probability_S):
        messages = [
            (bank.receivers_BW[law.rows.branches_SK[s, k], sender], sender, k)
            for k in range(law.rows.branches_SK.shape[1])
            for sender in range(workers)
            if bank.receivers_BW[law.rows.branches_SK[s, k], sender] != sender
        ]
        for heads in itertools.product([False, True], repeat=len(messages)):
            matrix_WW = np.eye(workers)
            for (receiver, sender, k), is_sent in zip(messages, heads, strict=True):
                if is_sent:
                    weight = law.rows.weights_SKW[s, k, receiver]
                    matrix_WW[receiver, sender] += weight
                    matrix_WW[receiver, receiver] -= weight
            if law.rows.average_S[s]:
                matrix_WW = matrix_WW @ np.full((workers, workers), 1 / workers)
            chance = law.coin ** sum(heads) * (1 - law.coin) ** (len(heads) - sum(heads))
            yield probability * chance, matrix_WW


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), workers=st.integers(2, 4), coin=st.floats(0, 1))
def test_moments_are_those_of_all_rows_and_all_coins(seed, workers, coin):
    bank, law = random_law(seed, workers, slots=2, rows=2, coin=coin)
    schedule = draw(bank, law, 0, seed)
    factor_WW = np.random.default_rng(seed).normal(size=(workers, workers))
    moment_WW = factor_WW @ factor_WW.T
    centre_WW = np.eye(workers) - 1 / workers
    all_matrices = list(every_matrix(bank, law))

    def mean_of(function):
        return sum(chance * function(matrix_WW) for chance, matrix_WW in all_matrices)

    def close(left, right):
        np.testing.assert_allclose(left, right, atol=1e-12 * max(1, np.abs(right).max()))

    close(expected_matrix(schedule), mean_of(lambda W: W))
    close(expected_gram(schedule), mean_of(lambda W: W.T @ W))
    close(second_moment(schedule, moment_WW), mean_of(lambda W: W @ moment_WW @ W.T))
    spread_WW = mean_of(lambda W: W.T @ centre_WW @ W)
    close(contraction(schedule).mean, np.trace(spread_WW) / (workers - 1))
    close(contraction(schedule).worst, np.linalg.eigvalsh(spread_WW).max())


@pytest.mark.parametrize("bank", [xor_bank(2), xor_bank(16), shift_bank(5), shift_bank(16)])
@pytest.mark.parametrize("weight", [0.0, 1 / 3, 0.5, 1.0])
def test_a_uniform_partner_contracts_by_the_closed_form(bank, weight):
    schedule = draw(bank, uniform_law(bank, weight, 1.0), 1, 0)
    b = weight
    factor = (1 - b) ** 2 + b**2 - 2 * b * (1 - b) / (bank.workers - 1)
    np.testing.assert_allclose(contraction(schedule), [factor, factor, 1], atol=1e-14)
    second = 1 - b - b / (bank.workers - 1)  # E[P] takes x to -x / (W - 1) where the mean is 0
    np.testing.assert_allclose(spectral_gap(schedule), 1 - abs(second), atol=1e-14)


@pytest.mark.parametrize("schedule", RANDOM)
def test_measured_contraction_is_the_predicted_one(schedule):
    workers, predicted = schedule.workers, contraction(schedule)
    centre_WW = np.eye(workers) - 1 / workers
    matrices_TWW = np.array([schedule.pull_matrix(t) for t in range(schedule.rounds)])
    spreads_TWW = matrices_TWW.transpose(0, 2, 1) @ centre_WW @ matrices_TWW
    isotropic_T = np.trace(spreads_TWW, axis1=1, axis2=2) / (workers - 1)
    assert_within_three_errors(isotropic_T, predicted.mean)
    worst_W = np.linalg.eigh(expected_spread(schedule))[1][:, -1]
    worst_T = np.einsum("i,tij,j->t", worst_W, spreads_TWW, worst_W)
    assert_within_three_errors(worst_T, predicted.worst)


def expected_spread(schedule):
    """E[W' Pi W], entry by entry from `second_moment`: trace(Pi E[W C W']) for C = e_i e_j'."""
    workers = schedule.workers
    spread_WW = np.zeros((workers, workers))
    for i, j in itertools.product(range(workers), repeat=2):
        start_WW = np.zeros((workers, workers))
        start_WW[i, j] += 1 / 2
        start_WW[j, i] += 1 / 2
        after_WW = second_moment(schedule, start_WW)
        spread_WW[i, j] = np.trace(after_WW) - workers * after_WW.mean()
    return spread_WW


def assert_within_three_errors(samples, expected):
    error = np.std(samples, ddof=1) / np.sqrt(len(samples))
    assert abs(np.mean(samples) - expected) <= 3 * error + 1e-12


@pytest.mark.parametrize("schedule", RANDOM)
def test_consensus_predicted_by_the_law_is_the_mean_over_tables(schedule):
    rounds, noise = 12, 0.7
    start_WW = np.diag(np.arange(1.0, schedule.workers + 1))
    predicted_T = predicted_consensus(schedule, rounds, noise, start_WW)
    tables = [draw(schedule.bank, schedule.law, rounds, seed) for seed in range(150)]
    samples = np.array([predicted_consensus_of_table(t, noise, start_WW) for t in tables])
    assert predicted_T.shape == (rounds + 1,)
    assert predicted_T[0] == pytest.approx(np.trace(start_WW) * (1 - 1 / schedule.workers))
    for t in (0, 1, 5, rounds):
        assert_within_three_errors(samples[:, t], predicted_T[t])


@pytest.mark.parametrize("sum_weights", [False, True])
def test_consensus_of_a_table_is_what_a_simulation_measures(sum_weights):
    schedule = gosgd_schedule(6, 25, 0.5, seed=5)
    workers, coordinates = 6, 20_000
    rng = np.random.default_rng(0)
    x_WD, alpha_W = np.zeros((workers, coordinates)), np.full(workers, 1 / workers)
    predicted_T = predicted_consensus_of_table(schedule, noise=4.0, sum_weights=sum_weights)
    for t in range(schedule.rounds):
        x_WD = x_WD + 2 * rng.normal(size=x_WD.shape)
        pushed_WD, pushed_W = x_WD.copy(), alpha_W.copy()
        for receiver, sender, weight in schedule.edges(t):
            if not sum_weights:
                x_WD[receiver] += weight * (pushed_WD[sender] - pushed_WD[receiver])
        if sum_weights:  # Algorithm 2: halve and push, then merge
            kept_W = alpha_W.copy()
            for _, sender, _ in schedule.edges(t):
                kept_W[sender] = pushed_W[sender] / 2
            alpha_W = kept_W.copy()
            for receiver, sender, _ in schedule.edges(t):
                half = pushed_W[sender] / 2
                alpha_W[receiver] = half + kept_W[receiver]
                x_WD[receiver] = (half * pushed_WD[sender] + kept_W[receiver] * x_WD[receiver]) / (
                    alpha_W[receiver]
                )
        assert_within_three_errors(workers * x_WD.var(axis=0), predicted_T[t + 1])


def test_consensus_without_exchange_and_with_a_mean_each_fifth_round():
    silent = gosgd_schedule(8, 20, 0.0, seed=0)
    np.testing.assert_allclose(predicted_consensus(silent, 20, noise=3.0), 3 * 7 * np.arange(21.0))
    rows = Rows(np.zeros((5, 1), np.int32), np.zeros((5, 1, 8)), np.arange(5) == 4)
    averaged = cycle(xor_bank(8), rows, 10)
    expected_T = 7.0 * (np.arange(18) % 5)
    np.testing.assert_allclose(predicted_consensus(averaged, 17), expected_T, atol=1e-12)
    np.testing.assert_allclose(predicted_consensus_of_table(averaged), expected_T[:11], atol=1e-12)
    assert contraction(averaged) == (0, 0, 5)
    assert rounds_to_exact_consensus(averaged) == 5


def test_workers_that_do_not_step_get_no_noise():
    schedule = gosgd_schedule(4, 3, 0.0, seed=0)
    schedule.steps_TW[1] = [True, False, False, False]
    np.testing.assert_allclose(predicted_consensus_of_table(schedule), [0, 3, 3 + 3 / 4, 6.75])


@pytest.mark.parametrize("workers", [3, 4, 8, 15])
def test_ring_by_its_fourier_modes(workers):
    modes = (1 + 2 * np.cos(2 * np.pi * np.arange(1, workers) / workers)) / 3
    schedule = topologies.ring(workers, rounds=300)
    assert spectral_gap(schedule) == pytest.approx(1 - np.abs(modes).max())
    factors = contraction(schedule)
    np.testing.assert_allclose(factors, [np.mean(modes**2), (modes**2).max(), 1], atol=1e-14)
    assert rounds_to_exact_consensus(schedule) == (1 if workers == 3 else None)


@pytest.mark.parametrize(
    ("make", "workers"),
    [
        (topologies.one_peer_exponential, 16),
        (topologies.hypercube, 8),
        (lambda workers, rounds: topologies.base_k_plus_1(workers, rounds, degree=1), 7),
        (lambda workers, rounds: topologies.base_k_plus_1(workers, rounds, degree=2), 25),
        (topologies.complete, 5),
    ],
)
def test_finite_time_schedules(make, workers):
    period = make(workers, 1).period
    schedule = make(workers, period + 3)
    product_WW = np.eye(workers)
    for t in range(period):
        assert rounds_to_exact_consensus(make(workers, t)) is None
        product_WW = schedule.pull_matrix(t) @ product_WW
    np.testing.assert_allclose(product_WW, 1 / workers, atol=1e-14)
    assert rounds_to_exact_consensus(schedule) == period
    assert contraction(schedule) == (0, 0, period)
    assert spectral_gap(schedule) == 1
    mean_WW = sum(schedule.pull_matrix(t) for t in range(period)) / period
    np.testing.assert_allclose(expected_matrix(schedule), mean_WW, atol=1e-15)


def test_never_exact_however_many_rounds():
    # After 500 rounds nothing is left in float64, but no round has made it exact.
    assert rounds_to_exact_consensus(topologies.ring(8, 500)) is None
    assert rounds_to_exact_consensus(topologies.one_peer_exponential(6, 500)) is None


def test_agreement_on_something_else_is_not_the_mean():
    everyone_takes_worker_0 = np.zeros((3, 3))
    everyone_takes_worker_0[:, 0] = 1
    schedule = from_matrices([everyone_takes_worker_0], 4)
    assert contraction(schedule) == (0, 0, 1)
    assert rounds_to_exact_consensus(schedule) is None


def test_factors_per_round_are_geometric_means():
    factors = contraction(topologies.one_peer_exponential(6, 3))
    product_WW = np.linalg.multi_dot(
        [topologies.one_peer_exponential(6, 3).pull_matrix(t) for t in (2, 1, 0)]
    )
    deviation_WW = product_WW - 1 / 6
    assert factors.rounds == 3
    assert factors.worst == pytest.approx(np.linalg.norm(deviation_WW, 2) ** 2)
    assert factors.worst_per_round**3 == pytest.approx(factors.worst)
    assert factors.mean == pytest.approx(np.linalg.norm(deviation_WW) ** 2 / 5)
    assert factors.mean_per_round**3 == pytest.approx(factors.mean)


def test_a_table_without_law_or_period_is_the_mean_over_its_rounds():
    schedule = topologies.random_xor(8, 200, seed=0)
    stretched = stretch(schedule, 2)  # each second round does nothing, and there is no law
    by_law, by_table = contraction(schedule), contraction(stretched)
    assert by_table.rounds == 1
    assert by_table.mean == pytest.approx((by_law.mean + 1) / 2)
    assert spectral_gap(topologies.random_pull(9, 4000, seed=0)) == pytest.approx(
        1 / 2 * (1 + 1 / 8), abs=0.05
    )
    twice_T = predicted_consensus(stretched, 800)
    np.testing.assert_allclose(twice_T[:401], predicted_consensus_of_table(stretched))


def test_a_worker_alone_is_in_consensus():
    alone = gosgd_schedule(1, 3, 1.0, seed=0)
    assert contraction(alone) == (0, 0, 1)
    assert spectral_gap(alone) == 1
    assert rounds_to_exact_consensus(alone) == 0
    np.testing.assert_array_equal(predicted_consensus(alone, 3), np.zeros(4))


def test_a_table_shorter_than_its_period_is_refused():
    with pytest.raises(ValueError, match="a table of 2 rounds does not hold its period of 4"):
        contraction(topologies.one_peer_exponential(16, 2))
