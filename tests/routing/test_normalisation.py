import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.routing.normalisation import NORMALISERS, min_max, normalise, rank, z_score

numbers = st.floats(-10, 10)
methods = st.sampled_from(list(NORMALISERS))
scopes = st.sampled_from(["prompt", "set"])
answers = st.lists(st.tuples(st.integers(-20, 20), st.sampled_from("pqr")), min_size=1, max_size=12)


def test_by_hand():
    # mean 3, population variance (4 + 0 + 4) / 3
    np.testing.assert_allclose(z_score([1, 3, 5]), np.array([-2, 0, 2]) / np.sqrt(8 / 3))
    np.testing.assert_allclose(min_max([1, 3, 9]), [0, 0.25, 1])
    np.testing.assert_allclose(rank([1, 3, 9]), [0, 0.5, 1])
    np.testing.assert_allclose(rank([3, 1, 3, 9, 3]), [0.5, 0, 0.5, 1, 0.5])


@given(st.lists(numbers, min_size=2, max_size=8, unique=True))
def test_z_scores_have_mean_0_and_variance_1(values):
    z = z_score(values)
    assert z.mean() == pytest.approx(0, abs=1e-9)
    assert (z**2).mean() == pytest.approx(1)


@given(st.lists(st.integers(-9, 9), min_size=2, max_size=8), methods)
def test_the_order_is_kept_and_equal_stays_equal(values, method):
    found = NORMALISERS[method](values)
    for i, low in enumerate(values):
        for j, high in enumerate(values):
            assert (found[i] < found[j]) == (low < high)


@given(st.lists(st.integers(-9, 9), min_size=2, max_size=8).filter(lambda v: len(set(v)) > 1))
def test_ranges(values):
    assert (min_max(values).min(), min_max(values).max()) == (0, 1)
    assert 0 <= rank(values).min() < rank(values).max() <= 1
    assert rank(values).mean() == pytest.approx(0.5)


@given(
    st.lists(st.integers(-100, 100), min_size=1, max_size=8), st.floats(0.1, 10), numbers, methods
)
def test_unit_and_origin_do_not_matter(values, scale, shift, method):
    moved = [scale * value + shift for value in values]
    np.testing.assert_allclose(NORMALISERS[method](moved), NORMALISERS[method](values), atol=1e-9)


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=8))
def test_ranks_see_the_order_alone(values):
    np.testing.assert_array_equal(rank(np.exp(np.array(values, float))), rank(values))


@given(numbers, st.integers(1, 8), methods)
def test_equal_values_give_exactly_0(value, size, method):
    assert (NORMALISERS[method]([value] * size) == 0).all()


@given(st.lists(numbers, max_size=6), st.integers(0, 6), methods)
def test_an_unknown_value_is_the_mean_and_moves_no_other(values, place, method):
    place = min(place, len(values))
    found = NORMALISERS[method]([*values[:place], np.nan, *values[place:]])
    known = NORMALISERS[method](values)
    np.testing.assert_array_equal(np.delete(found, place), known)
    assert found[place] == pytest.approx(known.mean() if values else 0)


@given(answers, methods, st.randoms())
def test_prompts_are_apart_and_answers_in_any_order(rows, method, random):
    values, prompts = zip(*rows, strict=True)
    found = normalise(values, prompts, method, "prompt")
    for prompt in set(prompts):
        mine = [n for n, other in enumerate(prompts) if other == prompt]
        np.testing.assert_array_equal(found[mine], NORMALISERS[method]([values[n] for n in mine]))
    order = random.sample(range(len(rows)), len(rows))
    shuffled = normalise([values[n] for n in order], [prompts[n] for n in order], method, "prompt")
    np.testing.assert_allclose(shuffled, found[order], atol=1e-12)


@given(answers, methods)
def test_over_the_set_prompts_do_not_matter(rows, method):
    values, prompts = zip(*rows, strict=True)
    found = normalise(values, prompts, method, "set")
    np.testing.assert_array_equal(found, NORMALISERS[method](values))
    np.testing.assert_array_equal(found, normalise(values, ["p"] * len(rows), method, "prompt"))


@given(answers, methods, scopes)
def test_the_best_of_a_prompt_stays_its_best(rows, method, scope):
    values, prompts = (np.array(column) for column in zip(*rows, strict=True))
    found = normalise(values, prompts, method, scope)
    for prompt in set(prompts):
        mine = prompts == prompt
        assert found[mine].argmax() == values[mine].argmax()
