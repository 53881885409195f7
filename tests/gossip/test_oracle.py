"""The oracle itself, against closed forms, conserved sums and identities between rules."""

from dataclasses import replace

import numpy as np
import oracle
import pytest

W, D, T = 6, 3, 24
RULES = [
    (oracle.gosgd, {}),
    (oracle.push_sum, {}),
    (oracle.d_psgd, {}),
    (oracle.d_psgd_before, {}),
    (oracle.d_psgd_delayed, {"k": 2}),
    (oracle.d_psgd_int8, {}),
    (oracle.levanter_pull, {"m": 0.3}),
    (oracle.no_mixing, {}),
    (oracle.slowmo, {"beta": 0.5, "lr": 0.7, "inner_lr": 0.1}),
    (oracle.diloco, {"lr": 0.7, "momentum": 0.9}),
    (oracle.noloco, {"beta": 0.5, "alpha_lr": 0.7}),
    (oracle.gasloc, {"gamma": 0.4}),
]
CENTRED = [(oracle.easgd, {"moving_rate": 0.1}), (oracle.downpour, {})]
COMPLETE = [(i, j, 1 / W) for i in range(W) for j in range(W) if i != j]
LAZY_RING = [(i, (i + s) % W, 0.25) for i in range(W) for s in (1, -1)]


def each_of(rules):
    return pytest.mark.parametrize(
        ("rule", "hyper"), rules, ids=[rule.__name__ for rule, _ in rules]
    )


every_rule, every_rule_without_a_centre = each_of(RULES + CENTRED), each_of(RULES)


def close(expected):
    return pytest.approx(expected, rel=1e-12, abs=1e-12)


def one_round(edges=(), *, t=0, sync=True, average=False) -> oracle.OracleRound:
    everyone = np.ones(W, bool)
    return oracle.OracleRound(t, sync, average, list(edges), everyone, everyone)


def random_rounds(rng, *, absences: bool, average: float = 0.0) -> list[oracle.OracleRound]:
    """Two random permutations a round, some messages missing, exchange in half of the rounds."""
    rounds = []
    for t in range(T):
        sync = bool(rng.random() < 0.5)
        pairs = [(i, j) for _ in range(2) for j, i in enumerate(rng.permutation(W)) if i != j]
        edges = [(i, j, rng.uniform(0.1, 0.5)) for i, j in pairs if sync and rng.random() < 0.7]
        faults = rng.random((2, W)) < (0.2 if absences else 0.0)
        mean = bool(sync and rng.random() < average)
        rounds.append(oracle.OracleRound(t, sync, mean, edges, ~faults[0], ~faults[1]))
    return rounds


def random_case(seed=0, *, absences=False, average=0.0, non_finite=False):
    rng = np.random.default_rng(seed)
    x0_WD, updates_TWD = rng.normal(size=(W, D)), rng.normal(size=(T, W, D))
    if non_finite:
        updates_TWD[rng.random((T, W)) < 0.2, 0] = rng.choice([np.nan, np.inf, -np.inf])
    return x0_WD, updates_TWD, random_rounds(rng, absences=absences, average=average)


def steps_taken(updates_TWD, rounds):
    return np.stack([u for u, _, _ in oracle.local_steps(updates_TWD, rounds)])


# --- What no exchange may change ---


def test_push_sum_conserves_numerators_and_weights():
    x0, updates, rounds = random_case(absences=True, non_finite=True)
    out = oracle.push_sum(x0, updates, rounds)
    moved_TD = steps_taken(updates, rounds).sum(axis=1).cumsum(axis=0)
    assert out["params"].sum(axis=1) == close(x0.sum(axis=0) + moved_TD)
    assert out["weights"].sum(axis=1) == close(np.full(T, W))


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_gosgd_conserves_sum_weight_and_weighted_sum(average):
    x0, updates, rounds = random_case(absences=True, non_finite=True, average=average)
    out = oracle.gosgd(x0, updates, rounds)
    alpha_TW = np.concatenate([np.full((1, W), 1 / W), out["weights"]])
    moved_TD = np.einsum("tw,twd->td", alpha_TW[:-1], steps_taken(updates, rounds)).cumsum(axis=0)
    assert alpha_TW.sum(axis=1) == close(np.ones(T + 1))
    held_TD = np.einsum("tw,twd->td", out["weights"], out["params"])
    assert held_TD == close(x0.mean(axis=0) + moved_TD)


