"""What alpha decides: whom the oracle asks, and how good and how learnable those answers are."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from persyn_jax.records import Reward
from persyn_jax.routing.preferences import reward_matrix
from persyn_jax.routing.rewards import ALPHAS, combine


class Terms(NamedTuple):
    """What totals are made of, of N calibration prompts and M teachers; all float64."""

    quality_NM: np.ndarray
    """As measured; NaN where it is not known."""
    learnability_NM: np.ndarray
    """As measured."""
    quality_standardised_NM: np.ndarray
    learnability_standardised_NM: np.ndarray


class AlphaPoint(NamedTuple):
    """The oracle's routes by the totals of one alpha."""

    alpha: float
    share_M: np.ndarray
    """float64: share of the prompts for each teacher."""
    agreement: float
    """With the routes by the run's own alpha: the share of prompts that go to the same teacher."""
    mean_quality: float | None
    """Of the chosen answers, as measured; None where no quality is known of any."""
    mean_learnability: float


def reward_terms(rewards: Sequence[Reward], teachers: Sequence[str]) -> Terms:
    """The terms as matrices: prompts in their order of appearance, columns as `teachers`."""
    prompt_ids = list(dict.fromkeys(reward.prompt_id for reward in rewards))
    return Terms(
        reward_matrix(rewards, prompt_ids, teachers, "quality"),
        reward_matrix(rewards, prompt_ids, teachers, "learnability"),
        reward_matrix(rewards, prompt_ids, teachers, "quality_standardised"),
        reward_matrix(rewards, prompt_ids, teachers, "learnability_standardised"),
    )


def alpha_sweep(terms: Terms, alpha: float) -> list[AlphaPoint]:
    """One point for each of 0, 0.1, ... 1 and for the run's own alpha, in rising order."""
    own_NM = oracle_shares(_totals(terms, alpha))
    points = []
    for swept in sorted({*ALPHAS, alpha}):
        share_NM = oracle_shares(_totals(terms, swept))
        points.append(
            AlphaPoint(
                alpha=swept,
                share_M=share_NM.mean(axis=0),
                agreement=float(np.minimum(share_NM, own_NM).sum(axis=1).mean()),
                mean_quality=_mean_of_known(terms.quality_NM, share_NM),
                mean_learnability=float((share_NM * terms.learnability_NM).sum(axis=1).mean()),
            )
        )
    return points


def oracle_shares(total_NM: np.ndarray) -> np.ndarray:
    """float64[N, M]: 1 for the best teacher of each prompt; equally good ones share it evenly.

    Ties are the rule at alpha 0, where totals are often right-or-wrong: were they broken by the
    order of the teachers, the first would seem the best.
    """
    best_NM = total_NM == total_NM.max(axis=1, keepdims=True)
    return best_NM / best_NM.sum(axis=1, keepdims=True)


def _totals(terms: Terms, alpha: float) -> np.ndarray:
    return combine(terms.quality_standardised_NM, terms.learnability_standardised_NM, alpha)


def _mean_of_known(value_NM: np.ndarray, weight_NM: np.ndarray) -> float | None:
    known_NM = ~np.isnan(value_NM)
    weight = weight_NM[known_NM].sum()
    return float((value_NM[known_NM] * weight_NM[known_NM]).sum() / weight) if weight else None
