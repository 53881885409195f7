"""From rewards to what a router learns from: the matrix of one term, and the pairs of its
ranking."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from persyn_jax.records import Reward

Term = Literal[
    "total", "quality", "learnability", "quality_standardised", "learnability_standardised"
]
PairWeights = Literal["equal", "difference"]


def reward_matrix(
    rewards: Sequence[Reward],
    prompt_ids: Sequence[str],
    teachers: Sequence[str],
    term: Term = "total",
    partial: bool = False,
) -> np.ndarray:
    """One term of the rewards as float64[N, M]: rows in the order of `prompt_ids`, columns in that
    of `teachers`.

    A quality that is null becomes NaN. Rewards of other prompts and teachers are left aside.
    partial: whether a prompt may be without the reward of some teachers, which become NaN.
    Raises ValueError: no reward (unless partial), or more than one, for some prompt and teacher.
    """
    row_of = {prompt_id: n for n, prompt_id in enumerate(prompt_ids)}
    column_of = {teacher: m for m, teacher in enumerate(teachers)}
    matrix_NM = np.full((len(row_of), len(column_of)), np.nan)
    count_NM = np.zeros(matrix_NM.shape, dtype=int)
    for reward in rewards:
        if reward.prompt_id in row_of and reward.teacher in column_of:
            cell = row_of[reward.prompt_id], column_of[reward.teacher]
            value = getattr(reward, term)
            matrix_NM[cell] = np.nan if value is None else value
            count_NM[cell] += 1
    wrong = np.argwhere(count_NM > 1 if partial else count_NM != 1)
    if len(wrong):
        n, m = wrong[0]
        raise ValueError(
            f"prompt {prompt_ids[n]!r} has {count_NM[n, m]} rewards of teacher {teachers[m]!r} and "
            f"must have 1; so {len(wrong)} of {count_NM.size} pairs of prompt and teacher"
        )
    return matrix_NM


class Preferences(NamedTuple):
    """P pairs of teachers, each on one prompt: the data of the Bradley-Terry loss (PerSyn eq.
    3)."""

    prompt_index_P: np.ndarray
    """int32: row of the matrix that the pair comes from."""
    winner_P: np.ndarray
    """int32: teacher with the higher total."""
    loser_P: np.ndarray
    """int32: teacher with the lower total."""
    weight_P: np.ndarray
    """float32: of the pair in the loss, 1 on average."""


def make_preferences(total_NM: np.ndarray, pair_weights: PairWeights = "equal") -> Preferences:
    """Every (winner, loser) with strictly different totals, in the order of prompt, winner, loser;
    a tie makes none, nor does a total that is not known (NaN).

    pair_weights: `equal`, as in PerSyn: a win counts, however small. `difference`: a pair weighs in
    proportion to the difference of its totals. The loss of two teachers is then least where the
    one with the higher mean total leads: at c_i - c_j = log(sum of (r_i - r_j) where i wins / sum
    of (r_j - r_i) where j wins), while equal weights put the one ahead that wins more often.
    """
    wins_NMM = total_NM[:, :, None] > total_NM[:, None, :]
    row_P, winner_P, loser_P = (index_P.astype(np.int32) for index_P in np.nonzero(wins_NMM))
    weight_P = np.ones(len(row_P), np.float32)
    if pair_weights == "difference" and len(row_P):
        lead_P = total_NM[row_P, winner_P] - total_NM[row_P, loser_P]
        weight_P = (lead_P / lead_P.mean()).astype(np.float32)
    return Preferences(row_P, winner_P, loser_P, weight_P)


def make_preferences_with_ties(total_NM: np.ndarray) -> Preferences:
    """A tie as half a win and half a loss (`bt-tie` of Prompt-to-Leaderboard, arXiv 2502.14855):
    every pair of `make_preferences` twice, every tie once in each order.

    So the mean loss over these pairs is that over comparisons in which a tie of i and j counts
    (loss of i over j + loss of j over i) / 2. A total that is not known (NaN) makes none.
    """
    wins_NMM = total_NM[:, :, None] > total_NM[:, None, :]
    ties_NMM = total_NM[:, :, None] == total_NM[:, None, :]
    ties_NMM &= ~np.eye(total_NM.shape[1], dtype=bool)
    rows_P3 = np.argwhere(wins_NMM | ties_NMM)
    twice_P = np.where(wins_NMM[tuple(rows_P3.T)], 2, 1)
    indices_3P = np.repeat(rows_P3, twice_P, axis=0).T.astype(np.int32)
    return Preferences(*indices_3P, weight_P=np.ones(indices_3P.shape[1], np.float32))


def pair_accuracy(preferences: Preferences, coefficient_NM: np.ndarray) -> float:
    """Share of pairs whose winner has the higher coefficient on their prompt; NaN without pairs."""
    winner_P = coefficient_NM[preferences.prompt_index_P, preferences.winner_P]
    loser_P = coefficient_NM[preferences.prompt_index_P, preferences.loser_P]
    return float((winner_P > loser_P).mean()) if len(winner_P) else float("nan")
