"""Prompts by direction: the nearest of others, and groups of them (spherical k-means)."""

import numpy as np

CHUNK = 4096  # prompts compared at once: similarities of all prompts to all others may not fit
_ROUNDS = 100


def unit_rows(feature_ND: np.ndarray) -> np.ndarray:
    """Every row at length 1; a row of zeros stays."""
    norm_N1 = np.linalg.norm(feature_ND, axis=1, keepdims=True)
    return feature_ND / np.where(norm_N1 > 0, norm_N1, 1)


def nearest(unit_ND: np.ndarray, other_KD: np.ndarray, count: int) -> np.ndarray:
    """int[N, min(count, K)]: the rows of `other_KD` of the largest inner product, best first; of
    equal ones the first."""
    nearest_Nk = np.empty((len(unit_ND), min(count, len(other_KD))), int)
    for start in range(0, len(unit_ND), CHUNK):
        similarity_NK = unit_ND[start : start + CHUNK] @ other_KD.T
        order_NK = np.argsort(-similarity_NK, axis=1, kind="stable")
        nearest_Nk[start : start + CHUNK] = order_NK[:, :count]
    return nearest_Nk


def cluster_means(
    unit_ND: np.ndarray, value_NM: np.ndarray, clusters: int
) -> tuple[np.ndarray, np.ndarray]:
    """(centres float[K, D], mean values float[K, M]) of at most `clusters` groups, none empty.

    Without a draw: the first centre is the row nearest to the mean, each further one the row
    farthest from all so far; then rows join the nearest centre until none moves.
    """
    centre_KD = _spread_rows(unit_ND, clusters)
    group_N = nearest(unit_ND, centre_KD, 1)[:, 0]
    for _ in range(_ROUNDS):
        centre_KD = unit_rows(_group_means(unit_ND, group_N))
        moved_N = nearest(unit_ND, centre_KD, 1)[:, 0]
        if (moved_N == group_N).all():
            break
        group_N = moved_N
    used_K, group_N = np.unique(group_N, return_inverse=True)
    return centre_KD[used_K], _group_means(value_NM, group_N)


def _spread_rows(unit_ND: np.ndarray, count: int) -> np.ndarray:
    chosen = [int((unit_ND @ unit_ND.mean(axis=0)).argmax())]
    nearest_N = unit_ND @ unit_ND[chosen[0]]
    while len(chosen) < min(count, len(unit_ND)):
        chosen.append(int(nearest_N.argmin()))
        nearest_N = np.maximum(nearest_N, unit_ND @ unit_ND[chosen[-1]])
    return unit_ND[chosen]


def _group_means(value_NX: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """float[K, X], K being the number of groups that have a member."""
    members_N = np.unique(group_N, return_inverse=True)[1]
    sum_KX = np.zeros((members_N.max() + 1, value_NX.shape[1]))
    np.add.at(sum_KX, members_N, value_NX)
    return sum_KX / np.bincount(members_N)[:, None]
