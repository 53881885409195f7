import itertools
from dataclasses import replace

import numpy as np
import pytest

from persyn_jax.gossip import Dense, Rows, cycle, gosgd_schedule, shift_bank, topologies, xor_bank
from persyn_jax.gossip.costs import LinkModel, all_reduce_seconds, costs, verdict

S, b, B = 1000.0, 10.0, 2.0


def links(workers_per_slice, torus=None, inside_latency=0.0, between_latency=0.0):
    return LinkModel(b, inside_latency, B, between_latency, workers_per_slice, torus)


def each_branch(bank, weight=0.5):
    """Round t is branch t of the bank."""
    branches_SK = np.arange(bank.branches, dtype=np.int32)[:, None]
    weights_SKW = np.full((bank.branches, 1, bank.workers), weight)
    weights_SKW[0] = 0
    rows = Rows(branches_SK, weights_SKW, np.zeros(bank.branches, bool))
    return cycle(bank, rows, bank.branches)


@pytest.mark.parametrize("workers", [2, 5, 8])
def test_a_shift_on_a_ring_takes_its_distance(workers):
    shift_T = np.arange(workers)
    hops_T = np.minimum(shift_T, workers - shift_T)
    ring = links(workers, (workers,), inside_latency=0.25)
    result = costs(each_branch(shift_bank(workers)), S, ring)
    np.testing.assert_allclose(result.seconds_T, hops_T * (S / b + 0.25))
    np.testing.assert_allclose(result.hop_T, hops_T * S)
    np.testing.assert_allclose(result.inside_T, (shift_T > 0) * S)
    np.testing.assert_array_equal(result.between_T, np.zeros(workers))


def test_an_all_reduce_is_as_many_times_faster_as_the_torus_has_dimensions():
    assert all_reduce_seconds(8, S, links(8, (8,))) == pytest.approx(S / b)
    assert all_reduce_seconds(16, S, links(16, (4, 4))) == pytest.approx(S / b / 2)
    assert all_reduce_seconds(64, S, links(64, (4, 4, 4))) == pytest.approx(S / b / 3)
    assert all_reduce_seconds(4, S, links(4, (1, 4))) == pytest.approx(S / b)
    assert all_reduce_seconds(4, S, links(4)) == pytest.approx(2 * S * 3 / 4 / b)
    assert all_reduce_seconds(1, S, links(1)) == 0


@pytest.mark.parametrize("slices", [2, 3, 8])
def test_between_slices_of_one_worker(slices):
    schedule, flat = each_branch(shift_bank(slices)), links(1, between_latency=0.5)
    result = costs(schedule, S, flat)
    np.testing.assert_allclose(result.seconds_T[1:], S / B + 0.5)
    np.testing.assert_allclose(result.between_T[1:], S)
    reference = 2 * S * (slices - 1) / slices / B + 2 * (slices - 1) * 0.5
    assert all_reduce_seconds(slices, S, flat) == pytest.approx(reference)
    assert verdict(schedule, S, flat).ratio == pytest.approx((S / B + 0.5) / reference)


def busiest_by_walking(receivers_W, torus):
    """Hops of all messages and the busiest link, one step of one message at a time."""
    crossed, hops = {}, 0
    places = list(itertools.product(*map(range, torus)))
    for sender, receiver in enumerate(receivers_W):
        place, goal = list(places[sender]), places[receiver]
        for dimension, length in enumerate(torus):
            while place[dimension] != goal[dimension]:
                is_up = (goal[dimension] - place[dimension]) % length <= length / 2
                link = (tuple(place), dimension, is_up)
                crossed[link] = crossed.get(link, 0) + 1
                hops += 1
                place[dimension] = (place[dimension] + (1 if is_up else -1)) % length
                # On its way it keeps its direction: the rest is shorter still.
    return hops, max(crossed.values(), default=0)


@pytest.mark.parametrize("torus", [(16,), (4, 4), (2, 8), (2, 2, 4), (1, 16)])
@pytest.mark.parametrize("bank", [xor_bank(16), shift_bank(16)], ids=["xor", "shift"])
def test_hops_and_busiest_link_on_a_torus(torus, bank):
    result = costs(each_branch(bank), S, links(16, torus))
    for branch, receivers_W in enumerate(bank.receivers_BW):
        hops, busiest = busiest_by_walking(receivers_W, torus)
        assert result.hop_T[branch] == pytest.approx(hops * S / 16)
        assert result.busiest_link_T[branch] == pytest.approx(busiest * S)
        assert result.seconds_T[branch] == pytest.approx(busiest * S / b)


