"""Rows: likelihoods against NumPy; padding, packing and neighbours change nothing."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persyn_jax.models import rows
from persyn_jax.models.rows import Conversation

CONFIG = numpy_llama.small_config(tied=True)
PARAMS = numpy_llama.random_params(CONFIG, seed=0)
LIKELIHOODS = jax.jit(functools.partial(rows.response_log_likelihoods, CONFIG))
SCORES = jax.jit(functools.partial(rows.response_scores, CONFIG))
STATES = jax.jit(functools.partial(rows.last_states, CONFIG))

B, T, R = 3, 32, 12
token = st.integers(0, 30)
conversations = st.builds(
    Conversation,
    prompt=st.lists(token, min_size=1, max_size=6).map(tuple),
    response=st.lists(token, max_size=4).map(tuple),
)
row = st.lists(conversations, max_size=3)  # at most T tokens and R response tokens


def likelihoods(packed: list[list[Conversation]]) -> list[np.ndarray]:
    """Those of each row's response tokens, padding cut off, in a batch of the one shape."""
    padded = packed + [[]] * (B - len(packed))
    log_likelihood_BR = np.asarray(LIKELIHOODS(PARAMS, rows.pack(padded, T, R)))
    counts = [sum(len(c.response) for c in conversations) for conversations in padded]
    for row, count in zip(log_likelihood_BR, counts, strict=True):
        assert not row[count:].any(), "padding has no likelihood"
    return [row[:count] for row, count in zip(log_likelihood_BR, counts, strict=True)]


@given(st.lists(row, min_size=B, max_size=B))
@settings(max_examples=25)
def test_likelihoods_equal_the_equations_however_conversations_are_packed(packed):
    for found, conversations in zip(likelihoods(packed), packed, strict=True):
        expected = [
            numpy_llama.response_log_likelihoods(CONFIG, PARAMS, c.prompt, c.response)
            for c in conversations
        ]
        np.testing.assert_allclose(found, np.concatenate([[], *expected]), rtol=0, atol=1e-3)


@given(st.lists(row, min_size=B, max_size=B))
@settings(max_examples=25)
def test_a_conversation_packed_with_others_has_the_likelihoods_it_has_alone(packed):
    for found, conversations in zip(likelihoods(packed), packed, strict=True):
        alone = [likelihoods([[conversation]])[0] for conversation in conversations]
        np.testing.assert_allclose(found, np.concatenate([[], *alone]), rtol=0, atol=1e-5)


@given(st.lists(row, min_size=B, max_size=B), st.integers(0, B - 1))
@settings(max_examples=25)
def test_a_row_is_bitwise_the_same_beside_padding_and_beside_other_rows(packed, place):
    moved = [packed[place]] + [[]] * (B - 1)
    np.testing.assert_array_equal(likelihoods(packed)[place], likelihoods(moved)[0])


@given(st.lists(row, min_size=B, max_size=B))
@settings(max_examples=10)
def test_ranks_count_the_likelier_tokens(packed):
    arrays = rows.pack(packed, T, R)
    log_likelihood_BR, rank_BR = map(np.asarray, SCORES(PARAMS, arrays))
    np.testing.assert_array_equal(log_likelihood_BR, LIKELIHOODS(PARAMS, arrays))
    for found, conversations in zip(rank_BR, packed, strict=True):
        lowest, highest = [], []  # two tokens may be as good as equal
        for c in conversations:
            after = numpy_llama.log_probabilities(CONFIG, PARAMS, [*c.prompt, *c.response])
            after = after[len(c.prompt) - 1 :][: len(c.response)]
            own = after[np.arange(len(c.response)), list(c.response)][:, None]
            lowest += (1 + (after > own + 1e-3).sum(axis=1)).tolist()
            highest += (after > own - 1e-3).sum(axis=1).tolist()
        padding = [0] * (R - len(lowest))
        assert (np.array(lowest + padding) <= found).all()
        assert (found <= np.array(highest + padding)).all()


