"""Is the router any good, and would more data help: numbers beside `verdict`'s Hit@k and regret."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from persyn_jax.routing.preferences import PairWeights, Preferences, make_preferences
from persyn_jax.routing.rewards import combine
from persyn_jax.routing.strategies import Calibration, route_by_oracle, route_by_router
from persyn_jax.routing.verdict import hit_at_k
from persyn_jax.streams import numpy_stream

Predict = Callable[[np.ndarray], np.ndarray]
"""From features [N, D] to Bradley-Terry coefficients [N, M]."""
Fit = Callable[[np.ndarray, Preferences], Predict]
"""Trains a router on the features [N, D] of prompts and their preferences."""
_ALL_ORDERS, _DRAWN_ORDERS = 7, 5000


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
    fit: Fit,
    seen: Calibration,
    held_out: Calibration,
    prompts: Sequence[int],
    seed: int = 0,
    draw: int = 0,
    pair_weights: PairWeights = "equal",
) -> list[LearningPoint]:
    """One router for each number of calibration prompts; smaller sets lie in the larger ones.

    prompts: each at least 1 and at most those of `seen`. Which ones is drawn with `seed`; another
    `draw` draws others.
    """
    order_N = numpy_stream(seed, "learning curve", draw).permutation(len(seen.total_NM))
    points = []
    for count in prompts:
        chosen = np.sort(order_N[:count])
        preferences = make_preferences(seen.total_NM[chosen], pair_weights)
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


class BilinearHead(NamedTuple):
    """The coefficient of a teacher as a bilinear form of the prompt's features and the teacher's
    reward vector; see `fit_bilinear_head`."""

    anchor_KD: np.ndarray
    """float64: features of the anchor prompts, minus their mean."""
    mean_D: np.ndarray
    inverse_KK: np.ndarray
    """(K + lambda I)^-1."""
    scale: float
    """Coefficients a unit of reward."""

    def coefficients(self, feature_ND: np.ndarray, reward_KB: np.ndarray) -> np.ndarray:
        """float64[N, B] of teachers with these reward vectors."""
        mean_B = reward_KB.mean(axis=0)
        weight_DB = self.anchor_KD.T @ (self.inverse_KK @ (reward_KB - mean_B))
        return self.scale * (mean_B + (feature_ND - self.mean_D) @ weight_DB)


_PENALTIES = 10.0 ** np.arange(-3, 3.5, 0.5)  # times the mean eigenvalue of K


def fit_bilinear_head(
    anchor_KD: np.ndarray, reward_KB: np.ndarray, feature_ND: np.ndarray, coefficient_NB: np.ndarray
) -> BilinearHead:
    """What turns a teacher's rewards on K anchor prompts into its coefficient on any prompt,
    learned from B teachers that a router knows.

    A teacher's embedding is its reward vector e [K] on the anchors (as in UniRoute, arXiv
    2502.08773, whose embedding is the error on validation prompts), each reward minus the known
    teachers' mean on the same prompt. With A [K, D] the anchors' features minus their mean a:

        c(x, e) = s * (mean(e) + (x - a)^T W (e - mean(e))),   W = A^T (A A^T + lambda I)^-1

    which is linear in x and in e: the ridge regression of the rewards on the anchors' features.
    s, at least 0, and lambda make it nearest (least squares) to the coefficients that the router
    gives its known teachers, minus their mean, on the prompts of `feature_ND`. So a teacher that
    joins costs K answers and no training; at least 2 anchors.

    reward_KB, coefficient_NB: of the known teachers, not yet minus their means.
    """
    anchor_KD, feature_ND = anchor_KD.astype(np.float64), feature_ND.astype(np.float64)
    mean_D = anchor_KD.mean(axis=0)
    anchor_KD = anchor_KD - mean_D
    reward_KB = _relative(reward_KB, reward_KB)
    target_NB = _relative(coefficient_NB, coefficient_NB)
    eigenvalue_K, vector_KK = np.linalg.eigh(anchor_KD @ anchor_KD.T)
    unit = eigenvalue_K.mean() or 1.0
    best, least = None, np.inf
    for penalty in _PENALTIES:
        inverse_KK = (vector_KK / (eigenvalue_K.clip(0) + penalty * unit)) @ vector_KK.T
        head = BilinearHead(anchor_KD, mean_D, inverse_KK, 1.0)
        guess_NB = head.coefficients(feature_ND, reward_KB)
        size = float((guess_NB**2).sum())
        scale = max(float((guess_NB * target_NB).sum()) / size, 0.0) if size else 0.0
        error = float(((scale * guess_NB - target_NB) ** 2).sum())
        if error < least:
            best, least = head._replace(scale=scale), error
    assert best is not None, "one penalty is the best"
    return best


def _relative(value_XB: np.ndarray, known_XB: np.ndarray) -> np.ndarray:
    """Minus the mean of the known teachers on the same prompt: only differences mean something."""
    return value_XB - known_XB.mean(axis=1, keepdims=True)


class AddedTeacher(NamedTuple):
    """A teacher that joins a router trained on the others, by its answers to some anchor prompts.

    Regret is the mean of the oracle's total, with the new teacher among those asked, minus that of
    the routes, on held-out prompts.
    """

    teacher: int
    anchors: int
    """Prompts that the new teacher has answered."""
    without: float
    """Regret of the router that never asks it."""
    bilinear: float
    """Regret where its coefficient is that of `fit_bilinear_head`, and the others' are as before.
    """
    retrained: float
    """Regret of a router trained anew on all that the others answered and these anchors."""


def add_teachers(
    fit: Fit,
    seen: Calibration,
    held_out: Calibration,
    anchors: Sequence[int],
    seed: int = 0,
    pair_weights: PairWeights = "equal",
) -> list[AddedTeacher]:
    """Each teacher in turn is left out, then added by each number of anchors, drawn with `seed`
    from the seen prompts; smaller sets lie in the larger ones.

    What full retraining on everything reaches does not depend on the teacher: `learning_curve` at
    all seen prompts. The rewards are as they are, even where they were standardised with the
    teacher that is left out among the others.
    """
    order_N = numpy_stream(seed, "anchor prompts").permutation(len(seen.total_NM))
    found = []
    for teacher in range(seen.total_NM.shape[1]):
        known = np.arange(seen.total_NM.shape[1]) != teacher
        total_NM = np.where(known, seen.total_NM, np.nan)  # an unknown total makes no pair
        predict = fit(seen.feature_ND, make_preferences(total_NM, pair_weights))
        base_NM = predict(held_out.feature_ND).astype(np.float64)
        without_N = np.where(known, base_NM, -np.inf).argmax(axis=1)
        known_NB = predict(seen.feature_ND)[:, known]
        for count in anchors:
            chosen = np.sort(order_N[:count])
            total_KM = seen.total_NM[chosen]
            head = fit_bilinear_head(
                seen.feature_ND[chosen], total_KM[:, known], seen.feature_ND, known_NB
            )
            joined_NM = _relative(base_NM, base_NM[:, known])
            reward_K1 = _relative(total_KM[:, [teacher]], total_KM[:, known])
            joined_NM[:, [teacher]] = head.coefficients(held_out.feature_ND, reward_K1)

            joined_total_NM = total_NM.copy()
            joined_total_NM[chosen, teacher] = total_KM[:, teacher]
            preferences = make_preferences(joined_total_NM, pair_weights)
            anew = fit(seen.feature_ND, preferences)(held_out.feature_ND)
            found.append(
                AddedTeacher(
                    teacher=teacher,
                    anchors=count,
                    without=mean_regret(held_out.total_NM, without_N),
                    bilinear=mean_regret(held_out.total_NM, route_by_router(joined_NM)),
                    retrained=mean_regret(held_out.total_NM, route_by_router(anew)),
                )
            )
    return found


def mean_regret(total_NM: np.ndarray, teacher_N: np.ndarray) -> float:
    """Mean of the oracle's total minus that of the given routes; 0 is the best there is."""
    return float(regrets(total_NM, teacher_N).mean())


