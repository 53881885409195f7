import numpy as np
import pytest
from gossip_matrices import matrices, mean, product
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.gossip import compose, topologies
from persyn_jax.gossip.graphs import from_matrices


def assert_same_rounds(one, other):
    """Not the same table, but the same messages, in the same slots."""
    assert [one.edges(t) for t in range(one.rounds)] == [
        other.edges(t) for t in range(other.rounds)
    ]
    for field in ("average_T", "sync_T", "steps_TW", "present_TW"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


@given(st.integers(0, 9), st.integers(1, 5), st.data())
def test_every_stretches_and_loses_no_row(rounds, period, data):
    offset = data.draw(st.integers(0, period - 1))
    schedule = topologies.gosgd_schedule(4, rounds, 0.5, seed=1)
    stretched = compose.stretch(schedule, period, offset)
    assert stretched.rounds == rounds * period
    for t, matrix_WW in enumerate(matrices(stretched)):
        if t % period == offset:
            np.testing.assert_array_equal(matrix_WW, schedule.pull_matrix(t // period))
            assert stretched.sync_T[t]
        else:
            np.testing.assert_array_equal(matrix_WW, np.eye(4))
            assert not stretched.sync_T[t]
    assert stretched.steps_TW.all()
    assert stretched.present_TW.all()


def test_every_keeps_means_quiet_rounds_and_the_matrix_mode():
    assert compose.stretch(topologies.complete(3, 2), 2, 1).average_T.tolist() == [0, 1, 0, 1]
    assert not compose.stretch(topologies.silent(3, 4), 2).sync_T.any()
    dense = compose.stretch(topologies.ring(4, 2).dense(), 2)
    np.testing.assert_array_equal(
        matrices(dense), matrices(compose.stretch(topologies.ring(4, 2), 2))
    )


def test_periods_multiply():
    hypercube = topologies.hypercube(8, 24)
    assert compose.stretch(hypercube, 2).period == 6
    assert compose.periodic_average(hypercube, 4).period == 12
    assert compose.hierarchical(hypercube, 2, inside_rounds=3).period == 12
    random = topologies.random_xor(8, 24, 0)
    assert compose.periodic_average(random, 4).period is None
    for schedule in (compose.stretch(hypercube, 2), compose.periodic_average(hypercube, 4)):
        W_TWW = matrices(schedule)
        np.testing.assert_array_equal(W_TWW[schedule.period :], W_TWW[: -schedule.period])


@given(rounds=st.integers(0, 12), period=st.integers(1, 5))
def test_periodic_average_puts_the_exact_mean_in_the_place_of_each_last_round(rounds, period):
    schedule = topologies.random_shift(5, rounds, seed=2)
    averaged = compose.periodic_average(schedule, period)
    assert averaged.rounds == rounds
    for t in range(rounds):
        is_mean = t % period == period - 1
        expected_WW = mean(5) if is_mean else schedule.pull_matrix(t)
        np.testing.assert_array_equal(averaged.pull_matrix(t), expected_WW)
        assert (averaged.messages()[t] == 0) == is_mean
        assert averaged.average_T[t] == is_mean
    assert averaged.sync_T.all()


def test_periodic_average_keeps_the_means_there_are_and_the_types():
    schedule = compose.periodic_average(topologies.local_sgd_schedule(3, 6, 2), 3)
    assert schedule.average_T.tolist() == [False, True, True, True, False, True]
    assert schedule.sync_T.tolist() == schedule.average_T.tolist()
    assert schedule.branches_TK.dtype == np.int32


# A slice is a worker of `between`; kron(A, B) mixes slices by A and positions by B.


@given(
    slices=st.integers(1, 5),
    slice_size=st.integers(1, 4),
    inside_rounds=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_hierarchical_is_exact_inside_and_gossips_between(slices, slice_size, inside_rounds, seed):
    between = topologies.random_shift(slices, 3, seed)
    schedule = compose.hierarchical(between, slice_size, inside_rounds)
    assert schedule.workers == slices * slice_size
    assert schedule.rounds == 3 * (inside_rounds + 1)
    for t in range(schedule.rounds):
        row, phase = divmod(t, inside_rounds + 1)
        if phase < inside_rounds:
            expected_WW = np.kron(np.eye(slices), mean(slice_size))
        else:
            expected_WW = np.kron(between.pull_matrix(row), np.eye(slice_size))
        np.testing.assert_allclose(schedule.pull_matrix(t), expected_WW, atol=1e-15)
    assert schedule.sync_T.all()


@pytest.mark.parametrize("slices", range(1, 8))
def test_hierarchical_is_exact_when_the_schedule_between_is(slices):
    period = topologies.base_k_plus_1(slices, 0, 1).period
    schedule = compose.hierarchical(topologies.base_k_plus_1(slices, period, 1), slice_size=3)
    np.testing.assert_allclose(product(matrices(schedule)), mean(3 * slices), atol=1e-14)


def test_hierarchical_takes_means_and_quiet_rounds_of_the_schedule_between():
    local = topologies.local_sgd_schedule(2, 2, period=2)
    schedule = compose.hierarchical(local, slice_size=2)
    assert schedule.average_T.tolist() == [False, False, False, True]
    assert schedule.sync_T.tolist() == [True, False, True, True]


def test_padding_adds_unused_slots():
    schedule = topologies.random_shift(5, 20, seed=0)
    more = compose.padded(schedule, 4)
    assert (more.slots, more.bank) == (4, schedule.bank)
    assert_same_rounds(more, schedule)
    assert (more.branches_TK[:, 1:] == 0).all()
    np.testing.assert_array_equal(more.law.rows.weights_SKW[:, :1], schedule.law.rows.weights_SKW)
    assert more.law.rows.weights_SKW.shape[1] == more.law.rows.branches_SK.shape[1] == 4


def test_schedules_over_one_bank_are_the_same_schedules():
    schedules = [
        topologies.ring(6, 4),
        topologies.random_matching(6, 9, seed=1),
        topologies.base_k_plus_1(6, 7, 2),
        topologies.complete(6, 2),
        topologies.random_pull(6, 5, seed=2),
    ]
    shared = compose.share_bank(schedules)
    assert {id(schedule.bank) for schedule in shared} == {id(shared[0].bank)}
    assert {schedule.slots for schedule in shared} == {5}
    for one, other in zip(shared, schedules, strict=True):
        assert_same_rounds(one, other)
    # No permutation stands in the bank twice.
    rows = shared[0].bank.receivers_BW
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_a_law_follows_its_schedule_to_another_bank():
    schedules = [topologies.static_exponential(8, 1), topologies.random_matching(8, 1, seed=0)]
    shared, original = compose.share_bank(schedules)[1], schedules[1]
    np.testing.assert_array_equal(
        shared.bank.receivers_BW[shared.law.rows.branches_SK[:, 0]],
        original.bank.receivers_BW[original.law.rows.branches_SK[:, 0]],
    )
    np.testing.assert_array_equal(shared.law.probability_S, original.law.probability_S)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: compose.stretch(s, 0), "schedule stretch: the period must be at least 1, got 0"),
        (lambda s: compose.stretch(s, 3, 3), r"stretch: the offset must lie in \[0, 3\), got 3"),
        (lambda s: compose.stretch(s, 3, -1), r"stretch: the offset must lie in \[0, 3\), got -1"),
        (lambda s: compose.periodic_average(s, 0), "periodic_average: the period .* got 0"),
        (lambda s: compose.periodic_average(s.dense(), 2), "periodic_average: .* matrix mode"),
        (lambda s: compose.hierarchical(s, 0), "hierarchical: .* at least 1, got 0 and 1"),
        (lambda s: compose.hierarchical(s, 2, 0), "hierarchical: .* at least 1, got 2 and 0"),
        (lambda s: compose.hierarchical(s.dense(), 2), "hierarchical: .* matrix mode"),
        (lambda s: compose.padded(s, 1), "padded: it has 2 slots already, got 1"),
        (lambda s: compose.padded(s.dense(), 9), "padded: .* matrix mode"),
        (lambda s: compose.share_bank([s, s.dense()]), "share_bank: .* matrix mode"),
        (
            lambda s: compose.share_bank([s, from_matrices([np.eye(3)], 2)]),
            r"share_bank: all must have the same workers, got \[4, 3\]",
        ),
        (lambda s: compose.share_bank([]), r"share_bank: .* got \[\]"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(topologies.ring(4, 2))
    assert "\n" not in str(caught.value)
