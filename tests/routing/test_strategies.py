import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from persyn_jax.routing.strategies import (
    Calibration,
    best_constant,
    best_per_source,
    route_by_neighbours,
    route_by_oracle,
    route_by_router,
    route_by_source,
)

TOTAL_NM = np.array(
    [
        [2.0, 0.0, 1.0],
        [2.0, 0.0, 1.0],
        [-2.0, 1.0, 1.0],
        [-3.0, 3.0, 1.5],
    ]
)
SEEN = Calibration(
    total_NM=TOTAL_NM,
    source_N=["sums", "sums", "words", "words"],
    feature_ND=np.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]),
)


def test_best_constant_has_the_best_mean():
    assert best_constant(TOTAL_NM) == 2  # means -0.25, 1, 1.125
    assert best_constant(np.zeros((3, 4))) == 0  # equal teachers: the first


def test_best_per_source_and_a_source_that_was_not_seen():
    assert best_per_source(TOTAL_NM, SEEN.source_N) == {"sums": 0, "words": 1}
    assert route_by_source(SEEN, ["words", "songs", "sums"]).tolist() == [1, 2, 0]


def test_one_neighbour_is_the_prompt_of_the_nearest_direction():
    query_ND = np.array([[50.0, 0.0], [0.6, 0.8], [-3.0, -0.1]])
    # [0.6, 0.8] has its largest inner product with the long second prompt, cosine with the third.
    assert route_by_neighbours(SEEN, query_ND, neighbours=1).tolist() == [0, 1, 1]
    # The two nearest to [0, 1] are the third prompt and the second: totals [0, 1, 2] together.
    assert route_by_neighbours(SEEN, np.array([[0.0, 1.0]]), neighbours=2).tolist() == [2]


def test_all_neighbours_are_the_best_constant():
    query_ND = np.random.default_rng(0).normal(size=(5, 2))
    for neighbours in (4, 100):
        assert route_by_neighbours(SEEN, query_ND, neighbours).tolist() == [2] * 5


def test_features_without_direction_are_no_error():
    assert route_by_neighbours(SEEN, np.zeros((1, 2)), neighbours=1).tolist() == [0]


@given(arrays(np.float64, (4, 3), elements=st.integers(0, 2)))
def test_oracle_and_router_take_the_first_of_the_highest(value_NM):
    expected = [row.index(max(row)) for row in value_NM.tolist()]
    assert route_by_oracle(value_NM).tolist() == expected
    assert route_by_router(value_NM).tolist() == expected
