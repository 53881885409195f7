"""Likelihoods and pooled states of many rows: each is what it is alone, in the caller's order."""

import jax
import numpy as np
import pytest
from engine_cases import MODEL, log_probabilities

from persyn_jax import mesh as meshes
from persyn_jax.models import rows
from persyn_jax.models.rows import Conversation
from persyn_jax.models.tokenizer import response_ids
from persyn_jax.sampling.scoring import (
    in_steps,
    mean_log_likelihoods,
    pooled_states,
    response_steps,
    score_tokens,
    without_prompt,
)

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


def test_tokens_have_the_scores_that_the_full_logits_give_them():
    scores = score_tokens(MODEL, CONVERSATIONS, meshes.make_mesh(2), ranks=True)
    for found, conversation in zip(scores, CONVERSATIONS, strict=True):
        after_TV = log_probabilities(MODEL, conversation.prompt + conversation.response)
        after_TV = after_TV[len(conversation.prompt) - 1 : -1]
        own_T = after_TV[np.arange(len(after_TV)), list(conversation.response)]
        np.testing.assert_allclose(found.log_likelihood_T, own_T, atol=1e-4)
        # Two tokens may be as good as equal.
        lowest_T = 1 + (after_TV > own_T[:, None] + 1e-3).sum(axis=1)
        highest_T = (after_TV > own_T[:, None] - 1e-3).sum(axis=1)
        assert (lowest_T <= found.rank_T).all()
        assert (found.rank_T <= highest_T).all()
    assert max(found.rank_T.max() for found in scores) > 100


def test_scores_are_bitwise_the_same_alone_with_others_and_with_ranks():
    """So that what was measured in another run is what this one would have measured."""
    mesh = meshes.make_mesh(2)
    together = score_tokens(MODEL, CONVERSATIONS, mesh)
    with_ranks = score_tokens(MODEL, CONVERSATIONS, mesh, ranks=True)
    alone = [score_tokens(MODEL, [c], mesh)[0] for c in CONVERSATIONS[:4]]
    for one, other in (
        *zip(together, with_ranks, strict=True),
        *zip(together, alone, strict=False),
    ):
        np.testing.assert_array_equal(one.log_likelihood_T, other.log_likelihood_T)
    assert together[0].rank_T is None


def test_long_answers_are_scored_in_chunks():
    long = Conversation(tokens(20), tokens(150))
    (found,) = score_tokens(MODEL, [long], meshes.make_mesh(2), ranks=True)
    after_TV = log_probabilities(MODEL, long.prompt + long.response)[19:-1]
    own_T = after_TV[np.arange(150), list(long.response)]
    np.testing.assert_allclose(found.log_likelihood_T, own_T, atol=1e-4)
    assert found.rank_T.shape == (150,)


def test_without_its_prompt_a_response_follows_the_mark_that_begins_a_text():
    assert without_prompt(MODEL.tokenizer, Conversation((5, 6), (7, 8))) == Conversation(
        (MODEL.tokenizer.eos_token_id,), (7, 8)
    )


@pytest.mark.parametrize(
    "steps",
    [
        ["Hello"],
        ["We add 3.5 and 4.  ", 'She says "7.5!" ', "Then\n\n\n", "it is 8?\n"],
        ["\n\n one line\n  ", "another\n", "e.g. ", "this"],
        ["... ", "and\n", "so on..."],
        ["\u4e00\u4e8c\u3002", "\u4e09\uff1f", "\u56db"],
    ],
)
@pytest.mark.parametrize("ended", [True, False])
def test_steps_are_sentences_and_lines(steps, ended):
    """The tokenizer's tokens are bytes, so a step has as many as its text; EOS joins the last."""
    text = "".join(steps)
    step_T = response_steps(MODEL.tokenizer, text, ended)
    counts = [len(step.encode()) for step in steps]
    counts[-1] += ended
    np.testing.assert_array_equal(step_T, np.repeat(np.arange(len(steps)), counts))
    assert len(step_T) == len(response_ids(MODEL.tokenizer, text, ended))


def test_a_step_is_read_after_the_prompt_and_the_four_steps_before_it():
    step_T = np.array([0, 1, 1, 2, 3, 4, 5])
    assert in_steps(Conversation((90, 91), tuple(range(7))), step_T) == [
        Conversation((90, 91), (0,)),
        Conversation((90, 91, 0), (1, 2)),
        Conversation((90, 91, 0, 1, 2), (3,)),
        Conversation((90, 91, 0, 1, 2, 3), (4,)),
        Conversation((90, 91, 0, 1, 2, 3, 4), (5,)),
        Conversation((90, 91, 1, 2, 3, 4, 5), (6,)),
    ]


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
    with pytest.raises(ValueError, match="response without tokens"):
        score_tokens(MODEL, [Conversation((1,), ())], mesh)
    with pytest.raises(ValueError, match="no prompt"):
        mean_log_likelihoods(MODEL, [Conversation((), (1,))], mesh)
    with pytest.raises(ValueError, match="prompt without tokens"):
        pooled_states(MODEL, [(1,), ()], mesh)
