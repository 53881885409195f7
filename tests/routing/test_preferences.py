import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from persyn_jax.records import Reward
from persyn_jax.routing.preferences import (
    make_preferences,
    make_preferences_with_ties,
    reward_matrix,
)

# Few distinct values, so that ties are common.
totals = arrays(
    np.float64, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.integers(0, 3)
)


@given(totals)
def test_pairs_are_all_strict_comparisons(total_NM):
    prompts, teachers = total_NM.shape
    expected = [
        (n, winner, loser)
        for n in range(prompts)
        for winner, loser in itertools.product(range(teachers), repeat=2)
        if total_NM[n, winner] > total_NM[n, loser]
    ]
    *indices, weight_P = make_preferences(total_NM)
    assert list(zip(*(index.tolist() for index in indices), strict=True)) == expected
    assert all(index.dtype == np.int32 for index in indices)
    assert weight_P.tolist() == [1] * len(expected)


def test_without_ties_there_are_n_choose_2_pairs_a_prompt():
    total_NM = np.random.default_rng(0).normal(size=(20, 19))
    assert len(make_preferences(total_NM).winner_P) == 20 * 171


def test_ties_make_no_pair():
    assert len(make_preferences(np.zeros((4, 3))).winner_P) == 0


@given(totals, st.integers(0, 9))
def test_a_tie_is_half_a_win_and_half_a_loss(total_NM, seed):
    """The loss is that of Prompt-to-Leaderboard's bt-tie, comparison by comparison."""
    coefficient_NM = np.random.default_rng(seed).normal(size=total_NM.shape)
    losses = []
    for n, total_M in enumerate(total_NM):
        for i, j in itertools.combinations(range(len(total_M)), 2):
            i_over_j, j_over_i = (
                np.log1p(np.exp(sign * (coefficient_NM[n, i] - coefficient_NM[n, j])))
                for sign in (-1, 1)
            )
            if total_M[i] == total_M[j]:
                losses.append((i_over_j + j_over_i) / 2)
            else:
                losses.append(i_over_j if total_M[i] > total_M[j] else j_over_i)
    row_P, winner_P, loser_P, weight_P = make_preferences_with_ties(total_NM)
    assert weight_P.tolist() == [1] * len(row_P)
    lead_P = coefficient_NM[row_P, winner_P] - coefficient_NM[row_P, loser_P]
    assert len(lead_P) == 2 * len(losses)
    assert all(index.dtype == np.int32 for index in (row_P, winner_P, loser_P))
    if losses:
        assert np.log1p(np.exp(-lead_P)).mean() == pytest.approx(np.mean(losses))


@given(arrays(np.float64, (6, 2), elements=st.floats(-3, 3, width=16)))
def test_pairs_that_weigh_by_difference_rank_two_teachers_by_their_mean_reward(total_NM):
    """The minimum of the Bradley-Terry loss is known in closed form."""
    gain_N = total_NM[:, 0] - total_NM[:, 1]
    won, lost = gain_N[gain_N > 0].sum(), -gain_N[gain_N < 0].sum()
    assume(won > 0 < lost)
    pairs = make_preferences(total_NM, "difference")
    np.testing.assert_allclose(pairs.weight_P.mean(), 1, rtol=1e-6)
    lead = np.log(won / lost)
    chance_P = 1 / (1 + np.exp(np.where(pairs.winner_P == 0, -lead, lead)))
    slope = np.sum(pairs.weight_P * np.where(pairs.winner_P == 0, 1, -1) * (1 - chance_P))
    assert slope == pytest.approx(0, abs=1e-4 * len(chance_P))
    assert np.sign(lead) == np.sign(total_NM[:, 0].sum() - total_NM[:, 1].sum()) or lead < 1e-9


def reward(prompt_id, teacher, total=0.0, quality=None):
    return Reward(
        key=f"{prompt_id}/{teacher}",
        prompt_id=prompt_id,
        teacher=teacher,
        usable=True,
        quality=quality,
        learnability=-1.0,
        response_tokens=3,
        quality_standardised=0.0,
        learnability_standardised=0.0,
        total=total,
    )


REWARDS = [
    reward("q", "b", 4.0, 1.0),
    reward("p", "a", 1.0, 0.0),
    reward("q", "a", 3.0),
    reward("p", "b", 2.0, 1.0),
]


def test_rows_and_columns_follow_the_given_order():
    np.testing.assert_array_equal(reward_matrix(REWARDS, ["p", "q"], ["a", "b"]), [[1, 2], [3, 4]])
    np.testing.assert_array_equal(reward_matrix(REWARDS, ["q"], ["b", "a"]), [[4, 3]])
    quality = reward_matrix(REWARDS, ["p", "q"], ["a", "b"], term="quality")
    np.testing.assert_array_equal(quality, [[0, 1], [np.nan, 1]])


def test_a_missing_reward_is_named():
    with pytest.raises(
        ValueError, match=r"prompt 'q' has 0 rewards of teacher 'b' .* 1 of 4 pairs"
    ):
        reward_matrix(REWARDS[1:], ["p", "q"], ["a", "b"])


def test_a_reward_given_twice_is_named():
    with pytest.raises(ValueError, match="prompt 'p' has 2 rewards of teacher 'a'"):
        reward_matrix([*REWARDS, REWARDS[1]], ["p", "q"], ["a", "b"])