def test_gosgd_without_gradients_is_push_sum():
    x0, updates, rounds = random_case(absences=True)
    ours = oracle.gosgd(x0, 0 * updates, rounds)
    theirs = oracle.push_sum(x0, 0 * updates, rounds)
    assert ours["weights"] == close(theirs["weights"] / W)
    assert ours["params"] == close(theirs["params"] / theirs["weights"][..., None])


def test_gosgd_receiver_of_equal_weight_moves_a_third_of_the_way():
    x0 = np.zeros((W, D))
    x0[1] = 1.0
    out = oracle.gosgd(x0, np.zeros((1, W, D)), [one_round([(0, 1, 0.5)])])
    assert out["params"][0, :2] == close(np.array([[1 / 3] * D, [1.0] * D]))
    assert out["weights"][0, :2] * W == close(np.array([1.5, 0.5]))


def test_gosgd_sends_whole_units():
    rounds = [one_round([(0, 1, 0.5)]), one_round([(2, 1, 0.5)])]
    weights = oracle.gosgd(np.zeros((W, D)), np.zeros((2, W, D)), rounds, unit=1 / 12)["weights"]
    assert weights[:, :3] * 12 == close(np.array([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]))


# --- Faults ---


@every_rule
def test_absent_worker_keeps_its_parameters(rule, hyper):
    x0, updates, rounds = random_case(absences=True, average=0.3, non_finite=True)
    params = np.concatenate([[x0], rule(x0, updates, rounds, **hyper)["params"]])
    absent_TW = ~np.stack([r.present_W for r in rounds])
    assert absent_TW.any()
    np.testing.assert_array_equal(params[1:][absent_TW], params[:-1][absent_TW])


@every_rule_without_a_centre
def test_non_finite_update_is_no_step_and_no_message(rule, hyper):
    x0, updates, rounds = random_case(non_finite=True)
    finite_TW = np.all(np.isfinite(updates), axis=2)
    without = [
        replace(r, edges=[edge for edge in r.edges if finite_TW[r.index, edge[1]]]) for r in rounds
    ]
    zeroed = np.where(finite_TW[..., None], updates, 0.0)
    if rule in (oracle.d_psgd_before, oracle.d_psgd_delayed):
        without = rounds  # the message had left before
    ours, theirs = rule(x0, updates, rounds, **hyper), rule(x0, zeroed, without, **hyper)
    np.testing.assert_array_equal(ours["params"], theirs["params"])


@every_rule
def test_worker_without_a_step_has_a_zero_update(rule, hyper):
    x0, updates, rounds = random_case(average=0.3)
    idle_TW = np.random.default_rng(1).random((T, W)) < 0.3
    idle = [replace(r, steps_W=~idle_W) for r, idle_W in zip(rounds, idle_TW, strict=True)]
    zeroed = np.where(idle_TW[..., None], 0.0, updates)
    ours, theirs = rule(x0, updates, idle, **hyper), rule(x0, zeroed, rounds, **hyper)
    np.testing.assert_array_equal(ours["params"], theirs["params"])


@every_rule_without_a_centre
def test_lone_worker_resumes_as_if_the_rounds_of_its_absence_had_not_been(rule, hyper):
    x0, updates, rounds = random_case(absences=True)
    rounds = [replace(r, edges=[]) for r in rounds]
    there = np.stack([r.present_W[0] for r in rounds])
    attended = [r for r in rounds if r.present_W[0]]
    ours = rule(x0, updates, rounds, **hyper)["params"][there, 0]
    np.testing.assert_array_equal(ours, rule(x0, updates[there], attended, **hyper)["params"][:, 0])


def test_average_comes_first_and_leaves_out_the_silent():
    x0, updates = np.arange(W * D, dtype=float).reshape(W, D), np.zeros((1, W, D))
    updates[0, 0, 0] = np.nan
    present = np.arange(W) != 1
    r = replace(one_round([(0, 4, 0.5), (3, 4, 0.5)], average=True), present_W=present)
    expected, mean = x0.copy(), x0[2:].mean(axis=0)
    expected[2:] = mean
    expected[0] = (x0[0] + mean) / 2
    assert oracle.d_psgd(x0, updates, [r])["params"][0] == close(expected)
    out = oracle.push_sum(x0, updates, [r])
    assert out["weights"][0] == close(np.array([1.5, 1, 1, 1.5, 0, 1]))
    assert out["params"][0, 0] == close(x0[0] + mean / 2)


