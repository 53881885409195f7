import numpy as np
import pytest
from scipy import stats

from persyn_jax.intervals import (
    crossed_ci95,
    detectable_difference,
    mean_ci95,
    paired_deviation,
    paired_difference_ci95,
    student_ci95,
)


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


def test_crossed_with_one_seed_is_as_wide_as_over_prompts_alone():
    values = np.random.default_rng(3).normal(size=300)
    crossed, plain = crossed_ci95(values[:, None]), mean_ci95(values)
    assert crossed.mean == pytest.approx(plain.mean)
    assert crossed.high - crossed.low == pytest.approx(plain.high - plain.low, rel=0.1)


@pytest.mark.parametrize("seeds", [2, 3, 8])
@pytest.mark.parametrize("deviation", [0.0, 0.3, 3.0])
def test_crossed_covers_what_both_prompts_and_seeds_make_vary(seeds, deviation):
    """However few the seeds are, and however much hangs on them."""
    rng = np.random.default_rng(4)
    trials, covered, together = 600, 0, 0
    for _ in range(trials):
        of_prompt, of_seed = rng.normal(size=(40, 1)), rng.normal(size=(1, seeds))
        values_NS = of_prompt + deviation * of_seed + rng.normal(size=(40, seeds))
        interval, wider = crossed_ci95(values_NS), crossed_ci95(values_NS, comparisons=10)
        covered += interval.low <= 0 <= interval.high
        together += wider.low <= 0 <= wider.high
    assert covered >= 0.93 * trials
    assert together >= 0.985 * trials


def test_over_prompts_alone_the_truth_is_left_out_too_often():
    rng = np.random.default_rng(4)
    trials, covered = 60, 0
    for _ in range(trials):
        values_NS = rng.normal(size=(40, 1)) + rng.normal(size=(1, 8))
        narrow = mean_ci95(values_NS.mean(axis=1))
        covered += narrow.low <= 0 <= narrow.high
    assert covered < 0.8 * trials


def test_the_interval_of_a_constant_is_a_point():
    assert crossed_ci95([[0.5, 0.5], [0.5, 0.5]]) == (0.5, 0.5, 0.5)
    assert crossed_ci95([[0.5]]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("values", [[], [[]], [1.0, 2.0], [[1.0, float("inf")]]])
def test_what_has_no_crossed_interval_is_refused(values):
    with pytest.raises(ValueError, match="two axes"):
        crossed_ci95(values)


@pytest.mark.parametrize("items", [300, 2000])
def test_the_detectable_difference_is_found_four_times_in_five(items):
    """Pairs of right and wrong drawn with the planted mean, correlation and difference."""
    mean, correlation, trials = 0.4, 0.6, 4000
    rng = np.random.default_rng(items)
    effect = detectable_difference(items, paired_deviation(mean, correlation))
    both = mean**2 + correlation * mean * (1 - mean)  # right twice
    only = mean - both  # right on one side
    counts = rng.multinomial(
        items, [only + effect / 2, only - effect / 2, 1 - 2 * only], size=trials
    )
    difference = (counts[:, 0] - counts[:, 1]) / items
    error = np.sqrt((counts[:, 0] + counts[:, 1]) / items - difference**2) / np.sqrt(items)
    assert (difference / error > stats.norm.ppf(0.975)).mean() == pytest.approx(0.8, abs=0.03)
