import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from persyn_jax.intervals import Interval
from persyn_jax.routing.strategies import Calibration
from persyn_jax.routing.verdict import (
    hit_at_k,
    judge_router,
    regret_per_prompt,
    verdict_sentence,
)

TEACHERS = ["ann", "bob", "cy", "dee"]
STRATEGIES = ["router", "best_constant", "best_per_source", "knn", "random", "oracle"]


def planted(seed, prompts=120, dimensions=6):
    """Utilities are a hidden linear function of the features; one teacher is better on average."""
    rng = np.random.default_rng(seed)
    feature_ND = rng.normal(size=(prompts, dimensions))
    weight_DM = np.random.default_rng(99).normal(size=(dimensions, len(TEACHERS)))
    total_NM = feature_ND @ weight_DM + np.array([0.0, 0.8, 0.0, 0.0])
    source_N = ["left" if feature[0] < 0 else "right" for feature in feature_ND]
    return Calibration(total_NM, source_N, feature_ND)


def noisy(total_NM, scale):
    return total_NM + np.random.default_rng(5).normal(0, scale, size=total_NM.shape)


def test_a_router_that_knows_the_truth_is_better():
    seen, held_out = planted(0), planted(1)
    metrics = judge_router(seen, held_out, noisy(held_out.total_NM, 0.5), TEACHERS, neighbours=8)
    regret = metrics["regret"]
    assert 0 == regret["oracle"] < regret["router"] < regret["knn"] < regret["best_constant"]
    assert regret["router"] < regret["best_per_source"] < regret["random"]
    assert regret["best_constant"] < regret["random"]
    assert metrics["difference_to_best_constant"]["ci95"][1] < 0
    assert metrics["verdict"].startswith("The router is better than the best constant teacher, bob")
    assert metrics["best_constant"] == "bob"
    assert metrics["hit_at_3"] > metrics["hit_at_1"] > 0.7
    assert metrics["held_out"] == 120


def test_a_router_that_guesses_is_not_better():
    seen, held_out = planted(0), planted(1)
    guesses = np.random.default_rng(7).normal(size=held_out.total_NM.shape)
    metrics = judge_router(seen, held_out, guesses, TEACHERS, neighbours=8)
    assert metrics["verdict"].startswith(("The router is not better than", "Undecided"))
    assert metrics["hit_at_1"] == pytest.approx(0.25, abs=0.12)


def test_a_router_turned_upside_down_is_worse():
    seen, held_out = planted(0), planted(1)
    metrics = judge_router(seen, held_out, -held_out.total_NM, TEACHERS, neighbours=8)
    assert metrics["verdict"].startswith("The router is not better than")
    assert "it is worse" in metrics["verdict"]
    assert metrics["hit_at_1"] == 0


def test_with_nothing_to_find_the_verdict_does_not_claim_it():
    rng = np.random.default_rng(3)
    seen, held_out = (
        Calibration(rng.normal(size=(80, 4)), ["s"] * 80, rng.normal(size=(80, 6)))
        for _ in range(2)
    )
    coefficients = rng.normal(size=(80, 4))
    metrics = judge_router(seen, held_out, coefficients, TEACHERS, neighbours=8)
    assert metrics["verdict"].startswith("Undecided")
    low, high = metrics["difference_to_best_constant"]["ci95"]
    assert low < 0 < high


def test_the_keys_are_the_documented_ones_and_json_takes_them():
    seen, held_out = planted(0), planted(1, prompts=12)
    metrics = judge_router(seen, held_out, held_out.total_NM, TEACHERS, neighbours=3)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert list(metrics) == [
        "held_out",
        "hit_at_1",
        "hit_at_3",
        "regret",
        "regret_ci95",
        "difference_to_best_constant",
        "verdict",
        "best_constant",
        "best_per_source",
    ]
    assert list(metrics["regret"]) == list(metrics["regret_ci95"]) == STRATEGIES
    assert set(metrics["best_per_source"]) == {"left", "right"}
    assert set(metrics["best_per_source"].values()) <= set(TEACHERS)
    for low, high in metrics["regret_ci95"].values():
        assert low <= high
    assert metrics["regret"]["router"] == metrics["regret"]["oracle"] == 0
    assert metrics["hit_at_1"] == metrics["hit_at_3"] == 1


def test_regret_by_hand():
    seen = Calibration(np.array([[1.0, 0.0], [0.0, 3.0]]), ["s", "t"], np.eye(2))
    held_out = Calibration(np.array([[5.0, 1.0], [2.0, 2.5]]), ["s", "t"], np.eye(2))
    coefficient_NM = np.array([[0.0, 1.0], [0.0, 1.0]])
    regret = regret_per_prompt(seen, held_out, coefficient_NM, neighbours=1)
    assert {strategy: values.tolist() for strategy, values in regret.items()} == {
        "router": [4.0, 0.0],
        "best_constant": [4.0, 0.0],
        "best_per_source": [0.0, 0.0],
        "knn": [0.0, 0.0],
        "random": [2.0, 0.25],
        "oracle": [0.0, 0.0],
    }


# Hits


def test_a_tie_shares_best():
    total_NM = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    coefficient_NM = np.array([[0.0, 3.0, 1.0], [3.0, 2.0, 1.0]])
    assert [hit_at_k(total_NM, coefficient_NM, k) for k in (1, 2, 3, 9)] == [0.5, 0.5, 1.0, 1.0]


small = arrays(np.float64, (4, 5), elements=st.integers(0, 3))


@given(small, small)
def test_hits_against_a_plain_loop(total_NM, coefficient_NM):
    hits = []
    for total, coefficient in zip(total_NM.tolist(), coefficient_NM.tolist(), strict=True):
        ranking = sorted(range(5), key=lambda m: (-coefficient[m], m))
        hits.append(any(total[m] == max(total) for m in ranking[:3]))
    assert hit_at_k(total_NM, coefficient_NM, 3) == np.mean(hits)


# The sentence


@pytest.mark.parametrize(
    ("difference", "held_out", "opening"),
    [
        ((-0.2, -0.3, -0.1), 60, "The router is better than the best constant teacher, ann ("),
        (
            (0.2, 0.1, 0.3),
            60,
            "The router is not better than the best constant teacher, ann, it is w",
        ),
        (
            (0.0, 0.0, 0.0),
            60,
            "The router is not better than the best constant teacher, ann, it is e",
        ),
        (
            (-0.1, -0.3, 0.1),
            60,
            "Undecided against the best constant teacher, ann: about 240 prompts",
        ),
        (
            (0.0, -0.2, 0.2),
            60,
            "Undecided against the best constant teacher, ann: it does as well on",
        ),
        (
            (-0.2, -0.3, -0.1),
            9,
            "Undecided against the best constant teacher, ann: too few prompts",
        ),
    ],
)
def test_the_sentence(difference, held_out, opening):
    sentence = verdict_sentence(Interval(*difference), held_out, "ann")
    assert sentence.startswith(opening)
    mean, low, high = (f"{value:+.3f}" for value in difference)
    assert f"{mean}, 95 % interval {low} to {high}, {held_out} held-out prompts" in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
