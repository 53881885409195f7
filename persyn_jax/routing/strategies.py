"""Whom to ask: strategies, each a pure function to the index of a teacher for each prompt, int[N].

Equal teachers: the first in the config's order. Random choice has no function here: it is judged
by its expected total, the mean over teachers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Calibration(NamedTuple):
    """Prompts that all M teachers answered, row by row."""

    total_NM: np.ndarray
    """float64: total reward, finite."""
    source_N: Sequence[str]
    """The source of each prompt."""
    feature_ND: np.ndarray
    """float: what `route_by_neighbours` compares prompts by; only the direction of a row counts."""


def best_constant(total_NM: np.ndarray) -> int:
    """The teacher with the highest mean total: the best single teacher for everything."""
    return int(total_NM.mean(axis=0).argmax())


def best_per_source(total_NM: np.ndarray, source_N: Sequence[str]) -> dict[str, int]:
    """Source -> the teacher with the highest mean total on its prompts, in order of appearance."""
    sources_N = np.asarray(source_N)
    return {
        source: best_constant(total_NM[sources_N == source]) for source in dict.fromkeys(source_N)
    }


def route_by_source(seen: Calibration, source_N: Sequence[str]) -> np.ndarray:
    """Each prompt to the best teacher of its source; of an unseen source, to the best constant."""
    best = best_per_source(seen.total_NM, seen.source_N)
    constant = best_constant(seen.total_NM)
    return np.array([best.get(source, constant) for source in source_N], dtype=int)


def route_by_neighbours(seen: Calibration, feature_ND: np.ndarray, neighbours: int) -> np.ndarray:
    """Each prompt to the teacher with the highest mean total on its nearest seen prompts (cosine).

    neighbours: how many, at least 1; all, where fewer prompts were seen.
    """
    similarity_NN = _unit_rows(feature_ND) @ _unit_rows(seen.feature_ND).T
    nearest_Nk = np.argsort(-similarity_NN, axis=1, kind="stable")[:, :neighbours]
    return seen.total_NM[nearest_Nk].mean(axis=1).argmax(axis=1)


def _unit_rows(feature_ND: np.ndarray) -> np.ndarray:
    norm_N1 = np.linalg.norm(feature_ND, axis=1, keepdims=True)
    return feature_ND / np.where(norm_N1 > 0, norm_N1, 1)


def route_by_oracle(total_NM: np.ndarray) -> np.ndarray:
    """Each prompt to the teacher with the highest total on it: the ceiling, knowing all answers."""
    return total_NM.argmax(axis=1)


def route_by_router(coefficient_NM: np.ndarray) -> np.ndarray:
    """Each prompt to the teacher with the highest Bradley-Terry coefficient (PerSyn's rule)."""
    return coefficient_NM.argmax(axis=1)
