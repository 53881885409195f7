import itertools
import math

import numpy as np
import pytest
from gossip_matrices import matrices, mean, product, shift_matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from persyn_jax.gossip import topologies as topo
from persyn_jax.gossip.banks import is_power_of_two

ANY = range(1, 21)
POWERS = (1, 2, 4, 8, 16)

# Each schedule of some workers, rounds and seed, for all numbers of workers it takes.
SYMMETRIC = {
    "common_coin": (lambda w, t, s: topo.common_coin(w, t, 0.5, s), POWERS),
    "random_matching": (topo.random_matching, ANY),
    "random_xor": (topo.random_xor, POWERS),
    "ou_equi_dyn": (topo.ou_equi_dyn, ANY),
    "ring": (lambda w, t, s: topo.ring(w, t), ANY),
    "torus": (lambda w, t, s: topo.torus(3, w, t), ANY),
    "hypercube": (lambda w, t, s: topo.hypercube(w, t), POWERS),
    "base_2": (lambda w, t, s: topo.base_k_plus_1(w, t, 1), ANY),
    "base_4": (lambda w, t, s: topo.base_k_plus_1(w, t, 3), ANY),
    "u_equi_static": (lambda w, t, s: topo.u_equi_static(w, t, 4, s), ANY),
    "complete": (lambda w, t, s: topo.complete(w, t), ANY),
    "complete_by_edges": (lambda w, t, s: topo.complete_by_edges(w, t), ANY),
    "star": (lambda w, t, s: topo.star(w, t), ANY),
    "silent": (lambda w, t, s: topo.silent(w, t), ANY),
    "local_sgd": (lambda w, t, s: topo.local_sgd_schedule(w, t, 3), ANY),
}
DOUBLY_STOCHASTIC = SYMMETRIC | {
    "common_coin, shifts": (lambda w, t, s: topo.common_coin(w, t, 0.5, s), ANY),
    "random_shift": (topo.random_shift, ANY),
    "static_exponential": (lambda w, t, s: topo.static_exponential(w, t), ANY),
    "one_peer_exponential": (lambda w, t, s: topo.one_peer_exponential(w, t), ANY),
    "d_equi_static": (lambda w, t, s: topo.d_equi_static(w, t, 4, s), ANY),
}
ALL = DOUBLY_STOCHASTIC | {
    "gosgd": (lambda w, t, s: topo.gosgd_schedule(w, t, 0.5, s), ANY),
    "random_pull": (topo.random_pull, ANY),
}


@pytest.mark.parametrize("name", ALL)
def test_everyone_takes_and_gives_what_is_there(name):
    make, takes = ALL[name]
    for workers in takes:
        schedule = make(workers, 5, 7)
        assert schedule.rounds == 5
        assert schedule.slots >= 1
        W_TWW = matrices(schedule)
        assert (W_TWW >= 0).all()
        np.testing.assert_allclose(W_TWW.sum(axis=2), 1, rtol=1e-12)
        if name != "random_pull":  # many may read one, so it is for averaging rules only
            push_TWW = np.array([schedule.push_matrix(t) for t in range(5)])
            np.testing.assert_allclose(push_TWW.sum(axis=1), 1, rtol=1e-12)
        if name in DOUBLY_STOCHASTIC:
            np.testing.assert_allclose(W_TWW.sum(axis=1), 1, rtol=1e-12)
        if name in SYMMETRIC:
            np.testing.assert_allclose(W_TWW, W_TWW.transpose(0, 2, 1), atol=1e-15)
        busy_TK = (schedule.weights_TKW > 0).any(axis=2)
        np.testing.assert_array_equal(busy_TK, schedule.branches_TK > 0)
        assert (busy_TK[:, :-1] >= busy_TK[:, 1:]).all(), "slots in use come first"
        assert schedule.steps_TW.all()
        assert schedule.present_TW.all()


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=20)
@given(rounds=st.integers(0, 12), more=st.integers(0, 12), seed=st.integers(0, 2**31))
def test_a_longer_schedule_begins_with_the_shorter_one(name, rounds, more, seed):
    make, _ = ALL[name]
    short, long = make(4, rounds, seed), make(4, rounds + more, seed)
    for field in ("branches_TK", "weights_TKW", "average_T", "sync_T"):
        np.testing.assert_array_equal(getattr(short, field), getattr(long, field)[:rounds])


