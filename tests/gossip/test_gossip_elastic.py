from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.gossip.elastic import resize
from persyn_jax.gossip.rules import sum_weight_unit

UNITS = round(1 / sum_weight_unit())


def gosgd_weights(seed, workers):
    """Sum weights as pushes of halves leave them: whole units, 1 in total, very unlike."""
    rng, units_W = np.random.default_rng(seed), np.full(workers, UNITS // workers)
    for _ in range(5 * workers):
        sender, receiver = rng.integers(workers, size=2)
        units_W[receiver] += units_W[sender] // 2
        units_W[sender] -= units_W[sender] // 2
    return (units_W * sum_weight_unit()).astype(np.float32)


def whole_units(weight_W):
    units = [Fraction(float(weight)) * UNITS for weight in weight_W]
    assert all(unit.denominator == 1 for unit in units)
    return sum(units)


sizes = st.integers(1, 13)


@given(seed=st.integers(0, 2**31), old=sizes, new=sizes)
def test_no_mass_is_lost(seed, old, new):
    weight_M = gosgd_weights(seed, old)
    x_M = np.random.default_rng(seed).normal(size=(old, 5))
    x_N, weight_N = resize(x_M, weight_M, new)
    assert (x_N.shape, x_N.dtype) == ((new, 5), np.float64)
    assert (weight_N.shape, weight_N.dtype) == ((new,), np.float32)
    assert whole_units(weight_N) == whole_units(weight_M)
    assert (weight_N >= 0).all()
    before, after = weight_M.astype(float) @ x_M, weight_N.astype(float) @ x_N
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-14)
    # Every new worker lies among the old ones.
    assert (x_N <= x_M.max(axis=0) + 1e-12).all()
    assert (x_N >= x_M.min(axis=0) - 1e-12).all()


@given(seed=st.integers(0, 2**31), old=sizes, new=sizes)
def test_weights_that_are_no_whole_units_lose_nothing_either(seed, old, new):
    weight_M, x_M = np.random.default_rng(seed).uniform(0.1, 2, (2, old))  # as push-sum's
    x_N, weight_N = resize(x_M, weight_M, new)
    np.testing.assert_allclose(weight_N.sum(), weight_M.sum(), rtol=1e-14)
    np.testing.assert_allclose(weight_N @ x_N, weight_M @ x_M, rtol=1e-14)


@given(old=sizes, new=sizes)
def test_equal_workers_stay_equal_and_keep_their_uniform_mean(old, new):
    x_M = np.random.default_rng(0).normal(size=(old, 3))
    x_N, weight_N = resize(x_M, np.ones(old), new)
    np.testing.assert_allclose(weight_N, old / new, atol=4 * sum_weight_unit())
    np.testing.assert_allclose(x_N.mean(axis=0), x_M.mean(axis=0), atol=1e-5)


@given(seed=st.integers(0, 2**31), workers=st.integers(1, 6), parts=st.integers(1, 4))
def test_to_split_and_to_merge_again_changes_nothing(seed, workers, parts):
    weight_M = gosgd_weights(seed, workers)
    tree_M = {
        "x": np.random.default_rng(seed).normal(size=(workers, 2, 3)).astype(np.float32),
        "half": jnp.arange(workers, dtype=jnp.bfloat16)[:, None] / 3,
        "count": np.arange(workers, dtype=np.int32),
    }
    tree_N, weight_N = resize(tree_M, weight_M, workers * parts)
    for name, leaf_M in tree_M.items():  # parts of a worker are copies, bit by bit
        np.testing.assert_array_equal(tree_N[name], np.repeat(leaf_M, parts, axis=0))
        assert tree_N[name].dtype == leaf_M.dtype
    again_M, weight_again_M = resize(tree_N, weight_N, workers)
    np.testing.assert_array_equal(weight_again_M, weight_M)
    for name, leaf_M in tree_M.items():
        np.testing.assert_array_equal(again_M[name], leaf_M)


def test_neighbours_merge_by_their_weights():
    x_N, weight_N = resize(
        {"x": np.array([1.0, 5.0, 2.0, 2.0])}, np.array([1, 3, 2, 2], np.float32) / 8, 2
    )
    np.testing.assert_array_equal(x_N["x"], [4.0, 2.0])
    np.testing.assert_array_equal(weight_N, [0.5, 0.5])


def test_neither_number_divides_the_other():
    # 3 -> 2: the middle worker goes half to the left and half to the right.
    x_N, weight_N = resize(np.array([0.0, 6.0, 12.0]), np.array([1, 2, 1], np.float32) / 4, 2)
    np.testing.assert_array_equal(weight_N, [0.5, 0.5])
    np.testing.assert_allclose(x_N, [3.0, 9.0])
    # 2 -> 3: the ends are copies, the middle one is both.
    x_N, weight_N = resize(np.array([0.0, 6.0]), np.array([3, 3], np.float32) / 8, 3)
    np.testing.assert_allclose(x_N, [0.0, 3.0, 6.0], atol=1e-12)
    np.testing.assert_allclose(weight_N, 0.25, atol=2 * sum_weight_unit())


def test_a_single_unit_that_splits():
    # One of the parts has no weight at all; it still has the parameters.
    weight_M = np.array([sum_weight_unit(), 1 - sum_weight_unit()], np.float32)
    x_N, weight_N = resize(np.array([7.0, 9.0]), weight_M, 4)
    assert whole_units(weight_N) == UNITS
    assert sorted(weight_N[:2]) == [0, np.float32(sum_weight_unit())]
    np.testing.assert_array_equal(x_N, [7, 7, 9, 9])


def test_a_spoilt_worker_spoils_only_its_parts():
    x_M = np.array([[np.nan], [1.0], [2.0]])
    x_N, _ = resize(x_M, np.full(3, 1 / 3, np.float32), 6)
    np.testing.assert_array_equal(x_N[:, 0], [np.nan, np.nan, 1, 1, 2, 2])


def test_counts_must_agree_where_workers_merge():
    tree_M = {"adam": {"count": np.array([3, 3, 4, 4])}}
    tree_N, _ = resize(tree_M, np.full(4, 0.25, np.float32), 2)
    np.testing.assert_array_equal(tree_N["adam"]["count"], [3, 4])
    message = r"workers 1 and 2 merge but differ in tree_W\['adam'\]\['count'\], which is int64"
    with pytest.raises(ValueError, match=message):
        resize(tree_M, np.full(4, 0.25, np.float32), 3)


def test_bad_input_is_refused_in_one_line():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        resize(np.zeros(2), np.ones(2), 0)
    with pytest.raises(ValueError, match=r"tree_W\['x'\] must have 3 workers, got shape \(2, 5\)"):
        resize({"x": np.zeros((2, 5))}, np.ones(3), 2)