def test_average_of_gosgd_is_weighted():
    x0 = np.arange(W * D, dtype=float).reshape(W, D)
    rounds = [one_round([(0, 1, 0.5)]), one_round(average=True)]
    out = oracle.gosgd(x0, np.zeros((2, W, D)), rounds)
    assert out["weights"][1] == close(out["weights"][0])
    assert out["params"][1] == close(np.broadcast_to(x0.mean(axis=0), (W, D)))


# --- Where rules collapse into one another ---


def test_complete_graph_every_round_is_all_reduce():
    _, updates, _ = random_case()
    x0, rounds = np.ones((W, D)), [one_round(COMPLETE)] * T
    expected = oracle.all_reduce(x0, updates, rounds)["params"]
    assert expected == close(x0 + updates.mean(axis=1, keepdims=True).cumsum(axis=0))
    assert oracle.d_psgd(x0, updates, rounds)["params"] == close(expected)


def test_all_reduce_moves_all_present_by_the_mean_of_the_steps_taken():
    x0, updates, _ = random_case()
    updates[0, 0, 0] = np.nan
    steps, present = np.arange(W) != 1, np.arange(W) != 2
    r = replace(one_round(), steps_W=steps, present_W=present)
    expected = x0 + np.outer(present, updates[0, 3:].mean(axis=0))
    assert oracle.all_reduce(x0, updates[:1], [r])["params"][0] == close(expected)


@pytest.mark.parametrize(
    ("rule", "hyper"),
    [
        (oracle.slowmo, {"beta": 0.0, "lr": 1.0, "inner_lr": 0.1}),
        (oracle.diloco, {"lr": 1.0, "momentum": 0.0}),
        (oracle.noloco, {"beta": 0.0, "alpha_lr": 1.0}),
        (oracle.gasloc, {"gamma": 0.0}),
    ],
)
def test_outer_optimiser_without_momentum_is_averaging(rule, hyper):
    """With `average` this is local SGD."""
    x0, updates, rounds = random_case(absences=True, average=0.3, non_finite=True)
    expected = oracle.d_psgd(x0, updates, rounds)["params"]
    assert rule(x0, updates, rounds, **hyper)["params"] == close(expected)


def test_outer_optimisers_agree_on_exact_averages():
    _, updates, rounds = random_case()
    x0, rounds = np.ones((W, D)), [replace(r, edges=[], average=r.sync) for r in rounds]
    sync = np.flatnonzero([r.sync for r in rounds])

    def after_sync(rule, **hyper):
        return rule(x0, updates, rounds, **hyper)["params"][sync]

    heavy_ball = after_sync(oracle.slowmo, beta=0.5, lr=0.7, inner_lr=0.1)
    assert after_sync(oracle.noloco, beta=0.5, alpha_lr=0.7) == close(heavy_ball)
    # GASLoC follows DiLoCo in the mean of the workers, who stay unequal.
    nesterov = after_sync(oracle.diloco, lr=1.0, momentum=0.4)
    gasloc = after_sync(oracle.gasloc, gamma=0.4)
    assert gasloc.mean(axis=1) == close(nesterov.mean(axis=1))
    assert np.ptp(gasloc, axis=1).max() > 0.01
    assert np.ptp(nesterov, axis=1).max() < 1e-12


def test_delayed_correction():
    x0, updates, rounds = random_case(absences=True)
    now = oracle.d_psgd_delayed(x0, updates, rounds, k=0)["params"]
    assert now == close(oracle.d_psgd_before(x0, updates, rounds)["params"])
    # Towards the mean x at once, and then by the same way again.
    late = oracle.d_psgd_delayed(x0, 0 * updates[:2], [one_round(COMPLETE)] * 2, k=1)["params"]
    mean = np.broadcast_to(x0.mean(axis=0), x0.shape)
    assert late == close(np.stack([mean, 2 * mean - x0]))


# --- Closed forms of single rules ---


