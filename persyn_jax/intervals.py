"""95 % intervals of means: by the percentile bootstrap, and Student's for a handful of values."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from persyn_jax.streams import numpy_stream

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_ci95(values: ArrayLike) -> Interval:
    """The mean of `values` with its 95 % percentile-bootstrap interval.

    low and high are the 2.5 and 97.5 percentiles of the means of RESAMPLES samples of the values,
    drawn with replacement (Efron and Tibshirani 1993, chapter 13). Their stream is fixed, so the
    same values always give the same interval. Below some thirty values it is a little too narrow.

    Raises ValueError on no values, more than one axis, or a value that is not finite.
    """
    values_N = _checked(values)
    rng = numpy_stream(0, "bootstrap")
    size = len(values_N)
    means = [values_N[rng.integers(size, size=size)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values_N.mean()), float(low), float(high))


def student_ci95(values: ArrayLike) -> Interval:
    """The mean of `values` with Student's 95 % interval: for a few values that are about normal,
    such as those of some seeds. A single value has no interval: low and high are NaN.

    Raises ValueError as `mean_ci95` does.
    """
    values_N = _checked(values)
    mean, size = float(values_N.mean()), len(values_N)
    if size == 1:
        return Interval(mean, np.nan, np.nan)
    half = float(stdtrit(size - 1, 0.975) * values_N.std(ddof=1) / np.sqrt(size))
    return Interval(mean, mean - half, mean + half)


def paired_difference_ci95(a: ArrayLike, b: ArrayLike) -> Interval:
    """`mean_ci95` of a - b, element by element: pairs are resampled, not values.

    Raises ValueError where a and b differ in length.
    """
    a_N, b_N = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_N.shape != b_N.shape:
        raise ValueError(
            f"paired values must match one to one; got shapes {a_N.shape}, {b_N.shape}"
        )
    return mean_ci95(a_N - b_N)


def _checked(values: ArrayLike) -> np.ndarray:
    values_N = np.asarray(values, dtype=np.float64)
    if values_N.ndim != 1 or values_N.size == 0 or not np.isfinite(values_N).all():
        raise ValueError(
            "an interval needs at least one value, all finite, in one axis; "
            f"got shape {values_N.shape}"
        )
    return values_N
