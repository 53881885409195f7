"""What length has to do with it: of prompts with who is asked, of responses with their reward."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import ndtri

from persyn_jax.intervals import Interval
from persyn_jax.records import Prompt, Reward

QUARTERS = ("shortest", "shorter", "longer", "longest")
BINS = 5
MIN_ANSWERS = 10
"""With fewer answers no trend is told."""

Trend = Literal["rises", "falls", "none seen", "too few answers"]


def prompt_characters(prompt: Prompt) -> int:
    """Characters of all its messages. (Tokens would depend on who reads it.)"""
    return sum(len(message["content"]) for message in prompt.messages)


def quarters(lengths: Sequence[int]) -> dict[str, np.ndarray]:
    """The rows of each quarter by length, int[n], from the shortest to the longest.

    Equal lengths stay together, so quarters may differ in size; one that stays empty is left out.
    """
    length_N = np.asarray(lengths)
    quarter_N = np.searchsorted(np.quantile(length_N, [0.25, 0.5, 0.75]), length_N, side="left")
    rows_of = {name: np.flatnonzero(quarter_N == q) for q, name in enumerate(QUARTERS)}
    return {name: rows for name, rows in rows_of.items() if rows.size}


class LengthTrend(NamedTuple):
    """How the total of an answer goes with its length."""

    answers: int
    correlation: Interval | None
    """Spearman's; None where it is not defined."""
    trend: Trend
    tokens_K: list[float]
    """Mean length of the shortest part of the answers, the next, and so on: BINS parts of equal
    size, or as many as there are answers."""
    total_K: list[float]
    """Mean total of each part."""


def length_trend(rewards: Sequence[Reward]) -> LengthTrend:
    """Of the usable answers: unusable ones are worst whatever their length."""
    usable = [reward for reward in rewards if reward.usable]
    tokens_N = np.array([reward.response_tokens for reward in usable], float)
    total_N = np.array([reward.total for reward in usable], float)
    order_N = np.argsort(tokens_N, kind="stable")
    parts = np.array_split(order_N, min(BINS, len(usable))) if usable else []
    correlation = rank_correlation(tokens_N, total_N)
    return LengthTrend(
        answers=len(usable),
        correlation=correlation,
        trend=_trend(correlation, len(usable)),
        tokens_K=[float(tokens_N[part].mean()) for part in parts],
        total_K=[float(total_N[part].mean()) for part in parts],
    )


def rank_correlation(a_N: np.ndarray, b_N: np.ndarray) -> Interval | None:
    """Spearman's rank correlation with its 95 % interval; None below four pairs, or where either
    side is constant.

    The interval is Fisher's with the variance 1.06 / (N - 3) (Fieller, Hartley and Pearson 1957).
    """
    from scipy.stats import rankdata  # which takes seconds, and not every command needs it

    if len(a_N) < 4 or np.ptp(a_N) == 0 or np.ptp(b_N) == 0:
        return None
    correlation = float(np.corrcoef(rankdata(a_N), rankdata(b_N))[0, 1].clip(-1, 1))
    if abs(correlation) > 1 - 1e-12:  # where Fisher's transform is infinite
        return Interval(round(correlation), round(correlation), round(correlation))
    half = ndtri(0.975) * np.sqrt(1.06 / (len(a_N) - 3))
    middle = np.arctanh(correlation)
    return Interval(correlation, float(np.tanh(middle - half)), float(np.tanh(middle + half)))


def _trend(correlation: Interval | None, answers: int) -> Trend:
    if answers < MIN_ANSWERS:
        return "too few answers"
    if correlation is None or correlation.low <= 0 <= correlation.high:
        return "none seen"
    return "rises" if correlation.mean > 0 else "falls"