def test_pack_lays_out_what_it_says():
    packed = rows.pack([[Conversation((5, 6), (7,)), Conversation((8,), (9, 2))], []], 8, 4)
    np.testing.assert_array_equal(packed.tokens[0], [5, 6, 7, 8, 9, 2, 0, 0])
    np.testing.assert_array_equal(packed.positions[0], [0, 1, 2, 0, 1, 2, 0, 0])
    np.testing.assert_array_equal(packed.segments[0], [1, 1, 1, 2, 2, 2, 0, 0])
    np.testing.assert_array_equal(packed.predictors[0], [1, 3, 4, 0])
    np.testing.assert_array_equal(packed.targets[0], [7, 9, 2, 0])
    np.testing.assert_array_equal(packed.weights[0], [1, 1, 1, 0])
    assert not any(field[1].any() for field in packed)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (Conversation((1,) * 6, (2,) * 3), "row 0 holds 9 tokens and 3 response tokens"),
        (Conversation((1,), (2,) * 5), "room for 8 and 4"),
        (Conversation((), (2,)), "row 0: a conversation has no prompt"),
    ],
)
def test_pack_refuses_what_does_not_fit(conversation, message):
    with pytest.raises(ValueError, match=message):
        rows.pack([[conversation]], 8, 4)


@given(st.lists(st.lists(token, min_size=1, max_size=T), min_size=B, max_size=B), st.data())
@settings(max_examples=25)
def test_the_pooled_state_is_the_last_real_tokens_whatever_stands_behind_it(prompts, data):
    length_B = np.array([len(prompt) for prompt in prompts], np.int32)
    filling = data.draw(st.integers(0, 30))
    tokens_BT = np.full((B, T), filling, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    state_BD = np.asarray(STATES(PARAMS, tokens_BT, length_B))
    for state_D, prompt in zip(state_BD, prompts, strict=True):
        expected = numpy_llama.hidden_states(CONFIG, PARAMS, prompt)[-1]
        np.testing.assert_allclose(state_D, expected, rtol=0, atol=5e-4)
    real = np.arange(T) < length_B[:, None]
    zeroed = np.asarray(STATES(PARAMS, np.where(real, tokens_BT, 0).astype(np.int32), length_B))
    np.testing.assert_array_equal(state_BD, zeroed)


def test_chunks_of_tokens_change_nothing_but_rounding(monkeypatch):
    packed = long_rows(150, 150)  # three chunks, the last not full

    def computed():
        values = jax.jit(lambda: rows.response_log_likelihoods(CONFIG, PARAMS, packed))()
        return np.asarray(values), jax.jit(jax.grad(summed))(PARAMS, packed)

    in_chunks, its_gradient = computed()
    monkeypatch.setattr(rows, "CHUNK", 1000)
    whole, expected_gradient = computed()
    np.testing.assert_allclose(in_chunks, whole, rtol=1e-6)
    chex.assert_trees_all_close(its_gradient, expected_gradient, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("lengths", [(1, 3), (rows.CHUNK, 20), (rows.CHUNK + 1, 70), (150, 0)])
def test_the_sum_and_its_gradient_are_those_of_the_log_likelihoods(lengths):
    packed = long_rows(*lengths)
    weights_BR = packed.weights * np.linspace(0.5, 2, packed.weights.size).reshape(2, -1)
    packed = packed._replace(weights=weights_BR.astype(np.float32))

    def taken(function):
        """Value and gradient of -3 log(-sum): the cotangent of the sum is not 1."""

        def loss(params, weights):
            return -3 * jnp.log(-function(params, packed._replace(weights=weights)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(PARAMS, packed.weights)

    value, gradient = taken(functools.partial(rows.response_log_likelihood_sum, CONFIG))
    expected, expected_gradient = taken(summed)
    assert value == expected
    chex.assert_trees_all_close(gradient, expected_gradient, atol=1e-6, rtol=1e-4)


def summed(params, packed):
    return (rows.response_log_likelihoods(CONFIG, params, packed) * packed.weights).sum()


def long_rows(*lengths: int) -> rows.Rows:
    """A conversation a row with so many response tokens."""
    rng = np.random.default_rng(0)

    def conversation(length: int) -> Conversation:
        return Conversation(tuple(rng.integers(0, 30, 4)), tuple(rng.integers(0, 30, length)))

    most = max(lengths)
    return rows.pack([[conversation(length)] for length in lengths], most + 10, most)
