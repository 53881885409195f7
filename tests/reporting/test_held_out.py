"""Strategies and losses on held-out prompts against the verdict and a loop over the records."""

import dataclasses

import numpy as np
import pytest

from persyn_jax.reporting import build_report
from persyn_jax.reporting.held_out import compare_strategies, held_out_calibration, largest_losses
from persyn_jax.routing.strategies import STRATEGIES, StrategyConfig


@pytest.fixture(scope="module")
def held_out(run_records):
    return held_out_calibration(run_records)


@pytest.fixture(scope="module")
def compared(held_out, run_records):
    return compare_strategies(held_out, list(run_records.teachers), StrategyConfig(neighbours=5), 0)


def test_only_held_out_prompts_are_judged_and_the_others_fitted_to(held_out, run_records):
    assert held_out.prompt_ids == run_records.router["held_out_prompts"]
    total_of = {(r.prompt_id, r.teacher): r.total for r in run_records.rewards}
    expected = [[total_of[p, t] for t in run_records.teachers] for p in held_out.prompt_ids]
    assert held_out.total_NM.tolist() == expected
    assert len(held_out.seen.total_NM) == run_records.router["trained_on"]
    coefficients_of = {route.prompt_id: route.coefficients for route in run_records.routes}
    assert held_out.coefficient_NM.tolist() == [coefficients_of[p] for p in held_out.prompt_ids]


def test_the_order_of_the_held_out_ids_does_not_matter(held_out, run_records):
    router = run_records.router | {"held_out_prompts": run_records.router["held_out_prompts"][::-1]}
    again = held_out_calibration(dataclasses.replace(run_records, router=router))
    assert again.prompt_ids == held_out.prompt_ids


def test_regret_is_what_the_verdict_says_of_the_same_strategies(compared, run_records):
    outcomes, _ = compared
    for strategy, regret in run_records.router["regret"].items():
        assert outcomes[strategy].regret == pytest.approx(regret, abs=1e-6), strategy
    difference = run_records.router["difference_to_best_constant"]
    mean, low, high = outcomes["best_constant"].difference_to_router
    # Regret of the router minus the constant's is the constant's total minus the router's.
    assert [mean, low, high] == pytest.approx([difference["mean"], *difference["ci95"]])


def test_every_strategy_has_an_outcome_or_a_reason(compared):
    outcomes, left_out = compared
    assert [name for name in STRATEGIES if name in {**outcomes, **left_out}] == list(STRATEGIES)
    assert left_out == {
        "family_strong": "strategy family_strong: family must name teachers of the student's own"
    }
    assert outcomes["router"].difference_to_router == (0, 0, 0)
    assert outcomes["oracle"].regret == 0 == min(outcome.regret for outcome in outcomes.values())


def test_without_quality_the_strategies_that_need_it_say_so(held_out, run_records):
    seen = held_out.seen._replace(quality_NM=np.full_like(held_out.seen.total_NM, np.nan))
    outcomes, left_out = compare_strategies(
        held_out._replace(seen=seen), list(run_records.teachers), StrategyConfig(), 0
    )
    assert set(left_out) == {"strong", "mix", "family_strong", "car"}
    assert "no quality is known" in left_out["strong"]
    assert "router" in outcomes


def test_the_largest_losses_come_first_and_are_those_of_a_loop(held_out, run_records):
    teachers = list(run_records.teachers)
    losses = {}
    for prompt_id, coefficients, totals in zip(
        held_out.prompt_ids, held_out.coefficient_NM, held_out.total_NM, strict=True
    ):
        losses[prompt_id] = max(totals) - totals[list(coefficients).index(max(coefficients))]
    found = largest_losses(held_out, teachers, 10)
    assert len(found) == 10
    assert [each.loss for each in found] == sorted(losses.values(), reverse=True)[:10]
    for each in found:
        totals = held_out.total_NM[held_out.prompt_ids.index(each.prompt_id)]
        assert each.loss == losses[each.prompt_id]
        assert each.oracle == teachers[totals.argmax()]
        assert each.loss == totals.max() - totals[teachers.index(each.router)] > 0


def test_a_router_that_is_always_right_loses_nowhere(held_out, run_records):
    right = held_out._replace(coefficient_NM=held_out.total_NM)
    assert largest_losses(right, list(run_records.teachers), 10) == []


def test_reliability_is_of_held_out_pairs_and_empty_where_there_is_none(run_records, held_out):
    found = build_report(run_records)["router"]["reliability"]
    pairs = sum(
        a != b
        for totals in held_out.total_NM.tolist()
        for n, a in enumerate(totals)
        for b in totals[:n]
    )
    assert sum(found["pairs"]) == pairs
    assert 0 not in found["pairs"]
    right = np.dot(found["pairs"], found["right"])
    wins = [
        (c[i] - c[j]) * (t[i] - t[j]) > 0
        for c, t in zip(held_out.coefficient_NM, held_out.total_NM, strict=True)
        for i in range(4)
        for j in range(i)
        if t[i] != t[j]
    ]
    assert right == pytest.approx(sum(wins))
    level = [dataclasses.replace(reward, total=0.0) for reward in run_records.rewards]
    empty = build_report(dataclasses.replace(run_records, rewards=level))["router"]["reliability"]
    assert empty["pairs"] == []
    assert empty["expected_error"] is None
