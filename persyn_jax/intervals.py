"""95 % intervals of means: by the percentile bootstrap, and Student's for a handful of values, or
for prompts crossed with a few seeds."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

from persyn_jax.streams import numpy_stream

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def ci95(self) -> list[float]:
        """[low, high], as JSON takes it."""
        return [self.low, self.high]


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


def crossed_ci95(values_NS: ArrayLike, comparisons: int = 1) -> Interval:
    """The mean over N prompts x S seeds with its 95 % interval, where both could have been others.

    Its half is the root of the sum of squares of the halves of Student's intervals of the prompts'
    means and of the seeds' means (Zou and Donner 2008): two or three seeds make it as wide as they
    must. What is of neither alone counts twice, so it is rather too wide than too narrow. With one
    column it knows nothing of seeds.

    comparisons: how many such intervals are to hold all together in 95 cases of 100 (Bonferroni).
    Raises ValueError on other than two axes, none of them empty, or a value that is not finite.
    """
    values_NS = np.asarray(values_NS, dtype=np.float64)
    if values_NS.ndim != 2 or values_NS.size == 0 or not np.isfinite(values_NS).all():
        raise ValueError(
            f"an interval needs finite values in two axes; got shape {values_NS.shape}"
        )
    mean, square = float(values_NS.mean()), 0.0
    for of_axis in (values_NS.mean(axis=1), values_NS.mean(axis=0)):
        size = len(of_axis)
        if size > 1:
            quantile = stdtrit(size - 1, 1 - 0.025 / comparisons)
            square += quantile**2 * of_axis.var(ddof=1) / size
    half = float(np.sqrt(square))
    return Interval(mean, mean - half, mean + half)


def paired_deviation(mean: float, correlation: float) -> float:
    """Standard deviation of the difference of two scores of 0 or 1 on the same item, both `mean` on
    average, with `correlation` between them."""
    return float(np.sqrt(2 * mean * (1 - mean) * (1 - correlation)))


def detectable_difference(items: int, deviation: float) -> float:
    """The smallest mean of `items` paired differences, of this standard deviation, that a two-sided
    5 % test tells from 0 in 80 % of the cases; normal approximation."""
    return float((ndtri(0.975) + ndtri(0.8)) * deviation / np.sqrt(items))


def _checked(values: ArrayLike) -> np.ndarray:
    values_N = np.asarray(values, dtype=np.float64)
    if values_N.ndim != 1 or values_N.size == 0 or not np.isfinite(values_N).all():
        raise ValueError(
            "an interval needs at least one value, all finite, in one axis; "
            f"got shape {values_N.shape}"
        )
    return values_N
