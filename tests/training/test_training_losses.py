"""The two losses against the same numbers computed by hand, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_tiny import CONFIG, LOSS, TEACHERS, make_head, make_pairs, tiny_params

from persyn_jax.models import decoder
from persyn_jax.models.rows import Conversation, pack
from persyn_jax.models.weights import RANDOM_TINY
from persyn_jax.training.losses import Pairs, bradley_terry_loss

PARAMS = tiny_params()
TOKENS = 9
EOS = RANDOM_TINY.vocab_size - 1
loss_of = jax.jit(LOSS)


def make_conversation(responses: int) -> Conversation:
    """Nine tokens, so that one compiled program serves all; the last `responses` answer."""
    draw = np.random.default_rng(responses)
    tokens = tuple(draw.integers(3, RANDOM_TINY.vocab_size, TOKENS).tolist())
    return Conversation(tokens[:-responses], tokens[-responses:])


CONVERSATIONS = [make_conversation(responses) for responses in range(1, 7)]


def packed(rows, length: int = CONFIG.row_tokens, responses: int = CONFIG.row_response_tokens):
    """A batch of six rows, the last ones empty."""
    return pack([*rows, *[[]] * (6 - len(rows))], length, responses)


@jax.jit
def logits_of(params, tokens_T: jax.Array) -> jax.Array:
    """float32[T, V]: the decoder over one conversation, alone and without padding."""
    tokens_BT = tokens_T[None]
    attend = decoder.attend_causally(jnp.ones_like(tokens_BT))
    positions_BT = jnp.arange(TOKENS)[None]
    hidden_BTD, _ = decoder.hidden_states(RANDOM_TINY, params, tokens_BT, positions_BT, attend)
    return decoder.logits(RANDOM_TINY, params, hidden_BTD)[0]


def log_likelihoods(conversation: Conversation) -> list[float]:
    """log softmax(logits)[next token] for each response token, in float64."""
    tokens = conversation.prompt + conversation.response
    logits_TV = np.float64(logits_of(PARAMS, np.array(tokens)))
    return [
        logits_TV[t - 1, tokens[t]] - np.log(np.exp(logits_TV[t - 1]).sum())
        for t in range(len(conversation.prompt), TOKENS)
    ]


BY_HAND = [log_likelihoods(conversation) for conversation in CONVERSATIONS]


def test_loss_is_the_mean_over_the_response_tokens_of_the_batch():
    """Over tokens, not over conversations: their lengths differ."""
    loss, weight = loss_of(PARAMS, packed([[c] for c in CONVERSATIONS]))
    everything = np.concatenate(BY_HAND)
    assert weight == len(everything)
    np.testing.assert_allclose(loss, -everything.mean(), rtol=1e-5)
    mean_of_means = np.mean([np.mean(each) for each in BY_HAND])
    assert abs(everything.mean() - mean_of_means) > 1e-3


def test_packed_rows_have_the_loss_of_unpacked_ones():
    unpacked, _ = loss_of(PARAMS, packed([[c] for c in CONVERSATIONS]))
    rows = [CONVERSATIONS[:2], CONVERSATIONS[2:4], [CONVERSATIONS[4]], [CONVERSATIONS[5]]]
    together, weight = loss_of(PARAMS, packed(rows))
    assert weight == sum(len(c.response) for c in CONVERSATIONS)
    np.testing.assert_allclose(together, unpacked, rtol=1e-5)


def test_eos_counts_like_any_response_token():
    cut_off = CONVERSATIONS[2]
    ended = Conversation(cut_off.prompt[1:], (*cut_off.response, EOS))
    loss, weight = loss_of(PARAMS, packed([[ended]]))
    assert weight == len(cut_off.response) + 1
    np.testing.assert_allclose(loss, -np.mean(log_likelihoods(ended)), rtol=1e-5)


@settings(max_examples=10)
@given(noise=st.integers(1, RANDOM_TINY.vocab_size - 1))
def test_what_stands_in_the_padding_changes_nothing(noise):
    batch = packed([[c] for c in CONVERSATIONS])
    dirty = batch._replace(
        tokens=np.where(batch.segments == 0, noise, batch.tokens).astype(np.int32),
        targets=np.where(batch.weights == 0, noise, batch.targets).astype(np.int32),
    )
    assert loss_of(PARAMS, dirty) == loss_of(PARAMS, batch)


def test_more_padding_changes_nothing():
    expected, weight = loss_of(PARAMS, packed([[c] for c in CONVERSATIONS]))
    wide = packed([[c] for c in CONVERSATIONS], length=40, responses=16)
    loss, found = loss_of(PARAMS, wide)
    assert found == weight
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_batch_without_responses_has_loss_0():
    assert loss_of(PARAMS, packed([])) == (0, 0)


def coefficients(head: dict, pairs: Pairs) -> np.ndarray:
    return np.float64(pairs.pooled) @ np.float64(head["kernel"]).T + head["bias"]


@pytest.mark.parametrize("seed", range(3))
def test_bradley_terry_loss_is_binary_cross_entropy_with_either_label(seed):
    head, pairs = make_head(seed), make_pairs(seed)
    rows = np.arange(len(pairs.winner))
    c_BM = coefficients(head, pairs)
    probability_B = 1 / (1 + np.exp(c_BM[rows, pairs.loser] - c_BM[rows, pairs.winner]))
    labelled_1 = -np.log(probability_B)
    labelled_0 = -np.log(1 - 1 / (1 + np.exp(c_BM[rows, pairs.winner] - c_BM[rows, pairs.loser])))
    loss, weight = bradley_terry_loss(head, pairs)
    assert weight == len(rows)
    np.testing.assert_allclose(loss, labelled_1.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, labelled_0.mean(), rtol=1e-5)


@settings(max_examples=20)
@given(shift=st.floats(-3, 3, width=32))
def test_a_constant_added_to_all_coefficients_changes_nothing(shift):
    head, pairs = make_head(1), make_pairs(1)
    shifted = head | {"bias": head["bias"] + np.float32(shift)}
    loss, _ = bradley_terry_loss(head, pairs)
    np.testing.assert_allclose(bradley_terry_loss(shifted, pairs)[0], loss, rtol=1e-5)


def test_the_gradient_pulls_winner_and_loser_apart_by_the_same_amount():
    head, pairs = make_head(2), make_pairs(2, count=1)
    gradient_M = jax.grad(lambda h: bradley_terry_loss(h, pairs)[0])(head)["bias"]
    (winner,), (loser,) = pairs.winner, pairs.loser
    c_M = coefficients(head, pairs)[0]
    surprise = 1 / (1 + np.exp(c_M[winner] - c_M[loser]))
    expected_M = np.zeros(TEACHERS)
    expected_M[winner], expected_M[loser] = -surprise, surprise
    np.testing.assert_allclose(gradient_M, expected_M, rtol=1e-5)


def test_padded_pairs_do_not_count():
    head, pairs = make_head(3), make_pairs(3, count=4)
    wide = Pairs(*(np.concatenate([field, field[:2]]) for field in pairs))
    wide.weights[4:] = 0
    loss, weight = bradley_terry_loss(head, wide)
    assert weight == 4
    np.testing.assert_allclose(loss, bradley_terry_loss(head, pairs)[0], rtol=1e-6)
    wide.weights[:] = 0
    assert bradley_terry_loss(head, wide) == (0, 0)
