"""Values of different units made comparable: within each prompt, or over the whole set.

Higher stays higher. Equal values become exactly 0, so a term on which all agree decides nothing.
NaN stands for a value that is not known: it becomes the mean of the others' results, and they are
what they would be without it.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

Normalisation = Literal["z_score", "min_max", "rank"]
Scope = Literal["prompt", "set"]
"""`prompt`: among the answers to the same prompt. `set`: among all answers."""


def z_score(values_M: ArrayLike) -> np.ndarray:
    """Values minus their mean, over their population standard deviation."""
    return _of_known(values_M, _z_scores)


def min_max(values_M: ArrayLike) -> np.ndarray:
    """The lowest is 0, the highest 1, linear between."""
    return _of_known(values_M, lambda scaled: scaled)


def rank(values_M: ArrayLike) -> np.ndarray:
    """The lowest is 0, the highest 1, equal steps between; equal values share the middle of their
    ranks, so a shared lowest lies above 0."""
    from scipy.stats import rankdata  # which takes seconds, and not every command needs it

    return _of_known(values_M, lambda scaled: (rankdata(scaled) - 1) / (scaled.size - 1))


NORMALISERS: dict[Normalisation, Callable[[ArrayLike], np.ndarray]] = {
    "z_score": z_score,
    "min_max": min_max,
    "rank": rank,
}


def normalise(
    values: Sequence[float] | np.ndarray,
    prompt_ids: Sequence[Hashable],
    method: Normalisation = "z_score",
    scope: Scope = "prompt",
) -> np.ndarray:
    """One value an answer, normalised; `prompt_ids` runs parallel. float64, in the given order."""
    values = np.asarray(values, dtype=np.float64)
    if scope == "set":
        return NORMALISERS[method](values)
    rows_of: dict[Hashable, list[int]] = {}
    for row, prompt_id in enumerate(prompt_ids):
        rows_of.setdefault(prompt_id, []).append(row)
    result = np.empty_like(values)
    for rows in rows_of.values():
        result[rows] = NORMALISERS[method](values[rows])
    return result


def _of_known(values_M: ArrayLike, shape: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`shape` of the known values, which it gets scaled to [0, 1]: that changes no z-score and
    keeps nearly equal values from dividing by 0."""
    values_M = np.asarray(values_M, dtype=np.float64)
    known_M = ~np.isnan(values_M)
    known = values_M[known_M]
    if not known.size or known.max() == known.min():
        return np.zeros_like(values_M)
    shaped = shape((known - known.min()) / (known.max() - known.min()))
    result_M = np.full_like(values_M, shaped.mean())
    result_M[known_M] = shaped
    return result_M


def _z_scores(scaled: np.ndarray) -> np.ndarray:
    return (scaled - scaled.mean()) / scaled.std()
