"""All strategies through one function, and routes that keep their limits."""

import itertools
from typing import get_args

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from persyn_jax.config import ConfigError
from persyn_jax.records import Answer
from persyn_jax.routing.rewards import make_rewards
from persyn_jax.routing.selection import Limits, assign_within_counts, licence_gate, select
from persyn_jax.routing.strategies import (
    STRATEGIES,
    Asked,
    Calibration,
    StrategyConfig,
    StrategyName,
    car,
    make_calibration,
)

TEACHERS = ["ann", "bob", "cy"]
PROMPTS = 40


def seen_of(rng, prompts=30, teachers=3):
    return Calibration(
        total_NM=rng.normal(size=(prompts, teachers)),
        source_N=["left", "right"] * (prompts // 2),
        feature_ND=rng.normal(size=(prompts, 4)),
        quality_NM=rng.random((prompts, teachers)),
        learnability_NM=-rng.random((prompts, teachers)),
    )


def asked_of(rng, prompts=PROMPTS, teachers=3):
    return Asked(
        source_N=["left", "right"] * (prompts // 2),
        feature_ND=rng.normal(size=(prompts, 4)),
        coefficient_NM=rng.normal(size=(prompts, teachers)),
        total_NM=rng.normal(size=(prompts, teachers)),
    )


RNG = np.random.default_rng(0)
SEEN, ASKED = seen_of(RNG), asked_of(RNG)
CONFIG = StrategyConfig(family=["bob", "cy"], clusters=3)
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def routes(strategy, config=CONFIG, seen=SEEN, asked=ASKED, seed=0, **limits):
    return select(strategy, seen, asked, TEACHERS, config, Limits(**limits), seed)


def total(value_NM, chosen_N):
    return value_NM[np.arange(len(chosen_N)), chosen_N].sum()


# Strategies


def test_every_name_has_a_strategy():
    assert set(STRATEGIES) == set(get_args(StrategyName))


def test_router_and_oracle_take_the_best():
    assert routes("router").tolist() == ASKED.coefficient_NM.argmax(axis=1).tolist()
    assert routes("oracle").tolist() == ASKED.total_NM.argmax(axis=1).tolist()


HAND = Calibration(
    total_NM=np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]),
    source_N=["left", "right"],
    feature_ND=np.eye(2, 4),
    quality_NM=np.array([[0.5, 0.2, 0.8], [np.nan, 0.4, 0.6]]),
    learnability_NM=np.array([[-1.0, -1.0, -3.0], [-1.0, -2.0, -5.0]]),
)


def test_constant_strategies_by_hand():
    # mean quality 0.5, 0.3, 0.7; mean loss 1, 1.5, 4; CAR with beta 1: 0.25, 0.12, 0.14
    assert set(routes("strong", seen=HAND)) == {2}
    assert set(routes("strong", StrategyConfig(strong="bob"), seen=HAND)) == {1}
    assert set(routes("car", seen=HAND)) == {0}
    assert set(routes("car", StrategyConfig(car_beta=0), seen=HAND)) == {2}
    assert set(routes("best_constant", seen=HAND)) == {1}
    assert set(routes("family_strong", StrategyConfig(family=["ann", "bob"]), seen=HAND)) == {0}
    assert routes("best_per_source", seen=HAND)[:2].tolist() == [0, 1]


def test_car_by_hand():
    found_M = car(HAND.quality_NM, HAND.learnability_NM, beta=2.0)
    np.testing.assert_allclose(found_M, [0.5 / 3, 0.3 / 4, 0.7 / 9])
    with pytest.raises(ConfigError, match="at most 0"):
        car(HAND.quality_NM, -HAND.learnability_NM, beta=2.0)
    with pytest.raises(ConfigError, match="not below 0"):
        car(HAND.quality_NM - 1, HAND.learnability_NM, beta=2.0)


def test_car_leaves_the_loss_of_unusable_answers_out():
    with_unusable_NM = HAND.learnability_NM.copy()
    with_unusable_NM[1, 2] = np.nan
    found_M = car(HAND.quality_NM, with_unusable_NM, beta=2.0)
    np.testing.assert_allclose(found_M, [0.5 / 3, 0.3 / 4, 0.7 / 7])
    with_unusable_NM[0, 2] = np.nan
    with pytest.raises(ConfigError, match="usable answer of every teacher"):
        car(HAND.quality_NM, with_unusable_NM, beta=2.0)


