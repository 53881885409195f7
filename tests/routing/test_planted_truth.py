"""A router study on synthetic teachers of which the truth is known finds it, and nothing else."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize
from scipy.stats import spearmanr

from persyn_jax.models import router
from persyn_jax.routing.normalisation import NORMALISERS
from persyn_jax.routing.planted import PlantedConfig, as_calibration, planted
from persyn_jax.routing.preferences import make_preferences
from persyn_jax.routing.rewards import combine
from persyn_jax.routing.router_study import (
    add_teachers,
    fit_bilinear_head,
    gain_by_alpha,
    learning_curve,
    mean_regret,
    rank_correlation,
    reliability,
)
from persyn_jax.routing.selection import select
from persyn_jax.routing.strategies import Asked, Calibration, StrategyConfig
from persyn_jax.routing.verdict import judge_router
from persyn_jax.training.losses import Pairs, bradley_terry_loss

TEACHERS = ["ann", "bob", "cy", "dee", "eve"]
PENALTY = 1e-3  # of the squared kernel: a few prompts must not give endless coefficients


@functools.partial(jax.jit, static_argnums=1)
def loss_and_slope(flat, teachers, batch):
    def loss(flat):
        kernel_MD = flat[:-teachers].reshape(teachers, -1)
        head = {"kernel": kernel_MD, "bias": flat[-teachers:]}
        return bradley_terry_loss(head, batch)[0] + PENALTY * (kernel_MD**2).sum()

    return jax.value_and_grad(loss)(flat)


def fit_head(teachers, feature_ND, preferences):
    """The project's coefficient head and loss, taken to the minimum."""
    batch = Pairs(
        pooled=feature_ND[preferences.prompt_index_P].astype(np.float32),
        winner=preferences.winner_P,
        loser=preferences.loser_P,
        weights=preferences.weight_P,
    )

    def value_and_slope(flat):
        value, slope = loss_and_slope(flat.astype(np.float32), teachers, batch)
        return float(value), np.asarray(slope, np.float64)

    start = np.zeros(teachers * (feature_ND.shape[1] + 1))
    flat = minimize(value_and_slope, start, jac=True, method="L-BFGS-B").x.astype(np.float32)
    head = {"kernel": flat[:-teachers].reshape(teachers, -1), "bias": flat[-teachers:]}
    return lambda other_ND: np.asarray(router.coefficients(head, other_ND.astype(np.float32)))


def fit(feature_ND, preferences):
    return fit_head(len(TEACHERS), feature_ND, preferences)


def study(seed, prompts=400, held_out=600, **found):
    """(seen, held out, the router's coefficients on the held-out prompts, their expected gain)."""
    config = PlantedConfig(**found)
    world, other = planted(config, prompts, seed), planted(config, held_out, seed, draw=1)
    predict = fit(world.feature_ND, make_preferences(world.gain_NM))
    return (
        as_calibration(world),
        as_calibration(other),
        predict(other.feature_ND),
        other.expected_gain_NM,
    )


# The truth is found


@pytest.mark.parametrize("seed", range(4))
def test_the_ranking_of_the_teachers_is_recovered(seed):
    _, _, coefficient_NM, expected_NM = study(seed, between_teachers=1.0, within_prompts=0.5)
    truth_M = expected_NM.mean(axis=0)
    found, true = np.argsort(coefficient_NM.mean(axis=0)), np.argsort(truth_M)
    # Two teachers that hardly differ may change places.
    np.testing.assert_allclose(truth_M[found], truth_M[true], atol=0.1)
    assert spearmanr(coefficient_NM.mean(axis=0), truth_M).statistic > 0.85


@pytest.mark.parametrize("seed", range(4))
def test_the_routers_choice_is_the_truly_best_teacher(seed):
    _, _, coefficient_NM, expected_NM = study(seed, prompts=1500)
    assert (coefficient_NM.argmax(axis=1) == expected_NM.argmax(axis=1)).mean() > 0.85


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_the_strategies(seed):
    seen, held_out, coefficient_NM, _ = study(seed)
    metrics = judge_router(seen, held_out, coefficient_NM, TEACHERS, neighbours=16)
    regret = metrics["regret"]
    assert 0 == regret["oracle"] <= regret["router"] < regret["best_constant"] < regret["random"]
    assert regret["router"] < regret["knn"] < regret["best_constant"]
    assert regret["best_per_source"] <= regret["best_constant"]
    assert metrics["verdict"].startswith("The router is better than the best constant teacher")


