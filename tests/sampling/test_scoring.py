"""Likelihoods and pooled states of many rows: each is what it is alone, in the caller's order."""

import jax
import numpy as np
import pytest
from engine_cases import MODEL

from persyn_jax import mesh as meshes
from persyn_jax.models import rows
from persyn_jax.models.rows import Conversation
from persyn_jax.sampling.scoring import mean_log_likelihoods, pooled_states

RNG = np.random.default_rng(0)


def tokens(length: int) -> tuple[int, ...]:
    return tuple(RNG.integers(3, 259, length).tolist())


CONVERSATIONS = [
    Conversation(tokens(RNG.integers(1, 45)), tokens(RNG.integers(1, 16))) for _ in range(21)
]


def test_the_mean_is_over_the_response_tokens_of_each_conversation():
    means = mean_log_likelihoods(MODEL, CONVERSATIONS, meshes.make_mesh(2))
    assert means.dtype == np.float64
    packed = rows.pack([[conversation] for conversation in CONVERSATIONS], length=64, responses=16)
    together = jax.jit(rows.response_log_likelihoods, static_argnums=0)
    log_likelihood_NR = together(MODEL.config, jax.device_put(MODEL.params), jax.device_put(packed))
    for mean, log_likelihood_R, conversation in zip(
        means, np.asarray(log_likelihood_NR, np.float64), CONVERSATIONS, strict=True
    ):
        expected = log_likelihood_R[: len(conversation.response)].mean()
        np.testing.assert_allclose(mean, expected, atol=1e-5)


def test_results_follow_the_callers_order_and_equal_conversations_are_equal():
    mesh = meshes.make_mesh(2)
    means = mean_log_likelihoods(MODEL, CONVERSATIONS, mesh)
    order = np.random.default_rng(1).integers(0, len(CONVERSATIONS), 40)  # with repetitions
    order[0] = max(range(len(CONVERSATIONS)), key=lambda i: len(CONVERSATIONS[i].response))
    shuffled = mean_log_likelihoods(MODEL, [CONVERSATIONS[i] for i in order], mesh)
    np.testing.assert_array_equal(shuffled, means[order])


def test_the_pooled_state_is_the_last_tokens():
    prompts = [tokens(length) for length in (1, 5, 31, 32, 33, 64, 2, 40)]
    state_ND = pooled_states(MODEL, prompts, meshes.make_mesh(2))
    assert state_ND.shape == (8, MODEL.config.d_model)
    assert state_ND.dtype == np.float32
    tokens_NT = np.zeros((8, 64), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_NT[row, : len(prompt)] = prompt
    together = jax.jit(rows.last_states, static_argnums=0)
    length_N = np.array([len(prompt) for prompt in prompts], np.int32)
    expected_ND = together(MODEL.config, jax.device_put(MODEL.params), tokens_NT, length_N)
    np.testing.assert_allclose(state_ND, expected_ND, atol=1e-4)


def test_nothing_to_score_is_no_error():
    mesh = meshes.make_mesh(1)
    assert mean_log_likelihoods(MODEL, [], mesh).shape == (0,)
    assert pooled_states(MODEL, [], mesh).shape == (0, MODEL.config.d_model)


def test_what_has_no_tokens_is_refused():
    mesh = meshes.make_mesh(1)
    with pytest.raises(ValueError, match="response without tokens"):
        mean_log_likelihoods(MODEL, [Conversation((1,), ())], mesh)
    with pytest.raises(ValueError, match="no prompt"):
        mean_log_likelihoods(MODEL, [Conversation((), (1,))], mesh)
    with pytest.raises(ValueError, match="prompt without tokens"):
        pooled_states(MODEL, [(1,), ()], mesh)