def test_a_calibration_has_log_likelihoods_of_usable_answers_or_none():
    answers = [
        Answer(
            key=name,
            prompt_id="p",
            teacher=name,
            sample_index=0,
            text="7",
            finish_reason=reason,
            prompt_tokens=1,
            completion_tokens=1,
            usd=None,
            licence="MIT",
            error=None,
        )
        for name, reason in (("a", "stop"), ("b", "length"))
    ]
    rewards = make_rewards(answers, [1.0, 0.0], [-2.0, -0.1], [1, 1], alpha=0.4)
    given = ["p"], ["s"], rewards, ["a", "b"], np.ones((1, 3))
    of_likelihoods = make_calibration(*given, "mean_log_likelihood")
    np.testing.assert_array_equal(of_likelihoods.learnability_NM, [[-2.0, np.nan]])
    np.testing.assert_array_equal(of_likelihoods.quality_NM, [[1.0, 0.0]])
    assert make_calibration(*given, "rsr").learnability_NM is None


@given(st.floats(0, 1), st.integers(0, 3))
def test_mix_has_its_share_exactly(share, seed):
    chosen_N = routes("mix", StrategyConfig(mix_share=share, strong="bob"), seed=seed)
    assert (chosen_N == 1).sum() == round(share * PROMPTS)


def test_mix_and_random_are_drawn_anew_with_another_seed_only():
    for strategy in ("mix", "random"):
        assert routes(strategy).tolist() == routes(strategy).tolist()
        assert routes(strategy).tolist() != routes(strategy, seed=1).tolist()
    counts = np.bincount(routes("random", asked=asked_of(np.random.default_rng(1), 3000)))
    assert (abs(counts - 1000) < 100).all()


def test_clusters_find_separate_groups():
    """Three directions, each with a best teacher of its own, one of them rare."""
    rng = np.random.default_rng(3)
    group_N = np.repeat([0, 1, 2], [60, 30, 6])
    feature_ND = np.eye(3, 5)[group_N] + 0.05 * rng.normal(size=(96, 5))
    total_NM = np.eye(3)[group_N] + 0.3 * rng.normal(size=(96, 3))
    seen = Calibration(total_NM, ["s"] * 96, feature_ND)
    asked = Asked(["s"] * 3, feature_ND=7 * np.eye(3, 5))
    assert select("clusters", seen, asked, TEACHERS, StrategyConfig(clusters=3)).tolist() == [
        0,
        1,
        2,
    ]
    one = select("clusters", seen, asked, TEACHERS, StrategyConfig(clusters=1))
    assert one.tolist() == [total_NM.mean(axis=0).argmax()] * 3


@given(st.integers(1, 12), st.integers(0, 5))
def test_clusters_of_few_or_equal_prompts_are_no_error(clusters, seed):
    rng = np.random.default_rng(seed)
    feature_ND = rng.integers(-1, 2, size=(6, 2)).astype(float)
    seen = Calibration(rng.normal(size=(6, 3)), ["s"] * 6, feature_ND)
    asked = Asked(["s"] * 4, feature_ND=rng.integers(-1, 2, size=(4, 2)).astype(float))
    chosen_N = select("clusters", seen, asked, TEACHERS, StrategyConfig(clusters=clusters))
    assert ((chosen_N >= 0) & (chosen_N < 3)).all()


@pytest.mark.parametrize(
    ("strategy", "lacking", "match"),
    [
        ("router", {"coefficient_NM": None}, "router: needs the router's coefficients"),
        ("oracle", {"total_NM": None}, "oracle: needs the answers of all teachers"),
        ("knn", {"feature_ND": None}, "knn: needs features"),
        ("clusters", {"feature_ND": None}, "clusters: needs features"),
    ],
)
def test_what_a_strategy_lacks_is_named(strategy, lacking, match):
    with pytest.raises(ConfigError, match=match):
        routes(strategy, asked=ASKED._replace(**lacking))