def test_the_order_through_the_one_function_of_all_strategies():
    seen, held_out, coefficient_NM, _ = study(0)
    asked = Asked(held_out.source_N, held_out.feature_ND, coefficient_NM, held_out.total_NM)
    regret = {
        strategy: mean_regret(
            held_out.total_NM,
            select(strategy, seen, asked, TEACHERS, StrategyConfig(clusters=16, neighbours=16)),
        )
        for strategy in ("oracle", "router", "knn", "clusters", "best_constant", "random")
    }
    assert list(regret) == sorted(regret, key=regret.__getitem__)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.4])
def test_a_specialist_that_is_right_now_and_then_is_asked_only_if_differences_weigh(alpha):
    """In one of two sources it alone is ever right, 4 times in 10, and else the least natural."""
    rng = np.random.default_rng(0)
    special_N = np.arange(600) % 2 == 0
    quality_NM = np.zeros((600, 5))
    quality_NM[:, 0] = special_N & (rng.random(600) < 0.4)
    quality_NM[:, 1] = ~special_N
    learnability_NM = rng.normal(size=(600, 5)) - np.array([2, 0, 0, 0, 0])
    # A right answer leads by 1 - alpha, a natural one by at most a fraction of alpha.
    total_NM = (1 - alpha) * quality_NM + 0.1 * alpha * learnability_NM
    feature_ND = np.where(special_N, 1.0, -1.0)[:, None]
    regret = {}
    for weights in ("equal", "difference"):
        preferences = make_preferences(total_NM, weights)
        teacher_N = fit(feature_ND, preferences)(feature_ND).argmax(axis=1)
        assert (teacher_N[~special_N] == 1).all(), "it is right in every answer"
        assert (teacher_N[special_N] == 0).all() == (weights == "difference")
        regret[weights] = mean_regret(total_NM, teacher_N)
    best_N = np.where(special_N, 0, 1)
    assert regret["difference"] == mean_regret(total_NM, best_N) < regret["equal"] - 0.05


def test_regret_falls_with_pairs_and_flattens():
    sizes = [10, 40, 160, 640]
    curves = []
    for seed in range(4):
        world, other = (planted(PlantedConfig(), size, seed, size) for size in (640, 1000))
        curves.append(learning_curve(fit, as_calibration(world), as_calibration(other), sizes))
    assert [point.prompts for point in curves[0]] == sizes
    assert [point.pairs for point in curves[0]] == [10 * size for size in sizes]  # 5 choose 2
    mean = np.mean(curves, axis=0)
    regret, log_loss, hits = mean[:, 4], mean[:, 5], mean[:, 2]
    assert (np.diff(regret) < 0).all()
    assert (np.diff(log_loss) < 0).all()
    assert (np.diff(hits) > 0).all()
    assert regret[0] - regret[1] > regret[1] - regret[2] > regret[2] - regret[3]
    assert (mean[:, 3] > mean[:, 2]).all()


# A teacher that is added by its answers to a few prompts


def test_an_added_teacher_comes_near_to_full_retraining():
    sizes, teachers = [4, 12, 100], 3
    world, other = (
        as_calibration(planted(PlantedConfig(teachers=teachers), count, 0, draw))
        for count, draw in ((100, 0), (1000, 1))
    )
    own_fit = functools.partial(fit_head, teachers)
    found = np.array(add_teachers(own_fit, world, other, sizes)).reshape(teachers, len(sizes), 5)
    assert found[:, :, 0].tolist() == [[m] * len(sizes) for m in range(teachers)]
    assert (found[:, :, 1] == sizes).all()
    without, bilinear, retrained = found.mean(axis=0)[:, 2:].T
    limit = learning_curve(own_fit, world, other, [100])[0].regret
    # More anchors: ever nearer to the router that knows all of the new teacher's answers.
    assert (np.diff(bilinear) < 0).all()
    assert bilinear[1] < without[1]  # of 4 anchors in 8 dimensions it may be worse than nothing
    assert abs(bilinear[-1] - limit) < 0.1 * (without[0] - limit)
    # Trained on the same answers, it is the same router.
    np.testing.assert_allclose(retrained[-1], limit, atol=1e-3)


def linear_teachers(prompts, teachers=4, dimensions=3):
    """(features, rewards) without noise."""
    rng = np.random.default_rng(0)
    feature_ND = rng.normal(size=(prompts, dimensions))
    return feature_ND, feature_ND @ rng.normal(size=(dimensions, teachers)) + rng.normal(
        size=teachers
    )


