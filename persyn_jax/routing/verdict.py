"""Is routing worth it? The router against its baselines on held-out prompts, in one sentence."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from persyn_jax.intervals import Interval, mean_ci95, paired_difference_ci95
from persyn_jax.routing.strategies import (
    Calibration,
    best_constant,
    best_per_source,
    route_by_neighbours,
    route_by_oracle,
    route_by_router,
    route_by_source,
)

MIN_HELD_OUT = 10
"""Below so many held-out prompts a bootstrap interval is too narrow to decide anything."""


def judge_router(
    seen: Calibration,
    held_out: Calibration,
    coefficient_NM: np.ndarray,
    teachers: Sequence[str],
    neighbours: int,
) -> dict[str, Any]:
    """The router against every baseline on held-out prompts, as values that JSON takes.

    seen: the calibration prompts that the router was trained on; the baselines are fitted to them.
    held_out: calibration prompts that nothing was fitted to.
    coefficient_NM: the router's coefficients on the held-out prompts, columns as `teachers`.
    neighbours: how many the kNN baseline looks at.

    The keys are stable:

        held_out           number of held-out prompts
        hit_at_1           share of them on which the router's first teacher is an oracle-best one
        hit_at_3           share of them on which one of the router's first three is
        regret             strategy -> mean of the oracle's total minus its own; strategies are
                           router, best_constant, best_per_source, knn, random (expected), oracle
        regret_ci95        strategy -> [low, high] of that mean
        difference_to_best_constant
                           {mean, ci95: [low, high]} of the router's regret minus the best
                           constant's, paired by prompt: below 0 the router is better
        verdict            one sentence, see `verdict_sentence`
        best_constant      name of the best single teacher of the seen prompts
        best_per_source    source -> name of the best teacher of its seen prompts
    """
    regret = regret_per_prompt(seen, held_out, coefficient_NM, neighbours)
    intervals = {strategy: mean_ci95(regret_N) for strategy, regret_N in regret.items()}
    difference = paired_difference_ci95(regret["router"], regret["best_constant"])
    constant = teachers[best_constant(seen.total_NM)]
    per_source = best_per_source(seen.total_NM, seen.source_N)
    return {
        "held_out": len(held_out.total_NM),
        "hit_at_1": hit_at_k(held_out.total_NM, coefficient_NM, 1),
        "hit_at_3": hit_at_k(held_out.total_NM, coefficient_NM, 3),
        "regret": {strategy: interval.mean for strategy, interval in intervals.items()},
        "regret_ci95": {strategy: interval.ci95 for strategy, interval in intervals.items()},
        "difference_to_best_constant": {
            "mean": difference.mean,
            "ci95": difference.ci95,
        },
        "verdict": verdict_sentence(difference, len(held_out.total_NM), constant),
        "best_constant": constant,
        "best_per_source": {source: teachers[m] for source, m in per_source.items()},
    }


def hit_at_k(total_NM: np.ndarray, coefficient_NM: np.ndarray, k: int) -> float:
    """Share of prompts with an oracle-best teacher among the k highest coefficients.

    All teachers of the highest total are oracle-best; equal coefficients rank in teacher order.
    """
    best_NM = total_NM == total_NM.max(axis=1, keepdims=True)
    top_Nk = np.argsort(-coefficient_NM, axis=1, kind="stable")[:, :k]
    return float(np.take_along_axis(best_NM, top_Nk, axis=1).any(axis=1).mean())


def regret_per_prompt(
    seen: Calibration, held_out: Calibration, coefficient_NM: np.ndarray, neighbours: int
) -> dict[str, np.ndarray]:
    """For each strategy the oracle's total minus its own on every held-out prompt, float64[N]."""
    total_NM = held_out.total_NM
    prompts = np.arange(len(total_NM))
    constant = best_constant(seen.total_NM)
    knn_N = route_by_neighbours(seen, held_out.feature_ND, neighbours)
    total_of = {
        "router": total_NM[prompts, route_by_router(coefficient_NM)],
        "best_constant": total_NM[:, constant],
        "best_per_source": total_NM[prompts, route_by_source(seen, held_out.source_N)],
        "knn": total_NM[prompts, knn_N],
        "random": total_NM.mean(axis=1),
        "oracle": total_NM[prompts, route_by_oracle(total_NM)],
    }
    return {strategy: total_of["oracle"] - total_N for strategy, total_N in total_of.items()}


def verdict_sentence(difference: Interval, held_out: int, constant: str) -> str:
    """One sentence on the router's regret minus the best constant's over `held_out` prompts.

    It opens with "The router is better than", "The router is not better than" or "Undecided".
    """
    numbers = (
        f"regret difference {difference.mean:+.3f}, 95 % interval {difference.low:+.3f} to "
        f"{difference.high:+.3f}, {held_out} held-out prompts"
    )
    against = f"the best constant teacher, {constant}"
    if held_out < MIN_HELD_OUT:
        return (
            f"Undecided against {against}: too few prompts, {MIN_HELD_OUT} are needed ({numbers})."
        )
    if difference.high < 0:
        return f"The router is better than {against} ({numbers})."
    if difference.low > 0:
        return f"The router is not better than {against}, it is worse ({numbers})."
    if difference.low == difference.high == 0:
        return f"The router is not better than {against}, it is equal on every prompt ({numbers})."
    return f"Undecided against {against}: {_needed(difference, held_out)} ({numbers})."


def _needed(difference: Interval, held_out: int) -> str:
    """At how many prompts the interval, narrowing with their square root, would leave 0 out."""
    if difference.mean == 0:
        return "it does as well on average, so more prompts may show no difference either"
    half_width = (difference.high - difference.low) / 2
    needed = max(math.ceil(held_out * (half_width / difference.mean) ** 2), held_out + 1)
    return f"about {needed:,} prompts are needed to show a difference of this size"
