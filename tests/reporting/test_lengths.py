"""Length: quarters against sorted lengths, the correlation against scipy, trends that are there."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from persyn_jax.records import Reward
from persyn_jax.reporting.lengths import QUARTERS, length_trend, quarters, rank_correlation


def make_rewards(tokens, totals, usable=True) -> list[Reward]:
    return [
        Reward("k", f"p{n}", "a", usable, 0.5, -1.0, int(length), 0.0, 0.0, float(total))
        for n, (length, total) in enumerate(zip(tokens, totals, strict=True))
    ]


def test_different_lengths_make_four_equal_quarters():
    length_N = np.random.default_rng(0).permutation(20) + 5
    found = quarters(length_N)
    assert list(found) == list(QUARTERS)
    expected = np.sort(length_N).reshape(4, 5)
    for rows, lengths in zip(found.values(), expected, strict=True):
        assert sorted(length_N[rows]) == lengths.tolist()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_every_prompt_is_in_one_quarter_and_equal_lengths_together(lengths):
    groups = list(quarters(lengths).values())
    assert sorted(row for rows in groups for row in rows.tolist()) == list(range(len(lengths)))
    of_group = [[lengths[row] for row in rows] for rows in groups]
    for shorter, longer in pairwise(of_group):
        assert max(shorter) < min(longer)


def test_the_correlation_is_spearmans_and_its_interval_holds_the_truth_19_times_in_20():
    """Pairs of normal variables of correlation 0.5, whose rank correlation is 6/pi asin(0.25)."""
    draw, truth, inside = np.random.default_rng(0), 6 / np.pi * np.arcsin(0.25), 0
    for _ in range(400):
        a_N = draw.normal(size=60)
        b_N = 0.5 * a_N + np.sqrt(0.75) * draw.normal(size=60)
        found = rank_correlation(a_N, b_N)
        assert found is not None
        assert found.mean == pytest.approx(spearmanr(a_N, b_N).statistic)
        inside += found.low <= truth <= found.high
    assert 0.92 < inside / 400 < 0.98


@pytest.mark.parametrize(
    ("tokens", "totals", "trend", "mean"),
    [
        (range(20), range(20), "rises", 1),
        (range(20), [-(n**3) for n in range(20)], "falls", -1),
        (range(20), [n % 2 for n in range(20)], "none seen", None),
        (range(20), [0.5] * 20, "none seen", None),
        (range(6), range(6), "too few answers", 1),
        ([], [], "too few answers", None),
    ],
)
def test_a_trend_is_told_as_it_is(tokens, totals, trend, mean):
    found = length_trend(make_rewards(tokens, totals))
    assert found.trend == trend
    assert found.answers == len(totals)
    if mean is not None:
        assert found.correlation == (mean, mean, mean)


def test_parts_of_equal_size_have_their_own_means_and_leave_unusable_answers_out():
    tokens, totals = [5, 1, 4, 2, 3, 10, 9, 8, 7, 6], [50, 10, 40, 20, 30, 100, 90, 80, 70, 60]
    found = length_trend(make_rewards(tokens, totals) + make_rewards([1] * 9, [-99] * 9, False))
    assert found.tokens_K == [1.5, 3.5, 5.5, 7.5, 9.5]
    assert found.total_K == [15, 35, 55, 75, 95]