def test_slices_have_links_of_their_own():
    # Two slices of four in rings: a shift by one crosses a border once in each slice.
    result = costs(each_branch(shift_bank(8)), S, links(4, (4,)))
    np.testing.assert_allclose(result.inside_T[1], S * 6 / 8)
    np.testing.assert_allclose(result.between_T[1], S * 2 / 8)
    assert result.seconds_T[1] == pytest.approx(max(S / b, S / B))
    # Shift by four: all change slices, and share the way out.
    np.testing.assert_allclose(result.between_T[4], S)
    assert result.seconds_T[4] == pytest.approx(4 * S / B)
    # The all-reduce sends shards between slices.
    means = costs(topologies.complete(8, 2), S, links(4, (4,)))
    np.testing.assert_allclose(means.inside_T, 2 * S * 3 / 4)
    np.testing.assert_allclose(means.between_T, 2 * S / 2 / 4)
    np.testing.assert_allclose(means.seconds_T, S / b + 2 * S / 2 / B)
    np.testing.assert_array_equal(means.useful_inside_T, means.inside_T)


def test_all_move_for_one_coin():
    schedule = gosgd_schedule(8, 200, 0.2, seed=0)
    result = costs(schedule, S, links(8))
    np.testing.assert_allclose(result.useful_inside_T, schedule.messages() * S / 8)
    np.testing.assert_allclose(result.inside_T, (schedule.messages() > 0) * S)
    assert 0 < result.useful_inside_T.sum() < result.inside_T.sum() / 2


def test_useful_messages_by_class_are_those_with_a_weight():
    schedule, n = gosgd_schedule(8, 50, 0.5, seed=1), 2
    result = costs(schedule, S, links(n))
    for t in range(50):
        crossing = [receiver // n != sender // n for receiver, sender, _ in schedule.edges(t)]
        assert result.useful_between_T[t] == pytest.approx(S * sum(crossing) / 8)
        assert result.useful_inside_T[t] == pytest.approx(S * (len(crossing) - sum(crossing)) / 8)


def test_two_digits_are_two_messages_where_both_are_turned():
    bank = xor_bank(128)
    assert bank.digits
    low_branches = bank.digits[1].branches
    result = costs(each_branch(bank), S, links(128))
    branch_T = np.arange(128)
    hops_T = (branch_T % low_branches > 0).astype(int) + (branch_T // low_branches > 0)
    np.testing.assert_allclose(result.inside_T, S * hops_T)
    np.testing.assert_allclose(result.seconds_T, S / b * hops_T)
    np.testing.assert_allclose(result.useful_inside_T[1:], S)


def test_slots_follow_one_another():
    result = costs(topologies.ring(4, 3), S, links(4, (4,), inside_latency=0.25))
    np.testing.assert_allclose(result.seconds_T, 2 * (S / b + 0.25))
    np.testing.assert_allclose(result.inside_T, 2 * S)


def test_the_matrix_mode_sends_everything_to_everyone():
    schedule = gosgd_schedule(6, 10, 0.0, seed=0).dense()
    assert isinstance(schedule.bank, Dense)
    result = costs(schedule, S, links(3))
    np.testing.assert_allclose(result.inside_T, 2 * S)
    np.testing.assert_allclose(result.between_T, 3 * S)
    np.testing.assert_array_equal(result.useful_inside_T, np.zeros(10))


def test_verdict_in_a_sentence():
    schedule = each_branch(shift_bank(8))
    inside = verdict(schedule, S, links(8, (8,)))
    assert inside.ratio == pytest.approx(np.mean([1, 2, 3, 4, 3, 2, 1]))
    assert inside.sentence == (
        "Gossip cannot pay on these links: an exchange takes 2.29 times as long as an all-reduce, "
        "which mixes completely."
    )
    between = verdict(schedule, S, links(1))
    assert between.ratio == pytest.approx(4 / 7)
    assert between.sentence == (
        "Gossip can pay on these links: an exchange takes 0.57 of the time of an all-reduce. For "
        "the same time there could be an all-reduce each 1.8 rounds."
    )
    rarely = gosgd_schedule(8, 400, 0.001, seed=0)  # exchanges seldom, and each is no cheaper
    assert verdict(rarely, S, links(8, (8,))).ratio >= 1
    assert verdict(gosgd_schedule(8, 5, 0.0, seed=0), S, links(8)).sentence == "Nothing travels."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inside_bandwidth": 0.0}, "bandwidths must be positive"),
        ({"between_latency": -1.0}, "latencies must not be negative"),
        ({"workers_per_slice": 0}, "workers per slice must be >= 1, got 0"),
        ({"torus": (2, 3)}, r"a torus of \(2, 3\) does not hold 4 workers"),
    ],
)
def test_impossible_links_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(links(4), **change)


def test_workers_that_do_not_fill_slices_are_refused():
    with pytest.raises(ValueError, match="6 workers do not fill slices of 4"):
        costs(gosgd_schedule(6, 3, 1.0, seed=0), S, links(4))
