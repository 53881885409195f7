"""The router and every other strategy on the calibration prompts that nothing was fitted to."""

from typing import NamedTuple

import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.intervals import Interval, mean_ci95, paired_difference_ci95
from persyn_jax.reporting.run_records import RunRecords
from persyn_jax.routing.preferences import reward_matrix
from persyn_jax.routing.selection import select
from persyn_jax.routing.strategies import (
    STRATEGIES,
    Asked,
    Calibration,
    StrategyConfig,
    StrategyName,
    make_calibration,
    route_by_oracle,
    route_by_router,
)


class HeldOut(NamedTuple):
    """The calibration prompts in two parts, both with the rewards of all teachers."""

    prompt_ids: list[str]
    """Of the N prompts that judge the router."""
    asked: Asked
    """These prompts, with nothing left out."""
    total_NM: np.ndarray
    """float64: their totals."""
    coefficient_NM: np.ndarray
    """float64: the router's coefficients on them."""
    seen: Calibration
    """The prompts that the router was trained on, for the other strategies to be fitted to."""


def held_out_calibration(records: RunRecords) -> HeldOut:
    """The calibration prompts as the router's training split them."""
    prompts = [prompt for prompt in records.prompts if prompt.split == "calibration"]
    held_out_ids = set(records.router["held_out_prompts"])
    apart = [prompt.id in held_out_ids for prompt in prompts]
    held_out_N, seen_N = np.flatnonzero(apart), np.flatnonzero(np.invert(apart))
    ids, teachers = [prompt.id for prompt in prompts], list(records.teachers)
    total_NM = reward_matrix(records.rewards, ids, teachers)
    coefficients_of = {route.prompt_id: route.coefficients for route in records.routes}
    coefficient_NM = np.array([coefficients_of[ids[row]] for row in held_out_N])
    return HeldOut(
        prompt_ids=[ids[row] for row in held_out_N],
        asked=Asked(
            source_N=[prompts[row].source for row in held_out_N],
            feature_ND=records.state_ND[held_out_N],
            coefficient_NM=coefficient_NM,
            total_NM=total_NM[held_out_N],
        ),
        total_NM=total_NM[held_out_N],
        coefficient_NM=coefficient_NM,
        seen=make_calibration(
            [ids[row] for row in seen_N],
            [prompts[row].source for row in seen_N],
            records.rewards,
            teachers,
            records.state_ND[seen_N],
            records.learnability,
        ),
    )


class Outcome(NamedTuple):
    """What one strategy gets on the held-out prompts."""

    total: Interval
    """Mean total."""
    regret: float
    """The oracle's mean total minus its own."""
    difference_to_router: Interval
    """Its mean total minus the router's, paired by prompt: below 0 the router is better."""


def compare_strategies(
    held_out: HeldOut, teachers: list[str], config: StrategyConfig, seed: int
) -> tuple[dict[StrategyName, Outcome], dict[StrategyName, str]]:
    """(outcome by strategy, why the others have none), in the order of `STRATEGIES`."""
    totals: dict[StrategyName, np.ndarray] = {}
    left_out: dict[StrategyName, str] = {}
    rows = np.arange(len(held_out.total_NM))
    for strategy in STRATEGIES:
        try:
            teacher_N = select(strategy, held_out.seen, held_out.asked, teachers, config, seed=seed)
        except ConfigError as error:  # it lacks something, and says what
            left_out[strategy] = str(error)
            continue
        totals[strategy] = held_out.total_NM[rows, teacher_N]
    totals["random"] = held_out.total_NM.mean(axis=1)  # expected: one draw would be luck
    oracle = held_out.total_NM.max(axis=1).mean()
    outcomes = {
        strategy: Outcome(
            total=mean_ci95(total_N),
            regret=float(oracle - total_N.mean()),
            difference_to_router=paired_difference_ci95(total_N, totals["router"]),
        )
        for strategy, total_N in totals.items()
    }
    return outcomes, left_out


class Disagreement(NamedTuple):
    """A held-out prompt that the router gives to another teacher than the oracle."""

    prompt_id: str
    router: str
    """The teacher that the router asks."""
    oracle: str
    """The best teacher."""
    loss: float
    """Its total minus that of the router's teacher."""


def largest_losses(held_out: HeldOut, teachers: list[str], most: int) -> list[Disagreement]:
    """The prompts that cost the router most, at most so many, the worst first; ties in order."""
    rows = np.arange(len(held_out.total_NM))
    router_N = route_by_router(held_out.coefficient_NM)
    oracle_N = route_by_oracle(held_out.total_NM)
    loss_N = held_out.total_NM[rows, oracle_N] - held_out.total_NM[rows, router_N]
    worst = np.argsort(-loss_N, kind="stable")[:most]
    return [
        Disagreement(
            prompt_id=held_out.prompt_ids[row],
            router=teachers[router_N[row]],
            oracle=teachers[oracle_N[row]],
            loss=float(loss_N[row]),
        )
        for row in worst.tolist()
        if loss_N[row] > 0
    ]
