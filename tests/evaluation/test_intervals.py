import numpy as np
import pytest
from scipy import stats

from persyn_jax.intervals import mean_ci95, paired_difference_ci95, student_ci95


def test_close_to_the_t_interval_on_many_normal_values():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = stats.t.interval(0.95, 399, loc=values.mean(), scale=stats.sem(values))
    interval = mean_ci95(values)
    assert interval.mean == values.mean()
    assert interval.low == pytest.approx(low, abs=0.03)
    assert interval.high == pytest.approx(high, abs=0.03)


@pytest.mark.parametrize("values", [[1.0, 2.0], [3.0, 1.0, 4.0, 1.0, 5.0]])
def test_students_interval_of_a_few_values(values):
    low, high = stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
    )
    assert student_ci95(values) == pytest.approx((np.mean(values), low, high))


def test_a_single_value_has_no_interval():
    mean, low, high = student_ci95([2.5])
    assert mean == 2.5
    assert np.isnan([low, high]).all()


def test_covers_the_mean_of_a_skewed_distribution_about_95_times_in_100():
    rng = np.random.default_rng(1)
    trials = 150
    covered = sum(
        interval.low <= 1.0 <= interval.high
        for interval in (mean_ci95(rng.exponential(1.0, size=80)) for _ in range(trials))
    )
    # 95 % of 150 is 142, with a standard deviation of 3; a skewed sample covers a little less.
    assert 0.87 * trials <= covered <= 0.995 * trials


def test_equal_values_have_no_width():
    assert mean_ci95([0.1] * 7) == pytest.approx((0.1, 0.1, 0.1))


def test_same_values_same_interval():
    assert mean_ci95([1.0, 2.0, 5.0]) == mean_ci95(np.array([1, 2, 5]))


def test_pairing_removes_what_the_pairs_share():
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 10, size=50)
    a, b = shared + 1 + rng.normal(0, 0.1, size=50), shared + rng.normal(0, 0.1, size=50)
    interval = paired_difference_ci95(a, b)
    assert 0.9 < interval.low < interval.mean < interval.high < 1.1
    assert mean_ci95(a).high - mean_ci95(a).low > 4


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0, 2.0]]])
def test_what_has_no_interval_is_refused(values):
    with pytest.raises(ValueError, match="at least one value"):
        mean_ci95(values)


def test_pairs_must_match():
    with pytest.raises(ValueError, match=r"\(2,\), \(1,\)"):
        paired_difference_ci95([1.0, 2.0], [1.0])