@pytest.mark.parametrize(
    "name",
    ["common_coin", "random_matching", "random_xor", "random_shift", "random_pull", "ou_equi_dyn"],
)
def test_another_seed_is_another_schedule(name):
    make, _ = ALL[name]
    assert (matrices(make(8, 50, 0)) != matrices(make(8, 50, 1))).any()


# Deterministic schedules, against their definitions.


def ring_matrix(workers):
    """1/3 for oneself and for both neighbours; a pair averages."""
    if workers <= 2:
        return mean(workers)
    return (np.eye(workers) + shift_matrix(workers, 1) + shift_matrix(workers, -1)) / 3


def torus_matrix(rows, columns):
    """1 / (1 + number of neighbours) for oneself and for each of them."""
    W_WW = np.zeros((rows * columns, rows * columns))
    for i, j in itertools.product(range(rows), range(columns)):
        steps = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
        near = {((i + di) % rows, (j + dj) % columns) for di, dj in steps}
        for row, column in near:
            W_WW[i * columns + j, row * columns + column] = 1 / len(near)
    return W_WW


def exponents(workers):
    return [bit for bit in range(10) if 2**bit < workers]


def static_exponential_matrix(workers):
    powers = [shift_matrix(workers, 2**bit) for bit in exponents(workers)]
    return (np.eye(workers) + sum(powers)) / (1 + len(powers))


def one_peer_matrix(workers, t):
    if workers == 1:
        return np.eye(1)
    bits = exponents(workers)
    return (np.eye(workers) + shift_matrix(workers, 2 ** bits[t % len(bits)])) / 2


def hypercube_matrix(workers, t):
    if workers == 1:
        return np.eye(1)
    bit = 2 ** (t % int(math.log2(workers)))
    return np.array(
        [[0.5 * (i == j) + 0.5 * (i ^ bit == j) for j in range(workers)] for i in range(workers)]
    )


def star_matrix(workers):
    """Metropolis: 1 / (1 + the greater degree), which is the hub's, W - 1, on every edge."""
    W_WW = np.zeros((workers, workers))
    W_WW[0, 1:] = W_WW[1:, 0] = 1 / workers
    return W_WW + np.diag(1 - W_WW.sum(axis=1))


