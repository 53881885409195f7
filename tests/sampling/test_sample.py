"""Drawing a token: its distribution against NumPy, and what it may depend on."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persyn_jax.sampling.programs import Sampling, sample

SAMPLE = jax.jit(sample)
LOGITS_V = np.array([2.0, 1.5, 1.5, 0.3, -0.5, -1.0, -4.0, -9.0], np.float32)
V = len(LOGITS_V)
ROWS = 20_000


def draw(logits_BV, position_B, temperature_B, top_p_B, seed_B, top_k_B=0) -> np.ndarray:
    sampling = Sampling(
        np.asarray(temperature_B, np.float32),
        np.asarray(top_p_B, np.float32),
        np.broadcast_to(np.asarray(top_k_B, np.int32), np.shape(seed_B)),
        np.asarray(seed_B, np.uint32),
        np.zeros(np.shape(seed_B), bool),
    )
    logits_BV = np.asarray(logits_BV, np.float32)
    return np.asarray(SAMPLE(logits_BV, np.asarray(position_B, np.int32), sampling))


def draw_many(temperature: float, top_p: float, seed_B, position_B) -> np.ndarray:
    return draw(
        np.tile(LOGITS_V, (ROWS, 1)),
        position_B,
        np.full(ROWS, temperature),
        np.full(ROWS, top_p),
        seed_B,
    )


def probabilities(temperature: float, top_p: float) -> np.ndarray:
    """Those of LOGITS_V in float64; with equals of the last token that top-p keeps."""
    p_V = np.exp(LOGITS_V.astype(np.float64) / temperature)
    p_V /= p_V.sum()
    order = np.argsort(-p_V, kind="stable")
    needed = np.searchsorted(np.cumsum(p_V[order]), top_p - 1e-9)
    kept_V = p_V >= p_V[order[min(needed, V - 1)]]
    return np.where(kept_V, p_V, 0) / p_V[kept_V].sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("varied", ["seed", "position"])
def test_tokens_are_drawn_with_their_probabilities(temperature, top_p, varied):
    many, one = np.arange(ROWS), np.full(ROWS, 7)
    seeds_and_positions = (many, one) if varied == "seed" else (one, many)
    tokens_B = draw_many(temperature, top_p, *seeds_and_positions)
    expected_V = probabilities(temperature, top_p) * ROWS
    found_V = np.bincount(tokens_B, minlength=V)
    assert not found_V[expected_V == 0].any(), "drawn from outside the top-p set"
    likely = expected_V > 5
    chi_square = ((found_V - expected_V)[likely] ** 2 / expected_V[likely]).sum()
    freedom = max(likely.sum() - 1, 1)
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)  # five standard deviations


def test_temperature_0_takes_the_likeliest_token():
    logits_BV = np.random.default_rng(0).normal(size=(64, 50))
    for others in (0.0, 1.0):  # also beside rows that are drawn
        temperature_B = np.where(np.arange(64) % 2, others, 0.0)
        tokens_B = draw(logits_BV, np.arange(64), temperature_B, np.ones(64), np.arange(64))
        np.testing.assert_array_equal(tokens_B[::2], logits_BV.argmax(axis=1)[::2])


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38])
def test_a_tiny_temperature_does_the_same(temperature):
    logits_BV = np.random.default_rng(0).integers(-40, 40, size=(64, 50)).astype(np.float32)
    logits_BV[np.arange(64), np.arange(64) % 50] = 41
    tokens_B = draw(logits_BV, np.zeros(64), np.full(64, temperature), np.full(64, 0.9), range(64))
    np.testing.assert_array_equal(tokens_B, np.arange(64) % 50)


row = st.tuples(
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),  # temperature
    st.sampled_from([0.1, 0.7, 1.0]),  # top_p
    st.integers(0, 2**32 - 1),  # seed
    st.integers(0, 1000),  # position
)


@given(own=row, neighbours=st.lists(row, min_size=7, max_size=7), place=st.integers(0, 7))
@settings(max_examples=100)
def test_a_row_does_not_depend_on_its_neighbours_or_its_place(own, neighbours, place):
    def token(rows, place):
        temperature_B, top_p_B, seed_B, position_B = zip(*rows, strict=True)
        logits_BV = np.random.default_rng(1).normal(size=(8, 40))
        logits_BV[place] = np.random.default_rng(2).normal(size=40)
        return draw(logits_BV, position_B, temperature_B, top_p_B, seed_B)[place]

    beside = [*neighbours[:place], own, *neighbours[place:]]
    assert token(beside, place) == token([own] * 8, 0)
