"""From a strategy and what limits it to the routes: one function for every strategy.

Limits are applied in this order: teachers whose licence is refused are left out before the strategy
looks at anything; a prompt with a small margin goes to the fallback; then as few prompts as needed,
those that lose least, move to other teachers until shares and budget are kept.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.routing.optimal_cost import optimal_routes
from persyn_jax.routing.strategies import (
    STRATEGIES,
    Asked,
    Calibration,
    Knowledge,
    StrategyConfig,
    StrategyName,
    best_constant,
)

_PRICE_ROUNDS = 30  # of all teachers' prices, each fitted to the others'
_PRICES = 40  # of cost; tried where both shares and a budget limit the routes


@dataclass(frozen=True)
class Limits:
    """What routes must keep to; each None limits nothing."""

    allowed_M: np.ndarray | None = None
    """bool: which teachers may be asked at all, see `licence_gate`."""
    least_margin: float | None = None
    """A prompt whose best score is less than this above the second goes to the best constant
    teacher of the calibration prompts."""
    most_share_M: np.ndarray | None = None
    """float in [0, 1]: the largest share of the prompts for each teacher; rounded down to whole
    prompts."""
    budget: float | None = None
    """The most that all answers together may cost, in the unit of `cost_NM`."""
    cost_NM: np.ndarray | None = None
    """Expected cost of each answer, in tokens or money (`optimal_cost.expected_usd`)."""


def select(
    strategy: StrategyName,
    seen: Calibration,
    asked: Asked,
    teachers: Sequence[str],
    config: StrategyConfig | None = None,
    limits: Limits | None = None,
    seed: int = 0,
) -> np.ndarray:
    """The index in `teachers` of the one teacher that answers each prompt, int[N].

    Raises ConfigError: the strategy lacks something that it needs, or no routes keep the limits.
    """
    limits = limits or Limits()
    score_NM = scores(strategy, seen, asked, teachers, config, limits.allowed_M, seed)
    return keep_limits(score_NM, seen, limits)


def scores(
    strategy: StrategyName,
    seen: Calibration,
    asked: Asked,
    teachers: Sequence[str],
    config: StrategyConfig | None = None,
    allowed_M: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """The strategy's score of every teacher on each prompt, float64[N, M]: -inf where it may not be
    asked.

    Raises ConfigError as `select` does.
    """
    columns_M = _columns(allowed_M, len(teachers))
    known = Knowledge(
        _of_columns(seen, columns_M),
        asked if len(columns_M) == len(teachers) else _of_columns(asked, columns_M),
        [teachers[int(column)] for column in columns_M],
        config or StrategyConfig(),
        seed,
    )
    open_NM = STRATEGIES[strategy](known)
    if len(columns_M) == len(teachers):
        return np.ascontiguousarray(open_NM, np.float64)
    score_NM = np.full((len(asked.source_N), len(teachers)), -np.inf)
    score_NM[:, columns_M] = open_NM
    return score_NM


def keep_limits(score_NM: np.ndarray, seen: Calibration, limits: Limits) -> np.ndarray:
    """The routes of the best scores that keep the limits, int[N]; the second half of `select`.

    score_NM: of `scores`, with the same teachers allowed. Raises ConfigError where none do.
    """
    columns_M = _columns(limits.allowed_M, score_NM.shape[1])
    open_NM = _taken(score_NM, columns_M)
    if limits.least_margin is not None:
        fallback = best_constant(seen.total_NM[:, columns_M])
        open_NM = _fall_back(open_NM, limits.least_margin, fallback)
    return columns_M[_within_limits(open_NM, limits, columns_M)]


def _columns(allowed_M: np.ndarray | None, teachers: int) -> np.ndarray:
    columns_M = np.arange(teachers) if allowed_M is None else np.flatnonzero(allowed_M)
    if not columns_M.size:
        raise ConfigError("routing: every teacher is left out, so nobody can be asked")
    return columns_M


def licence_gate(licence_M: Sequence[str], refused: Collection[str]) -> np.ndarray:
    """Which teachers may be asked, bool[M]: those whose licence the student's does not refuse.

    Raises ConfigError where none remains.
    """
    allowed_M = np.array([licence not in refused for licence in licence_M], bool)
    if not allowed_M.any():
        raise ConfigError(
            f"the student's licence refuses every teacher's: {', '.join(sorted(set(licence_M)))}"
        )
    return allowed_M


def assign_within_counts(score_NM: np.ndarray, most_M: np.ndarray) -> np.ndarray:
    """Routes of high total score that give teacher m at most `most_M[m]` prompts, int[N].

    Every teacher that is asked too often gets a price, at which it is asked just often enough. Then
    every prompt asks for the teacher of its best score minus price, and what is still too much goes
    by deferred acceptance: a full teacher keeps the prompts that would lose most with their next
    choice, the others ask on. The total is within a few per cent of the highest there is, and
    exactly that where one teacher alone is asked too often.

    score_NM: finite. Raises ConfigError where the counts are fewer than the prompts.
    """
    if most_M.sum() < len(score_NM):
        raise ConfigError(
            f"shares: all teachers together may answer {int(most_M.sum()):,} prompts of "
            f"{len(score_NM):,}; raise the largest shares"
        )
    open_NM = score_NM - _prices(score_NM, most_M)
    while True:
        chosen_N = open_NM.argmax(axis=1)
        crowded = np.flatnonzero(np.bincount(chosen_N, minlength=len(most_M)) > most_M)
        if not crowded.size:
            return chosen_N
        for teacher in crowded.tolist():
            mine = np.flatnonzero(chosen_N == teacher)
            loss_N = _ahead_of_others(open_NM[mine], teacher)
            losers = mine[np.argsort(-loss_N, kind="stable")[int(most_M[teacher]) :]]
            open_NM[losers, teacher] = -np.inf


def _prices(score_NM: np.ndarray, most_M: np.ndarray) -> np.ndarray:
    """A price of each teacher, 0 where it is not asked too often at the prices of the others."""
    price_M = np.zeros(len(most_M))
    limited = np.flatnonzero(most_M < len(score_NM)).tolist()
    net_NM = np.array(score_NM, dtype=np.float64)
    for _ in range(_PRICE_ROUNDS):
        before_M = price_M.copy()
        for teacher in limited:
            net_NM[:, teacher] = score_NM[:, teacher]
            ahead_N = _ahead_of_others(net_NM, teacher)
            first_left_out = len(ahead_N) - 1 - int(most_M[teacher])
            price_M[teacher] = max(0.0, np.partition(ahead_N, first_left_out)[first_left_out])
            net_NM[:, teacher] -= price_M[teacher]
        if np.abs(price_M - before_M).max() <= 1e-3 * np.ptp(score_NM):
            break
    return price_M


def _ahead_of_others(score_NM: np.ndarray, teacher: int) -> np.ndarray:
    before_N, after_N = (
        others_NM.max(axis=1, initial=-np.inf)
        for others_NM in (score_NM[:, :teacher], score_NM[:, teacher + 1 :])
    )
    return score_NM[:, teacher] - np.maximum(before_N, after_N)


def _of_columns(values, columns_M: np.ndarray):
    """`Calibration` or `Asked`, with only some of the teachers."""
    return values._replace(
        **{
            name: value[:, columns_M]
            for name, value in values._asdict().items()
            if name.endswith("_NM") and value is not None
        }
    )


def _taken(value_NM: np.ndarray, columns_M: np.ndarray) -> np.ndarray:
    """Some of the columns; where they are all of them, no copy."""
    return value_NM if len(columns_M) == value_NM.shape[1] else value_NM[:, columns_M]


def _fall_back(score_NM: np.ndarray, least_margin: float, fallback: int) -> np.ndarray:
    """The best score and the fallback's exchanged where the margin is too small."""
    if score_NM.shape[1] == 1:
        return score_NM
    rows = np.arange(len(score_NM))
    best_N = score_NM.argmax(axis=1)
    first_N, result_NM = score_NM[rows, best_N], score_NM.copy()
    result_NM[rows, best_N] = -np.inf
    unsure_N = first_N - result_NM.max(axis=1) < least_margin
    result_NM[rows, best_N] = first_N
    result_NM[rows[unsure_N], best_N[unsure_N]] = score_NM[unsure_N, fallback]
    result_NM[unsure_N, fallback] = first_N[unsure_N]
    return result_NM


