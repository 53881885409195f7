"""Attention to the cache: what it computes, and that a row does not feel the others."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persyn_jax.models.attention import AttentionRule
from persyn_jax.sampling.cache_attention import _plan, attend_to_cache, cache_block

S, C, K, G, E = 3, 384, 2, 3, 8  # three blocks of 128
ATTEND = jax.jit(attend_to_cache, static_argnums=3)
RULE = AttentionRule(E**-0.5)
WINDOWS = [1, 5, 128, 200, C]
positions = st.integers(0, C - 1)


def arrays(seed: int, rows: int, queries: int):
    rng = np.random.default_rng(seed)
    q_BTHE = rng.normal(size=(rows, queries, K * G, E)).astype(np.float32)
    keys_SCKE, values_SCKE = rng.normal(size=(2, S, C, K, E)).astype(np.float32)
    return q_BTHE, keys_SCKE, values_SCKE


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.lists(st.tuples(positions, positions), min_size=4, max_size=4))
def test_it_is_attention_to_what_came_before(seed, places):
    """Against JAX's own, with a mask over the whole cache. Rows look at slots of their own."""
    q_BTHE, keys_SCKE, values_SCKE = arrays(seed, 4, 2)
    positions_BT, slot_B = np.array(places, np.int32), np.array([2, 0, 2, 1], np.int32)
    mask_B1TC = (np.arange(C) <= positions_BT[:, :, None])[:, None]
    expected = jax.nn.dot_product_attention(
        q_BTHE, keys_SCKE[slot_B], values_SCKE[slot_B], mask=mask_B1TC
    )
    keys_SCF, values_SCF = (array.reshape(S, C, -1) for array in (keys_SCKE, values_SCKE))
    actual = ATTEND(q_BTHE, keys_SCF, values_SCF, RULE, positions_BT, slot_B)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 99),
    positions,
    st.lists(st.integers(0, C), min_size=2, max_size=2),
    st.sampled_from([None, *WINDOWS]),
)
def test_a_row_is_bitwise_the_same_beside_any_others(seed, own, others, window):
    """However far the others read. C marks rows that are not in use."""
    q_BTHE, *cache = arrays(seed, S, 1)
    keys_SCF, values_SCF = (array.reshape(S, C, -1) for array in cache)

    def row_0(others):
        positions_BT = np.array([[own], *[[place] for place in others]], np.int32)
        rule = RULE._replace(window=window)
        return np.asarray(ATTEND(q_BTHE, keys_SCF, values_SCF, rule, positions_BT))[0]

    np.testing.assert_array_equal(row_0(others), row_0([C, C]))


@pytest.mark.parametrize(("length", "block"), [(8, 8), (128, 128), (160, 80), (512, 128), (17, 17)])
def test_blocks_divide_the_cache(length, block):
    assert cache_block(length) == block


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 99),
    st.lists(st.tuples(positions, positions), min_size=4, max_size=4),
    st.sampled_from(WINDOWS),
)
def test_a_window_and_soft_capping_are_what_they_are_for_whole_rows(seed, places, window):
    """Against the scores written out."""
    q_BTHE, keys_SCKE, values_SCKE = arrays(seed, 4, 2)
    positions_BT, slot_B = np.array(places, np.int32), np.array([2, 0, 2, 1], np.int32)
    heads = np.arange(K * G) // G
    keys_BCHE, values_BCHE = (a[slot_B][:, :, heads] for a in (keys_SCKE, values_SCKE))
    scores = np.einsum("BTHE,BCHE->BTHC", q_BTHE.astype(np.float64), keys_BCHE) * 0.7
    behind = positions_BT[:, :, None] - np.arange(C)
    seen = ((behind >= 0) & (behind < window))[:, :, None]
    weights = np.where(seen, np.exp(1.5 * np.tanh(scores / 1.5)), 0)
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("BTHC,BCHE->BTHE", weights, values_BCHE)
    rule = AttentionRule(0.7, softcap=1.5, window=window)
    keys_SCF, values_SCF = (array.reshape(S, C, -1) for array in (keys_SCKE, values_SCKE))
    actual = ATTEND(q_BTHE, keys_SCF, values_SCF, rule, positions_BT, slot_B)
    np.testing.assert_allclose(actual, expected, atol=4e-6)


@pytest.mark.parametrize("positions_BT", [[[0], [C], [C + 3]], [[C], [C], [C]]])
def test_rows_that_are_not_in_use_divide_by_nothing(positions_BT):
    q_BTHE, *cache = arrays(0, S, 1)
    keys_SCF, values_SCF = (array.reshape(S, C, -1) for array in cache)
    rule = AttentionRule(1.0, window=2)
    out = ATTEND(q_BTHE, keys_SCF, values_SCF, rule, np.array(positions_BT, np.int32))
    assert np.isfinite(out).all()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 99),
    st.lists(st.tuples(st.integers(0, C), st.integers(0, S - 1)), min_size=13, max_size=13),
    st.randoms(use_true_random=False),
    st.sampled_from([None, *WINDOWS]),
)
def test_many_rows_are_worked_off_in_groups_that_no_row_feels(seed, rows, random, window):
    """13 rows, two groups. Against JAX's own, and bitwise the same in any other order."""
    q_BTHE, keys_SCKE, values_SCKE = arrays(seed, len(rows), 1)
    positions_BT, slot_B = np.array([[p] for p, _ in rows]), np.array([slot for _, slot in rows])
    keys_SCF, values_SCF = (array.reshape(S, C, -1) for array in (keys_SCKE, values_SCKE))
    rule = RULE._replace(window=window)

    def attend(order):
        asked = (positions_BT[order].astype(np.int32), slot_B[order].astype(np.int32))
        return np.asarray(ATTEND(q_BTHE[order], keys_SCF, values_SCF, rule, *asked))

    found, order = attend(np.arange(len(rows))), random.sample(range(len(rows)), len(rows))
    np.testing.assert_array_equal(attend(order), found[order])
    in_use = positions_BT[:, 0] < C
    behind_BTC = positions_BT[:, :, None] - np.arange(C)
    seen_B1TC = ((behind_BTC >= 0) & (behind_BTC < (window or C)))[:, None]
    expected = jax.nn.dot_product_attention(
        q_BTHE, keys_SCKE[slot_B], values_SCKE[slot_B], mask=seen_B1TC
    )
    np.testing.assert_allclose(found[in_use], expected[in_use], atol=2e-6)


@pytest.mark.parametrize(
    ("window", "steps"),
    [(None, 4 + 2 + 1), (C, 4 + 2 + 1), (1, 4), (130, 4 + 2)],
)
def test_the_cost_is_what_all_rows_see_and_not_rows_times_the_longest(window, steps):
    """32 rows, 8 at a time. With no window all see a block, 9 a second, one a third: not 4 x 3."""
    positions_BT = np.array([[127]] * 23 + [[250]] * 8 + [[383]], np.int32)
    plan = _plan(RULE._replace(window=window), positions_BT, C, 128)
    assert (plan.group, int(plan.done[-1])) == (8, steps)