@pytest.mark.parametrize("workers", ANY)
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (topo.ring, lambda w, t: ring_matrix(w)),
        (topo.static_exponential, lambda w, t: static_exponential_matrix(w)),
        (topo.one_peer_exponential, one_peer_matrix),
        (topo.complete, lambda w, t: mean(w)),
        (topo.complete_by_edges, lambda w, t: mean(w)),
        (topo.star, lambda w, t: star_matrix(w)),
        (topo.silent, lambda w, t: np.eye(w)),
        (
            lambda w, rounds: topo.local_sgd_schedule(w, rounds, 3),
            lambda w, t: mean(w) if t in (2, 5, 8, 11) else np.eye(w),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_deterministic_schedules_are_their_definitions(make, expected, workers):
    schedule = make(workers, 12)
    for t in range(12):
        np.testing.assert_allclose(schedule.pull_matrix(t), expected(workers, t), atol=1e-15)


@pytest.mark.parametrize("workers", POWERS)
def test_hypercube_pairs_by_bits(workers):
    schedule = topo.hypercube(workers, 9)
    for t in range(9):
        np.testing.assert_array_equal(schedule.pull_matrix(t), hypercube_matrix(workers, t))


@pytest.mark.parametrize(("rows", "columns"), [*itertools.product(range(1, 5), repeat=2)])
def test_torus_averages_with_its_neighbours(rows, columns):
    W_WW = topo.torus(rows, columns, 1).pull_matrix(0)
    np.testing.assert_allclose(W_WW, torus_matrix(rows, columns), atol=1e-15)


@pytest.mark.parametrize(
    ("make", "slots", "messages"),
    [
        (lambda: topo.ring(8, 1), 2, 16),
        (lambda: topo.torus(3, 4, 1), 4, 48),
        (lambda: topo.static_exponential(8, 1), 3, 24),
        (lambda: topo.one_peer_exponential(8, 1), 1, 8),
        (lambda: topo.complete(8, 1), 1, 0),
        (lambda: topo.complete_by_edges(8, 1), 7, 56),
        (lambda: topo.star(8, 1), 7, 14),
        (lambda: topo.base_k_plus_1(27, 1, 2), 2, 54),
        (lambda: topo.random_pull(8, 1, 0), 7, 8),
    ],
)
def test_slots_and_messages(make, slots, messages):
    schedule = make()
    assert schedule.slots == slots
    assert schedule.messages() == [messages]


def test_a_star_makes_only_its_own_pairs_send():
    schedule = topo.star(6, 1)
    for branch in schedule.branches_TK[0]:
        assert (schedule.bank.receivers_BW[branch] != np.arange(6)).sum() == 2


def test_who_exchanges_when():
    assert topo.complete(4, 3).sync_T.tolist() == [True] * 3
    assert topo.silent(4, 3).sync_T.tolist() == [False] * 3
    assert topo.local_sgd_schedule(4, 6, 3).sync_T.tolist() == [False, False, True] * 2
    assert topo.ring(4, 2).sync_T.all()
    schedule = topo.common_coin(4, 50, 0.5, 0)
    np.testing.assert_array_equal(schedule.sync_T, schedule.messages() > 0)


# Exact consensus in finite time.


@pytest.mark.parametrize(
    ("make", "takes", "rounds"),
    [
        (topo.complete, ANY, lambda w: 1),
        (topo.complete_by_edges, ANY, lambda w: 1),
        (topo.hypercube, POWERS, lambda w: int(math.log2(w))),
        (topo.one_peer_exponential, POWERS, lambda w: int(math.log2(w))),
        (lambda w, t: topo.local_sgd_schedule(w, t, 4), ANY, lambda w: 4),
        (topo.ring, (1, 2, 3), lambda w: 1),
    ],
)
def test_exact_after_the_promised_rounds_and_not_before(make, takes, rounds):
    for workers in takes:
        needed = max(rounds(workers), 1)
        W_TWW = matrices(make(workers, 3 * needed))
        for start in (0, needed, 2 * needed):
            part = W_TWW[start : start + needed]
            np.testing.assert_allclose(product(part), mean(workers), atol=1e-15)
            before_WW = product(np.array([np.eye(workers), *part[:-1]]))
            assert workers == 1 or np.abs(before_WW - mean(workers)).max() >= 1 / workers


@pytest.mark.parametrize("workers", [w for w in ANY if not is_power_of_two(w)])
def test_one_peer_exponential_is_exact_for_powers_of_two_only(workers):
    # The shift by s takes the wave e^(2 pi i k / W) to a multiple of itself, and the mean of both
    # is 0 only if that is -1, which for the first wave needs 2 s = W.
    W_TWW = matrices(topo.one_peer_exponential(workers, len(exponents(workers))))
    wave_W = np.exp(2j * np.pi * np.arange(workers) / workers)
    assert np.abs(product(W_TWW) @ wave_W).min() > 0.05


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_base_k_plus_1_is_exact_for_any_number_of_workers(degree):
    for workers in range(1, 41):
        period = topo.base_k_plus_1(workers, 0, degree).period
        schedule = topo.base_k_plus_1(workers, 2 * period, degree)
        assert schedule.slots <= degree
        assert period <= max(2 * math.log(workers, degree + 1) + 2, 1)
        W_TWW = matrices(schedule)
        np.testing.assert_array_equal(W_TWW[:period], W_TWW[period:])
        np.testing.assert_allclose(product(W_TWW[:period]), mean(workers), atol=1e-13)
        neighbours_TW = (W_TWW > 0).sum(axis=2) - 1
        assert (neighbours_TW <= degree).all()
        # No message is sent only to make a slot a whole permutation.
        receivers_TKW = schedule.bank.receivers_BW[schedule.branches_TK]
        sent_T = (receivers_TKW != np.arange(workers)).sum(axis=(1, 2))
        np.testing.assert_array_equal(schedule.messages(), sent_T)


@pytest.mark.parametrize(
    ("workers", "degree", "period"),
    # Counted with the authors' own program.
    [
        (8, 1, 3), (27, 2, 3), (6, 2, 2), (3, 1, 3), (5, 1, 5), (6, 1, 4), (7, 1, 5), (25, 1, 9),
        (33, 1, 11), (39, 2, 6), (35, 3, 6), (37, 4, 5), (40, 4, 3),
    ],
)  # fmt: skip
def test_base_k_plus_1_is_as_short_as_the_authors(workers, degree, period):
    assert topo.base_k_plus_1(workers, 0, degree).period == period


def test_base_2_of_five_workers_by_hand():
    # 5 = 4 + 1: two rounds of pairs bring the four to their mean; worker 4 takes in one of them by
    # 4/5 and so has the mean of all; two more rounds of pairs spread it among the four.
    schedule = topo.base_k_plus_1(5, 5, 1)
    edges = [{(i, j): w for i, j, w in schedule.edges(t) if i < j} for t in range(5)]
    assert [set(round.values()) for round in edges] == [{0.5}, {0.5}, {0.5, 0.8}, {0.5}, {0.5}]
    assert {frozenset(round) for round in edges[:2]} == {frozenset(round) for round in edges[3:]}
    assert [edge for edge, weight in edges[2].items() if weight == 0.8] == [(0, 4)]
    assert len(edges[2]) == 2, "and a pair of those that have nobody else"


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"torus"}))
def test_one_worker_is_left_alone(name):
    make, _ = ALL[name]
    schedule = make(1, 4, 0)
    assert (schedule.messages() == 0).all()
    np.testing.assert_array_equal(matrices(schedule), np.ones((4, 1, 1)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: topo.ring(0, 3), "schedule ring: .* at least 1, got 0"),
        (lambda: topo.torus(0, 3, 3), "schedule torus: .* at least 1, got 0"),
        (lambda: topo.star(-1, 3), "schedule star: .* at least 1, got -1"),
        (lambda: topo.random_matching(0, 3, 0), "schedule random_matching: .* got 0"),
        (lambda: topo.random_shift(0, 3, 0), "schedule random_shift: .* got 0"),
        (lambda: topo.random_pull(0, 3, 0), "schedule random_pull: .* got 0"),
        (lambda: topo.ou_equi_dyn(0, 3, 0), "schedule ou_equi_dyn: .* got 0"),
        (lambda: topo.common_coin(0, 3, 0.5, 0), "schedule common_coin: .* got 0"),
        (lambda: topo.static_exponential(0, 3), "schedule static_exponential: .* got 0"),
        (lambda: topo.one_peer_exponential(0, 3), "schedule one_peer_exponential: .* got 0"),
        (lambda: topo.complete(0, 3), "schedule complete: .* got 0"),
        (lambda: topo.complete_by_edges(0, 3), "schedule complete_by_edges: .* got 0"),
        (lambda: topo.silent(0, 3), "schedule silent: .* got 0"),
        (lambda: topo.base_k_plus_1(0, 3, 1), "schedule base_k_plus_1: .* got 0"),
        (lambda: topo.base_k_plus_1(5, 3, 0), "schedule base_k_plus_1: the degree .* got 0"),
        (lambda: topo.d_equi_static(0, 3, 2, 0), "schedule d_equi_static: .* got 0"),
        (lambda: topo.u_equi_static(4, 3, 0, 0), "schedule u_equi_static: .* drawn, got 0"),
        (lambda: topo.hypercube(6, 3), "schedule hypercube: .* power of two, got 6"),
        (lambda: topo.random_xor(12, 3, 0), "schedule random_xor: .* power of two, got 12"),
        (lambda: topo.common_coin(4, 3, 1.5, 0), r"common_coin: the .* in \[0, 1\], got 1.5"),
        (lambda: topo.common_coin(4, 3, math.nan, 0), "common_coin: .* got nan"),
        (lambda: topo.random_shift(4, 3, 0, weight=-0.5), "random_shift: the weight .* got -0.5"),
        (lambda: topo.ou_equi_dyn(4, 3, 0, weight=2), "ou_equi_dyn: the weight .* got 2"),
        (lambda: topo.random_pull(4, 3, 0, weight=2), "random_pull: the weight .* got 2"),
        (lambda: topo.local_sgd_schedule(4, 3, 0), "the period must be at least 1, got 0"),
        (lambda: topo.ring(4, -1), "must not be negative, got -1"),
        (lambda: topo.silent(4, -1), "must not be negative, got -1"),
        (lambda: topo.random_pull(4, -1, 0), "must not be negative, got -1"),
        (lambda: topo.random_xor(4, -1, 0), "must not be negative, got -1"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