def test_a_bilinear_head_finds_what_is_linear():
    """A router whose coefficients are three times the rewards, and a teacher that it never saw."""
    feature_ND, reward_NM = linear_teachers(60)
    shift_N1 = np.random.default_rng(1).normal(size=(60, 1))  # means nothing
    head = fit_bilinear_head(
        feature_ND[:20], reward_NM[:20, :3], feature_ND, 3 * reward_NM[:, :3] + shift_N1
    )
    relative_NM = reward_NM - reward_NM[:, :3].mean(axis=1, keepdims=True)
    found_NM = head.coefficients(feature_ND, relative_NM[:20])
    np.testing.assert_allclose(found_NM, 3 * relative_NM, atol=0.02 * np.ptp(relative_NM) * 3)


def test_a_bilinear_head_is_linear_in_the_rewards_and_in_the_prompt():
    feature_ND, reward_NM = linear_teachers(40)
    head = fit_bilinear_head(feature_ND[:6], reward_NM[:6, :3], feature_ND, reward_NM[:, :3])
    one, other = (head.coefficients(feature_ND, reward_NM[:6, [m]]) for m in (0, 3))
    both = head.coefficients(feature_ND, 2 * reward_NM[:6, [0]] - reward_NM[:6, [3]])
    np.testing.assert_allclose(both, 2 * one - other, atol=1e-9)
    between = head.coefficients(feature_ND[::2] / 3 + feature_ND[1::2] * 2 / 3, reward_NM[:6, [3]])
    np.testing.assert_allclose(between, other[::2] / 3 + other[1::2] * 2 / 3, atol=1e-9)


def test_a_router_that_knows_nothing_gives_an_added_teacher_no_lead():
    feature_ND, reward_NM = linear_teachers(40)
    head = fit_bilinear_head(feature_ND[:6], reward_NM[:6, :3], feature_ND, np.zeros((40, 3)))
    assert (head.coefficients(feature_ND, reward_NM[:6, [3]]) == 0).all()


# Reward against measured gain


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    one, noise = rng.integers(0, 9, size=(5, 6)).astype(float), rng.normal(size=(5, 6))
    found = rank_correlation(one, one + 2 * noise)
    expected = spearmanr(one.ravel(), (one + 2 * noise).ravel()).statistic
    assert found.spearman == pytest.approx(expected)
    assert found == rank_correlation(one, one + 2 * noise)


def test_the_p_value_is_that_of_all_orders_of_the_teachers():
    """Of 3! orders only the given one and, on the other side, its reverse are as far from 0."""
    one = np.arange(3.0)[:, None] + np.zeros(4)
    assert rank_correlation(one, one**3) == pytest.approx((1, 2 / 6))
    assert rank_correlation(one, -one) == pytest.approx((-1, 2 / 6))
    assert np.isnan(rank_correlation(np.zeros((3, 3)), np.arange(9.0).reshape(3, 3))).all()


@pytest.mark.parametrize("teachers", [5, 9])
def test_what_hangs_together_by_teacher_is_not_taken_for_evidence(teachers):
    """Rewards and gains that have nothing to do with each other, but are alike in all slices."""
    rng = np.random.default_rng(7)
    found, plain = 0, 0
    for _ in range(100):
        one, other = (
            rng.normal(size=(teachers, 1)) + 0.3 * rng.normal(size=(teachers, 4)) for _ in range(2)
        )
        found += rank_correlation(one, other).p_value < 0.05
        plain += spearmanr(one.ravel(), other.ravel()).pvalue < 0.05
    assert found <= 11, "5 are expected"
    assert plain > 25, "as if all were independent"


# Where there is nothing to find


@pytest.mark.parametrize("between_teachers", [0.0, 0.5])
def test_without_anything_to_gain_the_verdict_claims_nothing(between_teachers):
    """Teachers differ by a constant at most, so no prompt tells which one is better."""
    verdicts, differences = [], []
    for seed in range(6):
        seen, held_out, coefficient_NM, _ = study(
            seed, held_out=200, within_prompts=0.0, between_teachers=between_teachers
        )
        metrics = judge_router(seen, held_out, coefficient_NM, TEACHERS, neighbours=16)
        verdicts.append(metrics["verdict"])
        differences.append(metrics["difference_to_best_constant"]["mean"])
    assert not any(verdict.startswith("The router is better") for verdict in verdicts)
    assert abs(np.mean(differences)) < 0.05


# The weight of learnability

ALPHAS = np.linspace(0, 1, 11)


@pytest.mark.parametrize("method", ["z_score", "min_max"])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.7, 1.0])
def test_the_planted_alpha_is_the_best(alpha, method):
    world = planted(PlantedConfig(alpha=alpha), 4000, seed=1)
    terms = [
        np.apply_along_axis(NORMALISERS[method], 1, term_NM)
        for term_NM in (world.quality_NM, world.learnability_NM)
    ]
    gain = gain_by_alpha(*terms, world.gain_NM, ALPHAS)
    assert abs(ALPHAS[gain.argmax()] - alpha) < 0.11
    peak = int(gain.argmax())
    assert (np.diff(gain[: peak + 1]) > 0).all()
    assert (np.diff(gain[peak:]) < 0).all()
    if 0 < alpha < 1:
        assert gain.max() > 1.05 * max(gain[0], gain[-1])


