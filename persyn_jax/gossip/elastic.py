"""Elastic: what M workers have becomes what M' workers have, with no mass lost.

The old workers lie side by side on a line, each as wide as any other, and the new ones divide the
same line. M' = 2 M splits each worker into two, M' = M / 2 merges neighbours, and 8 -> 6 does both:
a new worker takes a whole old one and a third of another. Equal sum weights give equal ones
(to a unit or two), so the uniform mean is kept as well as the weighted one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from persyn_jax.gossip.base import Array, Params
from persyn_jax.gossip.rules import sum_weight_unit


def resize(tree_W: Params, sum_weight_W: Array, workers: int) -> tuple[Params, np.ndarray]:
    """`tree_W`, stacked over M workers, for `workers` of them; and their sum weights.

    A worker that splits divides its sum weight among its parts, to whole units of
    `sum_weight_unit`; workers that merge add what they put in, and take the mean of their arrays
    with those weights, in float64, rounded to their own dtype. So sum_m alpha_m x_m is kept to
    rounding, and sum_m alpha_m exactly if the weights are whole units and total at most 1, as
    GoSGD's are.

    tree_W: parameters, and whatever else belongs to a worker (optimiser moments): pytree of arrays
        [M, ...]. Numbers that are not floating point (step counts) must agree among workers that
        merge. For push-sum give the models, x / w.
    sum_weight_W: float[M]; ones for rules without sum weights.

    Returns arrays [workers, ...] and sum weights [workers], of the dtypes given.
    Raises ValueError: fewer than one worker, an array without the M workers, whole numbers that
    disagree.
    """
    if workers < 1:
        raise ValueError(f"resize: the number of workers must be at least 1, got {workers}")
    sum_weight_M = np.asarray(sum_weight_W)
    old = len(sum_weight_M)
    ends_NM = _ends(old, workers)
    put_NM = _put(sum_weight_M.astype(np.float64), ends_NM)
    sum_weight_N = put_NM.sum(axis=1)
    # A new worker without any weight (a part of less than a unit) goes by its place on the line.
    share_NM = np.where(sum_weight_N[:, None] > 0, put_NM, np.diff(ends_NM, axis=0))
    share_NM /= share_NM.sum(axis=1, keepdims=True)

    def resize_leaf(path, leaf_W: Array) -> np.ndarray:
        where, leaf_M = f"tree_W{jax.tree_util.keystr(path)}", np.asarray(leaf_W)
        if leaf_M.shape[:1] != (old,):
            raise ValueError(f"resize: {where} must have {old} workers, got shape {leaf_M.shape}")
        if jnp.issubdtype(leaf_M.dtype, jnp.floating):
            return np.stack([_mean(leaf_M, share_M) for share_M in share_NM])
        return np.stack([_agreed(leaf_M, share_M, where) for share_M in share_NM])

    tree_N = jax.tree_util.tree_map_with_path(resize_leaf, tree_W)
    return tree_N, sum_weight_N.astype(sum_weight_M.dtype)


def _ends(old: int, workers: int) -> np.ndarray:
    """float64[N + 1, M]: how much of old worker m lies left of the n-th boundary, from 0 to 1."""
    left_NM = np.arange(workers + 1)[:, None] * old - np.arange(old) * workers
    return np.clip(left_NM, 0, workers) / workers


def _put(sum_weight_M: np.ndarray, ends_NM: np.ndarray) -> np.ndarray:
    """float64[N, M]: what each old worker puts into each new one. A column totals what it had."""
    unit = sum_weight_unit()
    left_NM = np.floor(ends_NM * (sum_weight_M / unit)) * unit
    return np.diff(np.where(ends_NM < 1, left_NM, sum_weight_M), axis=0)


def _mean(leaf_M: np.ndarray, share_M: np.ndarray) -> np.ndarray:
    # Not a matrix product: a worker that holds NaN must not spoil those it has no share in.
    sources = np.flatnonzero(share_M)
    parts = [share_M[m] * leaf_M[m].astype(np.float64) for m in sources]
    return np.sum(parts, axis=0).astype(leaf_M.dtype)


def _agreed(leaf_M: np.ndarray, share_M: np.ndarray, where: str) -> np.ndarray:
    first, *others = np.flatnonzero(share_M)
    for other in others:
        if (leaf_M[other] != leaf_M[first]).any():
            raise ValueError(
                f"resize: workers {first} and {other} merge but differ in {where}, which is"
                f" {leaf_M.dtype} and has no mean"
            )
    return leaf_M[first]
