"""Is the router any good, and would more data help: numbers beside `verdict`'s Hit@k and regret."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from persyn_jax.routing.preferences import Preferences, make_preferences
from persyn_jax.routing.rewards import combine
from persyn_jax.routing.strategies import Calibration, route_by_oracle, route_by_router
from persyn_jax.routing.verdict import hit_at_k
from persyn_jax.streams import numpy_stream

Predict = Callable[[np.ndarray], np.ndarray]
"""From features [N, D] to Bradley-Terry coefficients [N, M]."""
Fit = Callable[[np.ndarray, Preferences], Predict]
"""Trains a router on the features [N, D] of prompts and their preferences."""


class Reliability(NamedTuple):
    """How sure the router is of a pair, against how often it is right, in K bins of equal width."""

    confidence_K: np.ndarray
    """float64: mean of sigmoid(|c_i - c_j|) in the bin, from 0.5 to 1; NaN in an empty bin."""
    right_K: np.ndarray
    """float64: share of the bin's pairs that the router orders as the totals do; NaN if empty."""
    pairs_K: np.ndarray
    """int."""
    expected_error: float
    """Mean over pairs of |confidence - right| of their bin (ECE); 0 is calibrated."""
    log_loss: float
    """Mean of -log sigmoid(c_winner - c_loser), in nats a pair: log 2 is a coin."""


def reliability(coefficient_NM: np.ndarray, total_NM: np.ndarray, bins: int = 10) -> Reliability:
    """Calibration of the coefficients against the preferences of held-out prompts.

    Equal coefficients count as half right; equal totals make no pair. Raises ValueError where there
    is no pair at all.
    """
    pairs = make_preferences(total_NM)
    if not len(pairs.winner_P):
        raise ValueError("all totals are equal, so there is no pair to judge the coefficients by")
    rows_P = pairs.prompt_index_P
    lead_P = coefficient_NM[rows_P, pairs.winner_P] - coefficient_NM[rows_P, pairs.loser_P]
    lead_P = lead_P.astype(np.float64)
    confidence_P = expit(np.abs(lead_P))
    right_P = np.where(lead_P == 0, 0.5, lead_P > 0)

    bin_P = np.minimum(((confidence_P - 0.5) * 2 * bins).astype(int), bins - 1)
    pairs_K = np.bincount(bin_P, minlength=bins)

    def bin_means(value_P: np.ndarray) -> np.ndarray:
        sum_K = np.bincount(bin_P, weights=value_P, minlength=bins)
        return np.divide(sum_K, pairs_K, out=np.full(bins, np.nan), where=pairs_K > 0)

    confidence_K, right_K = bin_means(confidence_P), bin_means(right_P)
    gap_K = np.where(pairs_K > 0, np.abs(confidence_K - right_K), 0)
    return Reliability(
        confidence_K=confidence_K,
        right_K=right_K,
        pairs_K=pairs_K,
        expected_error=float((gap_K * pairs_K).sum() / pairs_K.sum()),
        log_loss=float(np.logaddexp(0, -lead_P).mean()),
    )


class LearningPoint(NamedTuple):
    """A router trained on some of the calibration prompts, on held-out ones."""

    prompts: int
    pairs: int
    hit_at_1: float
    hit_at_3: float
    regret: float
    """Mean of the oracle's total minus the router's."""
    log_loss: float
    """See `Reliability`."""


def learning_curve(
    fit: Fit, seen: Calibration, held_out: Calibration, prompts: Sequence[int], seed: int = 0
) -> list[LearningPoint]:
    """One router for each number of calibration prompts; smaller sets lie in the larger ones.

    prompts: each at least 1 and at most those of `seen`. Which ones is drawn with `seed`.
    """
    order_N = numpy_stream(seed, "learning curve").permutation(len(seen.total_NM))
    points = []
    for count in prompts:
        chosen = np.sort(order_N[:count])
        preferences = make_preferences(seen.total_NM[chosen])
        coefficient_NM = fit(seen.feature_ND[chosen], preferences)(held_out.feature_ND)
        points.append(
            LearningPoint(
                prompts=count,
                pairs=len(preferences.winner_P),
                hit_at_1=hit_at_k(held_out.total_NM, coefficient_NM, 1),
                hit_at_3=hit_at_k(held_out.total_NM, coefficient_NM, 3),
                regret=mean_regret(held_out.total_NM, route_by_router(coefficient_NM)),
                log_loss=reliability(coefficient_NM, held_out.total_NM).log_loss,
            )
        )
    return points


def mean_regret(total_NM: np.ndarray, teacher_N: np.ndarray) -> float:
    """Mean of the oracle's total minus that of the given routes; 0 is the best there is."""
    chosen_N = total_NM[np.arange(len(total_NM)), teacher_N]
    return float((total_NM.max(axis=1) - chosen_N).mean())


def gain_by_alpha(
    quality_NM: np.ndarray,
    learnability_NM: np.ndarray,
    gain_NM: np.ndarray,
    alphas: Sequence[float],
) -> np.ndarray:
    """Mean gain of the answers that the reward with each alpha likes best, float64[alphas].

    quality_NM, learnability_NM: standardised. gain_NM: measured or planted. This is the alpha sweep
    at the oracle's routes, so without the router's errors.
    """
    rows = np.arange(len(gain_NM))
    routes = [route_by_oracle(combine(quality_NM, learnability_NM, alpha)) for alpha in alphas]
    return np.array([gain_NM[rows, teacher_N].mean() for teacher_N in routes])