def test_a_router_too_gains_most_at_the_planted_alpha():
    config = PlantedConfig(alpha=0.4)
    world, other = planted(config, 400, seed=2), planted(config, 1500, seed=2, draw=1)
    gained = []
    for alpha in (0.0, 0.4, 1.0):
        total_NM = combine(world.quality_NM, world.learnability_NM, alpha)
        coefficient_NM = fit(world.feature_ND, make_preferences(total_NM))(other.feature_ND)
        routes_N = coefficient_NM.argmax(axis=1)
        gained.append(other.expected_gain_NM[np.arange(1500), routes_N].mean())
    assert gained[1] > 1.05 * max(gained[0], gained[2])


# Calibration of the coefficients


def test_reliability_by_hand():
    # Pairs: 3 to 1 and right; equal, so half right; 3 to 1 and wrong; equal totals, so no pair.
    coefficient_NM = np.log([[1.0, 3.0], [1.0, 1.0], [1.0, 3.0], [1.0, 9.0]])
    total_NM = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
    found = reliability(coefficient_NM, total_NM, bins=4)
    assert found.pairs_K.tolist() == [1, 0, 2, 0]
    np.testing.assert_allclose(found.confidence_K, [0.5, np.nan, 0.75, np.nan])
    np.testing.assert_allclose(found.right_K, [0.5, np.nan, 0.5, np.nan])
    assert found.expected_error == pytest.approx(2 / 3 * 0.25)
    assert found.log_loss == pytest.approx(-np.log(0.75 * 0.5 * 0.25) / 3)


def test_true_coefficients_are_calibrated_and_exaggerated_ones_are_not():
    """Preferences drawn from the Bradley-Terry model itself."""
    rng = np.random.default_rng(0)
    coefficient_NM = rng.normal(size=(20_000, 2)) * 1.5
    wins_N = rng.random(20_000) < 1 / (1 + np.exp(coefficient_NM[:, 1] - coefficient_NM[:, 0]))
    total_NM = np.stack([wins_N, ~wins_N], axis=1).astype(float)
    true, doubled = (reliability(scale * coefficient_NM, total_NM) for scale in (1, 2))
    assert true.expected_error < 0.015
    assert doubled.expected_error > 0.05
    assert true.log_loss < doubled.log_loss
    np.testing.assert_allclose(true.right_K, true.confidence_K, atol=0.05)


def test_a_trained_router_knows_how_sure_it_may_be():
    _, held_out, coefficient_NM, _ = study(0, prompts=1500, held_out=2000)
    found = reliability(coefficient_NM, held_out.total_NM)
    assert found.expected_error < 0.05
    assert reliability(3 * coefficient_NM, held_out.total_NM).expected_error > 0.05
    assert found.log_loss < np.log(2)


@given(arrays(np.float64, (6, 3), elements=st.integers(0, 3)), st.floats(-5, 5))
def test_only_differences_of_coefficients_count(coefficient_NM, shift):
    total_NM = np.random.default_rng(0).normal(size=(6, 3))
    found, moved = (reliability(c, total_NM) for c in (coefficient_NM, coefficient_NM + shift))
    assert found.log_loss == pytest.approx(moved.log_loss)
    assert found.pairs_K.sum() == moved.pairs_K.sum() == 18


def test_without_pairs_there_is_nothing_to_judge():
    with pytest.raises(ValueError, match="all totals are equal"):
        reliability(np.zeros((2, 2)), np.zeros((2, 2)))


# The planted world itself


def test_a_world_is_the_same_again_and_other_prompts_of_it_are_other():
    config = PlantedConfig()
    world, again, other = (planted(config, 500, 3, draw) for draw in (0, 0, 1))
    np.testing.assert_array_equal(world.gain_NM, again.gain_NM)
    assert not np.isin(world.feature_ND, other.feature_ND).any()
    # The teachers are the same: what the first prompts say of them holds on the others.
    solved, *_ = np.linalg.lstsq(
        np.c_[world.feature_ND, np.ones(500)], world.expected_gain_NM, rcond=None
    )
    np.testing.assert_allclose(
        np.c_[other.feature_ND, np.ones(500)] @ solved, other.expected_gain_NM
    )
    assert set(world.source_N) == {f"source {n}" for n in range(config.sources)}
    assert isinstance(as_calibration(world), Calibration)
