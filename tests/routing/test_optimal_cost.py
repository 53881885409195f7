"""Against every assignment of tiny sets, and against a solver of linear programmes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linprog

from persyn_jax.routing import optimal_cost
from persyn_jax.routing.optimal_cost import (
    expected_usd,
    most_reward,
    optimal_routes,
    pareto_curve,
    routes_after,
    steps_within,
    thin,
)

shapes = st.tuples(st.integers(1, 4), st.integers(1, 4))


@st.composite
def tiny(draw):
    """(reward, cost) of few prompts and teachers, with ties; perhaps some teacher left out."""
    shape = draw(shapes)
    reward_NM = draw(arrays(np.float64, shape, elements=st.integers(-3, 6)))
    cost_NM = draw(arrays(np.float64, shape, elements=st.integers(0, 5)))
    left_out_NM = draw(arrays(bool, shape))
    left_out_NM[:, draw(st.integers(0, shape[1] - 1))] = False
    return np.where(left_out_NM, -np.inf, reward_NM), cost_NM


def every_assignment(reward_NM, cost_NM):
    """(total cost, total reward) of all assignments."""
    prompts, teachers = reward_NM.shape
    rows = np.arange(prompts)
    for chosen in itertools.product(range(teachers), repeat=prompts):
        yield cost_NM[rows, list(chosen)].sum(), reward_NM[rows, list(chosen)].sum()


def of(value_NM, teacher_N):
    return value_NM[np.arange(len(teacher_N)), teacher_N].sum()


@given(tiny())
def test_no_assignment_beats_the_routes_after_any_step(case):
    reward_NM, cost_NM = case
    curve = pareto_curve(reward_NM, cost_NM)
    points = list(every_assignment(reward_NM, cost_NM))
    for steps in range(len(curve.prompt_S) + 1):
        routes_N = routes_after(curve, steps)
        assert of(cost_NM, routes_N) == curve.cost_K[steps]
        assert of(reward_NM, routes_N) == curve.reward_K[steps]
        best = max(reward for cost, reward in points if cost <= curve.cost_K[steps])
        assert curve.reward_K[steps] == best
    assert curve.cost_K[0] == min(cost for cost, reward in points if reward > -np.inf)
    assert curve.reward_K[-1] == max(reward for _, reward in points)


@given(tiny())
def test_the_curve_rises_by_less_and_less(case):
    curve = pareto_curve(*case)
    costs, rewards = np.diff(curve.cost_K), np.diff(curve.reward_K)
    assert (costs > 0).all()
    assert (rewards > 0).all()
    slopes = rewards / costs
    assert (np.diff(slopes) <= 1e-12).all()


@given(tiny(), st.integers(0, 20))
def test_routes_under_a_budget(case, budget):
    reward_NM, cost_NM = case
    curve = pareto_curve(reward_NM, cost_NM)
    if budget < curve.cost_K[0]:
        with pytest.raises(ValueError, match="too small"):
            optimal_routes(reward_NM, cost_NM, budget)
        return
    routes_N = optimal_routes(reward_NM, cost_NM, budget)
    assert of(cost_NM, routes_N) <= budget
    found, bound = of(reward_NM, routes_N), most_reward(curve, budget)
    best = max(r for cost, r in every_assignment(reward_NM, cost_NM) if cost <= budget)
    assert found <= best <= bound + 1e-12
    assert bound - found < max(np.diff(curve.reward_K), default=1)


@settings(max_examples=40)
@given(tiny(), st.integers(0, 20))
def test_the_bound_is_the_linear_programmes(case, budget):
    reward_NM, cost_NM = case
    curve = pareto_curve(reward_NM, cost_NM)
    if budget < curve.cost_K[0]:
        return
    prompts, teachers = reward_NM.shape
    solved = linprog(
        -np.where(np.isfinite(reward_NM), reward_NM, 0).ravel(),
        A_ub=cost_NM.reshape(1, -1),
        b_ub=[budget],
        A_eq=np.kron(np.eye(prompts), np.ones(teachers)),
        b_eq=np.ones(prompts),
        bounds=[(0, None if allowed else 0) for allowed in np.isfinite(reward_NM).ravel()],
    )
    assert most_reward(curve, budget) == pytest.approx(-solved.fun, abs=1e-7)


@given(tiny(), st.floats(0.01, 3))
def test_every_price_gives_a_point_of_the_curve(case, price):
    """argmax reward - price * cost, which is what a Lagrangian sweep would do."""
    reward_NM, cost_NM = case
    curve = pareto_curve(reward_NM, cost_NM)
    routes_N = (reward_NM - price * cost_NM).argmax(axis=1)
    cost, reward = of(cost_NM, routes_N), of(reward_NM, routes_N)
    assert reward == pytest.approx(most_reward(curve, cost))


def test_by_hand():
    # The second prompt gains 4 for 1, then the first 3 for 2; the dear 9 buys too little to be used
    # before that. Teacher 1 of the first prompt is under the line from 0 to 2.
    reward_NM = np.array([[0.0, 1.0, 3.0], [1.0, 5.0, 6.0]])
    cost_NM = np.array([[1.0, 2.0, 3.0], [0.0, 1.0, 9.0]])
    curve = pareto_curve(reward_NM, cost_NM)
    assert curve.cheapest_N.tolist() == [0, 0]
    assert curve.prompt_S.tolist() == [1, 0, 1]
    assert curve.teacher_S.tolist() == [1, 2, 2]
    assert curve.cost_K.tolist() == [1, 2, 4, 12]
    assert curve.reward_K.tolist() == [1, 5, 8, 9]
    assert steps_within(curve, 3.9) == 1
    assert most_reward(curve, 3) == 6.5
    assert optimal_routes(reward_NM, cost_NM, 3).tolist() == [0, 1]
    assert thin(curve, 2) == [{"cost": 1.0, "reward": 1.0}, {"cost": 12.0, "reward": 9.0}]


def test_expected_usd_by_hand():
    read_NM, answered_NM = np.array([[100, 100], [0, 10]]), np.array([[10, 50], [10, 60]])
    found_NM = expected_usd(read_NM, answered_NM, [2.0, 0.0], [4.0, 8.0], "ab")
    np.testing.assert_allclose(found_NM, np.array([[240, 400], [40, 480]]) / 1e6)
    with pytest.raises(ValueError, match="price of teacher 'b' is not known"):
        expected_usd(read_NM, answered_NM, [1.0, 1.0], [1.0, None], "ab")


def test_what_does_not_fit_is_passed_over_for_what_does():
    reward_NM = np.array([[0.0, 10.0], [0.0, 1.0]])
    cost_NM = np.array([[0.0, 5.0], [0.0, 1.0]])
    assert optimal_routes(reward_NM, cost_NM, 1).tolist() == [0, 1]


def test_a_hundred_thousand_prompts():
    rng = np.random.default_rng(0)
    reward_NM = rng.normal(size=(100_000, 19))
    cost_NM = rng.uniform(1, 100, size=19) * rng.uniform(0.5, 2, size=(100_000, 19))
    curve = pareto_curve(reward_NM, cost_NM)
    budget = (curve.cost_K[0] + curve.cost_K[-1]) / 3
    routes_N = optimal_routes(reward_NM, cost_NM, budget)
    assert of(cost_NM, routes_N) <= budget * (1 + 1e-12)
    assert of(reward_NM, routes_N) == pytest.approx(most_reward(curve, budget), rel=1e-4)
    assert len(thin(curve, 50)) == 50


@pytest.mark.parametrize(
    ("reward", "cost", "match"),
    [
        ([[0.0, 1.0]], [[0.0]], r"\[N, M\]"),
        ([[0.0, 1.0]], [[0.0, -1.0]], "at least 0"),
        ([[0.0, 1.0]], [[0.0, np.inf]], "finite"),
        ([[0.0, np.nan]], [[0.0, 1.0]], "numbers"),
        ([[0.0, 1.0], [-np.inf, -np.inf]], [[0.0, 1.0]] * 2, "prompt 1: every teacher is left out"),
    ],
)
def test_what_cannot_be(reward, cost, match):
    with pytest.raises(ValueError, match=match):
        pareto_curve(np.array(reward), np.array(cost))


def test_a_few_prompts_at_a_time_make_the_same_curve(monkeypatch):
    """Ties among prompts too: whole numbers, so that many slopes are equal."""
    rng = np.random.default_rng(0)
    reward_NM, cost_NM = rng.integers(0, 9, (2, 50, 5)).astype(float)
    whole = pareto_curve(reward_NM, cost_NM)
    monkeypatch.setattr(optimal_cost, "_CHUNK", 7)
    for one, other in zip(whole, pareto_curve(reward_NM, cost_NM), strict=True):
        np.testing.assert_array_equal(one, other)