def test_what_is_not_known_of_calibration_is_named():
    with pytest.raises(ConfigError, match="strong: needs the quality"):
        routes("strong", seen=SEEN._replace(quality_NM=None))
    unknown = SEEN._replace(quality_NM=np.full_like(SEEN.quality_NM, np.nan))
    with pytest.raises(ConfigError, match="no quality is known of some teacher"):
        routes("strong", seen=unknown)
    with pytest.raises(ConfigError, match="car: needs mean log-likelihoods"):
        routes("car", seen=SEEN._replace(learnability_NM=None))
    with pytest.raises(ConfigError, match="family must name"):
        routes("family_strong", StrategyConfig())
    with pytest.raises(ConfigError, match="no teacher 'dee' may be asked, only ann, bob, cy"):
        routes("strong", StrategyConfig(strong="dee"))


# Limits


@every_strategy
def test_a_refused_teacher_is_never_asked_and_changes_nothing_for_the_others(strategy):
    allowed_M = licence_gate(["MIT", "closed", "Apache-2.0"], refused={"closed"})
    assert allowed_M.tolist() == [True, False, True]
    config = StrategyConfig(family=["cy"], clusters=3)
    chosen_N = routes(strategy, config, allowed_M=allowed_M)
    assert 1 not in chosen_N

    def without_bob(values):
        return values._replace(
            **{k: v[:, [0, 2]] for k, v in values._asdict().items() if k.endswith("_NM")}
        )

    alone_N = select(strategy, without_bob(SEEN), without_bob(ASKED), ["ann", "cy"], config)
    assert chosen_N.tolist() == np.array([0, 2])[alone_N].tolist()


def test_a_gate_that_leaves_nobody():
    with pytest.raises(ConfigError, match="refuses every teacher's: MIT, closed"):
        licence_gate(["closed", "MIT"], {"closed", "MIT"})
    with pytest.raises(ConfigError, match="every teacher is left out"):
        routes("router", allowed_M=np.zeros(3, bool))
    with pytest.raises(ConfigError, match="no teacher 'bob' may be asked, only ann, cy"):
        routes("strong", StrategyConfig(strong="bob"), allowed_M=np.array([True, False, True]))


@every_strategy
def test_no_teacher_has_more_than_its_share(strategy):
    most_share_M = np.array([0.29, 0.4, 0.5])
    chosen_N = routes(strategy, most_share_M=most_share_M)
    assert (np.bincount(chosen_N, minlength=3) <= most_share_M * PROMPTS).all()


def test_shares_that_do_not_bind_change_nothing():
    assert routes("router", most_share_M=np.ones(3)).tolist() == routes("router").tolist()


def test_shares_that_cannot_be():
    with pytest.raises(ConfigError, match="may answer 36 prompts of 40"):
        routes("router", most_share_M=np.array([0.3, 0.3, 0.3]))


scores = arrays(np.float64, (5, 3), elements=st.integers(0, 9))


@given(scores, st.integers(0, 5))
def test_with_one_crowded_teacher_the_assignment_is_the_best(score_NM, most):
    most_M = np.array([most, 5, 5])
    chosen_N = assign_within_counts(score_NM, most_M)
    best = max(
        total(score_NM, list(chosen))
        for chosen in itertools.product(range(3), repeat=5)
        if chosen.count(0) <= most
    )
    assert total(score_NM, chosen_N) == best


@given(scores, st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)))
def test_counts_are_kept_and_nobody_envies(score_NM, most):
    assume(sum(most) >= 5)
    chosen_N = assign_within_counts(score_NM, np.array(most))
    counts = np.bincount(chosen_N, minlength=3)
    assert (counts <= most).all()
    for n, m in itertools.product(range(5), range(3)):  # a better teacher is only missed if full
        assert score_NM[n, m] <= score_NM[n, chosen_N[n]] or counts[m] == most[m]