def regrets(total_NM: np.ndarray, teacher_N: np.ndarray) -> np.ndarray:
    """The oracle's total minus that of the given route, on each prompt: float64[N]."""
    return total_NM.max(axis=1) - total_NM[np.arange(len(total_NM)), teacher_N]


class Correlation(NamedTuple):
    """Spearman's rank correlation, and how often chance gives one as far from 0; NaN where one side
    is constant."""

    spearman: float
    p_value: float


def rank_correlation(one_TS: np.ndarray, other_TS: np.ndarray) -> Correlation:
    """Of two values of each of T teachers on each of S slices, all of them together.

    p_value: the share of the orders of the teachers, each taken in all slices of `one_TS` alike,
    with a correlation at least as far from 0, the given order among them. Values of one teacher, or
    on one slice, may hang together as they like. All orders of up to 7 teachers are tried, else
    5,000 drawn ones; the stream is fixed.
    """
    teachers = len(one_TS)
    if teachers <= _ALL_ORDERS:
        order_RT = np.array(list(itertools.permutations(range(teachers))))
    else:
        rng = numpy_stream(0, "orders of teachers")
        drawn = [rng.permutation(teachers) for _ in range(_DRAWN_ORDERS - 1)]
        order_RT = np.array([np.arange(teachers), *drawn])
    shuffled_RU = one_TS[order_RT].reshape(len(order_RT), -1)
    found_R = _spearman(shuffled_RU, np.broadcast_to(other_TS.reshape(-1), shuffled_RU.shape))
    if np.isnan(found_R[0]):
        return Correlation(np.nan, np.nan)
    as_far_R = abs(found_R) >= abs(found_R[0]) - 1e-12
    return Correlation(float(found_R[0]), float(as_far_R.mean()))


def _spearman(one_RU: np.ndarray, other_RU: np.ndarray) -> np.ndarray:
    """float64[R]: Pearson's correlation of the ranks, equal values sharing the middle of theirs."""
    from scipy.stats import rankdata  # which takes seconds, and not every command needs it

    one_RU, other_RU = (
        rank_RU - rank_RU.mean(axis=1, keepdims=True)
        for rank_RU in (rankdata(values_RU, axis=1) for values_RU in (one_RU, other_RU))
    )
    size_R = np.sqrt((one_RU**2).sum(axis=1) * (other_RU**2).sum(axis=1))
    none_R = np.full(len(size_R), np.nan)
    return np.divide((one_RU * other_RU).sum(axis=1), size_R, out=none_R, where=size_R > 0)


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
