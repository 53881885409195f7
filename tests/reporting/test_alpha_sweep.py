"""The alpha sweep against a table made by hand, and against what holds for any rewards."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.reporting.alpha_sweep import Terms, alpha_sweep, oracle_shares, reward_terms
from persyn_jax.routing.preferences import reward_matrix

NAN = np.nan
# Teacher 0 is good, teacher 1 is easy. Prompt 0 turns at alpha 0.5, prompt 1 at 0.2, and prompt 2,
# of unknown quality, has only learnability to go by.
HAND = Terms(
    quality_NM=np.array([[0.9, 0.1], [0.7, 0.5], [NAN, NAN]]),
    learnability_NM=np.array([[-3.0, -1.0], [-4.0, -2.0], [-2.0, -1.0]]),
    quality_standardised_NM=np.array([[1.0, 0.0], [0.25, 0.0], [0.0, 0.0]]),
    learnability_standardised_NM=np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]),
)


def test_the_table_made_by_hand():
    points = {point.alpha: point for point in alpha_sweep(HAND, alpha=0.3)}
    assert list(points) == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    # Quality alone: teacher 0 twice, and both alike on the prompt that says nothing.
    assert points[0].share_M == pytest.approx([2.5 / 3, 0.5 / 3])
    assert points[0].mean_quality == pytest.approx((0.9 + 0.7) / 2)
    assert points[0].mean_learnability == pytest.approx((-3 - 4 - 1.5) / 3)
    # At 0.3 teacher 0 keeps prompt 0 only; at 0 one of the others agreed for half of it.
    assert points[0.3].share_M == pytest.approx([1 / 3, 2 / 3])
    assert points[0.3].mean_quality == pytest.approx((0.9 + 0.5) / 2)
    assert points[0.3].mean_learnability == pytest.approx((-3 - 2 - 1) / 3)
    assert points[0].agreement == pytest.approx((1 + 0 + 0.5) / 3)
    assert points[0.4].agreement == points[0.3].agreement == 1
    assert points[1].share_M == pytest.approx([0, 1])
    assert points[1].mean_quality == pytest.approx((0.1 + 0.5) / 2)
    assert points[1].agreement == pytest.approx(2 / 3)


def test_an_alpha_between_the_steps_has_a_point_of_its_own():
    points = alpha_sweep(HAND, alpha=0.25)
    assert next(point.alpha for point in points if point.agreement == 1) == 0.25
    assert len(points) == 12


def test_no_quality_anywhere_is_null_and_changes_no_routes():
    nothing = HAND._replace(
        quality_NM=np.full((3, 2), NAN), quality_standardised_NM=np.zeros((3, 2))
    )
    points = alpha_sweep(nothing, alpha=0.4)
    assert all(point.mean_quality is None for point in points)
    assert points[0].share_M.tolist() == [0.5, 0.5]
    assert all(point.share_M.tolist() == [0, 1] for point in points[1:])


@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=9))
def test_shares_of_a_prompt_are_even_among_its_best(totals):
    share_NM = oracle_shares(np.array(totals, float))
    for total_M, share_M in zip(totals, share_NM.tolist(), strict=True):
        winners = total_M.count(max(total_M))
        assert share_M == [(total == max(total_M)) / winners for total in total_M]


def test_the_runs_own_alpha_gives_the_rewards_own_totals(run_records):
    """More weight of learnability never makes the chosen answers less learnable."""
    teachers = list(run_records.teachers)
    terms = reward_terms(run_records.rewards, teachers)
    ids = list(dict.fromkeys(reward.prompt_id for reward in run_records.rewards))
    total_NM = reward_matrix(run_records.rewards, ids, teachers)
    points = alpha_sweep(terms, run_records.alpha)
    own = next(point for point in points if point.alpha == run_records.alpha)
    assert own.share_M == pytest.approx(oracle_shares(total_NM).mean(axis=0))
    standardised = terms._replace(learnability_NM=terms.learnability_standardised_NM)
    means = [point.mean_learnability for point in alpha_sweep(standardised, run_records.alpha)]
    assert (np.diff(means) >= -1e-12).all()