def _within_limits(score_NM: np.ndarray, limits: Limits, columns_M: np.ndarray) -> np.ndarray:
    prompts = len(score_NM)
    most_M = None
    if limits.most_share_M is not None:
        # The nudge: a share such as 0.29 of 100 is 28.999999999999996.
        most_M = np.floor(limits.most_share_M[columns_M] * prompts + 1e-9)
    if limits.budget is None:
        return score_NM.argmax(axis=1) if most_M is None else assign_within_counts(score_NM, most_M)
    if limits.cost_NM is None:
        raise ConfigError("budget: needs the expected cost of every answer")
    cost_NM = _taken(limits.cost_NM, columns_M)
    if most_M is None:
        try:
            return optimal_routes(score_NM, cost_NM, limits.budget)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return _within_counts_and_budget(score_NM, most_M, cost_NM, limits.budget)


def _within_counts_and_budget(
    score_NM: np.ndarray, most_M: np.ndarray, cost_NM: np.ndarray, budget: float
) -> np.ndarray:
    """The best found of the routes by score - price * cost, over prices, that keep the budget."""

    def total(value_NM: np.ndarray, chosen_N: np.ndarray) -> float:
        return float(value_NM[np.arange(len(chosen_N)), chosen_N].sum())

    best_N = assign_within_counts(-cost_NM, most_M)
    least = total(cost_NM, best_N)
    if least > budget:
        raise ConfigError(
            f"a budget of {budget:g} is too small: the cheapest routes found within the shares "
            f"cost {least:g}"
        )
    # Prices between one that is too low and one that is high enough, closer and closer.
    low, high = 0.0, np.inf
    price = 0.0
    for _ in range(_PRICES):
        chosen_N = assign_within_counts(score_NM - price * cost_NM, most_M)
        if total(cost_NM, chosen_N) <= budget:
            best_N = max(best_N, chosen_N, key=lambda routes_N: total(score_NM, routes_N))
            high = price
        else:
            low = price
        if high == 0:
            break
        doubled = 2 * low or np.ptp(score_NM) / max(np.ptp(cost_NM), 1e-300)
        price = doubled if high == np.inf else (low + high) / 2
    return best_N