def test_easgd_matrix_is_the_symmetric_one():
    """Row and column 0 the centre, by pushing unit vectors through one round."""
    a = 0.1
    expected = (1 - a) * np.eye(W + 1)
    expected[0, 1:] = expected[1:, 0] = a
    expected[0, 0] = 1 - W * a

    def column(x0_W1, update_W1):
        out = oracle.easgd(x0_W1, [update_W1], [one_round()], moving_rate=a)
        return np.concatenate([out["centre"][0], out["params"][0, :, 0]])

    ones, zeros = np.ones((W, 1)), np.zeros((W, 1))
    columns = [column(ones, -ones), *(column(zeros, unit[:, None]) for unit in np.eye(W))]
    assert np.stack(columns, axis=1) == close(expected)


def test_downpour_centre_gathers_all_updates():
    _, updates, _ = random_case()
    x0, rounds = np.ones((W, D)), [one_round(sync=t % 3 == 2) for t in range(T)]
    out = oracle.downpour(x0, updates, rounds)
    expected = 1 + updates.sum(axis=1).cumsum(axis=0)
    assert out["centre"][2::3] == close(expected[2::3])
    assert out["params"][2::3] == close(np.repeat(expected[2::3, None], W, axis=1))


def test_downpour_progress_waits_for_a_round_in_which_the_worker_may_send():
    _, updates, _ = random_case()
    updates[1, 0, 0] = np.nan
    rounds = [one_round(sync=False), one_round(), one_round()]
    out = oracle.downpour(np.ones((W, D)), updates[:3], rounds)
    others = 1 + updates[:2, 1:].sum(axis=(0, 1))
    assert out["centre"][1] == close(others)
    assert out["params"][1, 0] == close(1 + updates[0, 0])
    everything = others + updates[0, 0] + updates[2].sum(axis=0)
    assert out["params"][2] == close(np.tile(everything, (W, 1)))


def test_levanter_reads_the_mean_of_what_came():
    x0 = np.random.default_rng(0).normal(size=(W, D))
    r = one_round([(0, 1, 0.9), (0, 2, 0.1), (3, 4, 0.5), (5, 4, 0.0)])
    expected = x0.copy()
    expected[0] = 0.7 * x0[0] + 0.3 * (x0[1] + x0[2]) / 2
    expected[3] = 0.7 * x0[3] + 0.3 * x0[4]
    assert oracle.levanter_pull(x0, np.zeros((1, W, D)), [r], m=0.3)["params"][0] == close(expected)


def test_d2_agrees_on_unlike_data_where_averaging_does_not():
    """A constant update for each worker, unlike ones: D2 keeps the mean and reaches consensus."""
    u = np.random.default_rng(0).normal(size=(W, D))
    x0, updates, rounds = np.zeros((W, D)), np.tile(u, (400, 1, 1)), [one_round(LAZY_RING)] * 400
    mean = 400 * u.mean(axis=0)
    corrected = oracle.d2(x0, updates, rounds)["params"][-1]
    assert corrected == close(np.broadcast_to(mean, (W, D)))
    plain = oracle.d_psgd(x0, updates, rounds)["params"][-1]
    assert plain.mean(axis=0) == close(mean)
    assert np.abs(plain - mean).max() > 0.1


def test_int8_exchange_is_exact_for_eight_bit_numbers():
    x0 = np.random.default_rng(0).integers(-126, 127, (W, D)).astype(float)
    x0[:, 0] = 127
    case = x0, np.zeros((1, W, D)), [one_round(LAZY_RING)]
    assert oracle.d_psgd_int8(*case)["params"] == close(oracle.d_psgd(*case)["params"])


def test_int8_exchange_feeds_its_error_back():
    """0.4 of a quantum is not sent at first; with the 0.4 that was left it makes one quantum."""
    x0 = np.zeros((W, 2))
    x0[:2] = [127, 0.4], [127, 0]
    pair = one_round([(0, 1, 0.5), (1, 0, 0.5)])
    out = oracle.d_psgd_int8(x0, np.zeros((3, W, 2)), [pair, one_round(), pair])
    assert out["params"][:, :2, 1] == close(np.array([[0.4, 0], [0.4, 0], [-0.1, 0.5]]))
    assert out["residual"][:, 0, 1] == close(np.array([0.4, 0.4, -0.2]))


def test_int8_exchange_keeps_the_mean():
    x0, updates, _ = random_case()
    out = oracle.d_psgd_int8(x0, updates, [one_round(LAZY_RING)] * T)
    assert out["params"].mean(axis=1) == close(
        x0.mean(axis=0) + updates.mean(axis=1).cumsum(axis=0)
    )
