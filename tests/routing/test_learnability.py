"""Each metric by hand. The probabilities are powers of two, so that logarithms are easy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.routing.learnability import (
    LEAST_LOSS,
    METRICS,
    TokenScores,
    grape,
    higher_is_better,
    ifd,
    local_naturalness,
    mean_log_likelihood,
    metrics,
    rsr,
)

BIT = np.log(2)
# p = 1/2, 1/8, 1, 1/16: the likeliest there, the third, the likeliest, the 500th.
LOG_LIKELIHOOD_T = -BIT * np.array([1.0, 3.0, 0.0, 4.0])
SCORES = TokenScores(
    log_likelihood_T=LOG_LIKELIHOOD_T,
    rank_T=np.array([1, 3, 1, 500]),
    unconditional_T=-BIT * np.array([4.0, 4.0, 4.0, 4.0]),
    local_T=-BIT * np.array([2.0, 4.0, 1.0, 6.0]),
    step_T=np.array([0, 0, 0, 1]),
)


def learnability(name, scores):
    return higher_is_better(name, metrics(scores)[name])


def test_mean_log_likelihood():
    assert mean_log_likelihood(LOG_LIKELIHOOD_T) == pytest.approx(-2 * BIT)  # -8 bits, 4 tokens


def test_grape_is_the_geometric_mean_of_the_probabilities():
    assert grape(LOG_LIKELIHOOD_T) == pytest.approx((1 / 2 / 8 / 16) ** (1 / 4))


def test_rank_surprisal_ratio():
    # ranks 1 + 3 + 1 + 100, for 500 is cut; surprisal 8 bits
    assert rsr(LOG_LIKELIHOOD_T, SCORES.rank_T) == pytest.approx(105 / (8 * BIT))
    assert rsr(LOG_LIKELIHOOD_T, SCORES.rank_T, rank_limit=2) == pytest.approx(6 / (8 * BIT))


@given(
    st.lists(st.tuples(st.floats(-9, -0.01), st.integers(1, 300)), min_size=1, max_size=9),
)
def test_rank_surprisal_ratio_is_the_surprisal_weighted_mean_of_token_ratios(tokens):
    """Equation 6 of the paper."""
    log_likelihood_T, rank_T = map(np.array, zip(*tokens, strict=True))
    ratio_T = np.minimum(rank_T, 100) / -log_likelihood_T
    expected = np.average(ratio_T, weights=-log_likelihood_T)
    assert rsr(log_likelihood_T, rank_T) == pytest.approx(expected)


def test_instruction_following_difficulty():
    assert ifd(LOG_LIKELIHOOD_T, SCORES.unconditional_T) == pytest.approx(2 / 4)
    assert ifd(LOG_LIKELIHOOD_T, LOG_LIKELIHOOD_T) == pytest.approx(1)  # the prompt says nothing


def test_local_naturalness_counts_every_step_alike():
    # steps of (2 + 4 + 1) / 3 and 6 bits; the mean over tokens would be 13 / 4
    assert local_naturalness(SCORES.local_T, SCORES.step_T) == pytest.approx(-(7 / 3 + 6) / 2 * BIT)
    one_step = np.zeros(4, int)
    assert local_naturalness(LOG_LIKELIHOOD_T, one_step) == pytest.approx(
        mean_log_likelihood(LOG_LIKELIHOOD_T)
    )


def test_every_metric_gives_higher_for_better():
    """An answer that the student finds likelier with the prompt is better by the likelihoods and by
    IFD; one of lower ranks at equal surprisal is better by RSR."""
    worse = TokenScores(
        log_likelihood_T=LOG_LIKELIHOOD_T - [0, 1, 0, 0],
        rank_T=SCORES.rank_T,
        unconditional_T=SCORES.unconditional_T,
        local_T=SCORES.local_T - [0, 1, 0, 0],
        step_T=SCORES.step_T,
    )
    for name in ("mean_log_likelihood", "grape", "ifd", "local_naturalness"):
        assert learnability(name, SCORES) > learnability(name, worse), name
    ranked_lower = TokenScores(log_likelihood_T=LOG_LIKELIHOOD_T, rank_T=np.array([1, 4, 1, 500]))
    assert learnability("rsr", SCORES) > learnability("rsr", ranked_lower)
    assert learnability("rsr", SCORES) == -rsr(LOG_LIKELIHOOD_T, SCORES.rank_T)


def test_a_student_that_is_certain_gives_finite_numbers():
    certain = TokenScores(
        log_likelihood_T=np.zeros(2), rank_T=np.ones(2, int), unconditional_T=np.zeros(2)
    )
    assert learnability("rsr", certain) == pytest.approx(-1 / LEAST_LOSS)
    assert learnability("ifd", certain) == 0
    assert learnability("grape", certain) == 1


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_reads_the_columns_that_it_names_and_no_other(name):
    columns = METRICS[name].columns
    alone = TokenScores(**{column: getattr(SCORES, column) for column in columns})
    assert metrics(alone)[name] == metrics(SCORES)[name]
    for column in columns:
        others = {c: v for c, v in vars(SCORES).items() if c != column}
        assert name not in metrics(TokenScores(**others))


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({}, "columns of one length"),
        ({"log_likelihood_T": np.zeros(0)}, "at least 1"),
        ({"log_likelihood_T": np.zeros(2), "rank_T": np.ones(3)}, "columns of one length"),
        ({"log_likelihood_T": np.array([0.1])}, "at most 0"),
        ({"unconditional_T": np.array([-np.inf])}, "finite"),
        ({"local_T": np.array([np.nan])}, "finite"),
        ({"rank_T": np.array([0, 1])}, "rank 1"),
        ({"step_T": np.array([0, 2])}, "without gaps"),
        ({"step_T": np.array([1, 1])}, "from 0"),
        ({"step_T": np.array([0, 1, 0])}, "in order"),
    ],
)
def test_columns_that_cannot_be(columns, match):
    with pytest.raises(ValueError, match=match):
        TokenScores(**columns)