def test_the_assignment_is_near_the_best_with_every_teacher_limited():
    rng = np.random.default_rng(0)
    score_NM = rng.normal(size=(400, 8)) + rng.normal(size=8)
    chosen_N = assign_within_counts(score_NM, np.full(8, 52))
    seats_NS = np.repeat(score_NM, 52, axis=1)
    best = seats_NS[linear_sum_assignment(seats_NS, maximize=True)].sum()
    even = score_NM.mean(axis=1).sum()  # what a draw would have
    assert total(score_NM, chosen_N) - even > 0.98 * (best - even)


COST_NM = np.array([1.0, 2.0, 5.0]) * np.random.default_rng(2).uniform(0.5, 1.5, (PROMPTS, 3))
CHEAPEST = COST_NM.min(axis=1).sum()


@every_strategy
@pytest.mark.parametrize("more", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("most_share_M", [None, np.array([1.0, 0.5, 0.3])])
def test_the_budget_is_kept(strategy, more, most_share_M):
    budget = CHEAPEST * (1 + more) * (1 + 1e-12)
    chosen_N = routes(strategy, budget=budget, cost_NM=COST_NM, most_share_M=most_share_M)
    assert total(COST_NM, chosen_N) <= budget
    if most_share_M is not None:
        assert (np.bincount(chosen_N, minlength=3) <= most_share_M * PROMPTS).all()


def test_more_budget_is_never_worse_and_enough_changes_nothing():
    for most_share_M in (None, np.array([1.0, 0.5, 0.3])):
        gained = [
            total(
                ASKED.coefficient_NM,
                routes("router", budget=budget, cost_NM=COST_NM, most_share_M=most_share_M),
            )
            for budget in np.linspace(CHEAPEST + 1e-9, COST_NM.max(axis=1).sum(), 12)
        ]
        assert (np.diff(gained) >= -1e-9).all()
        assert gained[0] < gained[-1]
        assert gained[-1] == total(
            ASKED.coefficient_NM, routes("router", most_share_M=most_share_M)
        )


def test_shares_and_budget_together_are_near_the_best():
    rng = np.random.default_rng(4)
    for _ in range(10):
        score_NM, cost_NM = rng.normal(size=(6, 3)), rng.uniform(1, 5, size=(6, 3))
        budget = 1.3 * cost_NM.min(axis=1).sum()
        asked = Asked(["s"] * 6, coefficient_NM=score_NM)
        limits = Limits(most_share_M=np.full(3, 0.5), budget=budget, cost_NM=cost_NM)
        try:
            chosen_N = select("router", SEEN, asked, TEACHERS, limits=limits)
        except ConfigError:
            continue
        values = [
            total(score_NM, list(c))
            for c in itertools.product(range(3), repeat=6)
            if max(np.bincount(c)) <= 3 and total(cost_NM, list(c)) <= budget
        ]
        # It beats most of what is allowed: the gap of whole prompts is large in a set of six.
        assert total(score_NM, chosen_N) >= np.quantile(values, 0.8)


def test_budgets_that_cannot_be():
    with pytest.raises(ConfigError, match="too small: the cheapest routes cost"):
        routes("router", budget=0.5 * CHEAPEST, cost_NM=COST_NM)
    share = np.full(3, 0.4)
    with pytest.raises(ConfigError, match="too small: the cheapest routes found within the shares"):
        routes("router", budget=1.01 * CHEAPEST, cost_NM=COST_NM, most_share_M=share)
    with pytest.raises(ConfigError, match="budget: needs the expected cost"):
        routes("router", budget=1.0)


def test_a_small_margin_goes_to_the_best_constant():
    coefficient_NM = np.array([[0.0, 1.0, 0.95], [0.0, 1.0, 0.5], [0.3, 0.3, 0.3], [0.99, 1.0, 0]])
    seen = SEEN._replace(total_NM=SEEN.total_NM + np.array([9.0, 0.0, 0.0]))
    asked = Asked(["s"] * 4, coefficient_NM=coefficient_NM)
    limits = Limits(least_margin=0.1)
    assert select("router", seen, asked, TEACHERS, limits=limits).tolist() == [0, 1, 0, 0]
    assert select("router", seen, asked, TEACHERS).tolist() == [1, 1, 0, 1]
    everything = Limits(least_margin=np.inf)
    assert set(select("router", seen, asked, TEACHERS, limits=everything)) == {0}
