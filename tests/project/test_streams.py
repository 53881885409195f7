"""Named streams: a choice depends on its name and nothing else."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.streams import jax_stream, numpy_stream

seeds = st.integers(0, 2**31 - 1)
purposes = st.text(max_size=12)
pairs_of_indices = st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
names = st.tuples(seeds, purposes, pairs_of_indices)


def numpy_draw(name) -> list[int]:
    seed, purpose, indices = name
    return numpy_stream(seed, purpose, *indices).integers(0, 2**63, 2).tolist()


def jax_draw(name) -> list[int]:
    seed, purpose, indices = name
    return jax.random.key_data(jax_stream(seed, purpose, *indices)).tolist()


@pytest.mark.parametrize("draw", [numpy_draw, jax_draw])
@given(st.lists(names, min_size=2, max_size=4, unique=True), st.randoms(use_true_random=False))
def test_draws_depend_on_names_and_not_on_order(draw, some_names, random):
    """Unlike names draw unlike values, and drawing in another order changes none of them."""
    drawn = {name: draw(name) for name in some_names}
    assert len({tuple(values) for values in drawn.values()}) == len(drawn)
    random.shuffle(some_names)
    assert {name: draw(name) for name in some_names} == drawn


def test_numpy_streams_are_the_recorded_ones():
    """Other values here mean other runs for every user: never change these with a refactoring."""
    assert numpy_stream(7, "coins").integers(0, 1000, 4).tolist() == [594, 146, 76, 135]
    assert numpy_stream(7, "coins", 3, 1).integers(0, 1000, 4).tolist() == [43, 519, 766, 110]


def test_jax_streams_are_the_recorded_ones():
    """As above. The keys are typed, so that JAX itself refuses to take one for an array."""
    assert jax_draw((7, "coins", ())) == [1616588912, 2844361481]
    assert jax_draw((7, "coins", (3, 1))) == [1820511677, 1716510698]
    assert jax.dtypes.issubdtype(jax_stream(7, "coins").dtype, jax.dtypes.prng_key)


def test_index_may_be_traced():
    """A step number inside a compiled program gives the key that it gives outside."""
    traced = jax.jit(lambda step: jax_stream(7, "coins", step))(3)
    outside = jax_stream(7, "coins", 3)
    np.testing.assert_array_equal(jax.random.key_data(traced), jax.random.key_data(outside))


def test_global_generator_is_left_alone():
    before = np.random.get_state()[1].copy()
    numpy_stream(1, "coins").random(5)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
