import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.gossip import (
    Exchange,
    consensus_distance_stacked,
    d_psgd,
    gosgd_schedule,
)
from persyn_jax.gossip.divergence import estimated_consensus_distance, output_divergence

divergence = jax.jit(output_divergence)


def entropy(p):
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1)


@given(seed=st.integers(0, 2**31), workers=st.integers(1, 5), scale=st.floats(0.1, 60))
def test_it_is_entropy_of_the_mean_less_mean_of_the_entropies(seed, workers, scale):
    logits_WBV = scale * np.random.default_rng(seed).normal(size=(workers, 4, 7))
    p_WBV = np.exp(logits_WBV - logits_WBV.max(axis=-1, keepdims=True))
    p_WBV /= p_WBV.sum(axis=-1, keepdims=True)
    expected = (entropy(p_WBV.mean(axis=0)) - entropy(p_WBV).mean(axis=0)).mean()
    measured = divergence(logits_WBV.astype(np.float32))
    assert (measured.shape, measured.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(measured, expected, rtol=1e-4, atol=1e-7)
    # Log-probabilities do as well, and the workers' order is nothing.
    np.testing.assert_allclose(
        divergence(np.log(p_WBV)[::-1].astype(np.float32)), expected, rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_from_agreement_to_contradiction(workers):
    logits_BV = np.random.default_rng(0).normal(size=(3, 9)).astype(np.float32)
    same_WBV = np.repeat(logits_BV[None], workers, axis=0)
    assert 0 <= divergence(same_WBV) < 1e-12
    sure_WBV = np.where(np.eye(workers, 9, dtype=bool)[:, None], 0.0, -np.inf).astype(np.float32)
    np.testing.assert_allclose(divergence(sure_WBV), np.log(workers), atol=1e-6)


def test_small_differences_are_not_lost_to_rounding():
    # p = (1 +- d) / 2: to second order the divergence is d^2 / 2.
    for d in (1e-2, 1e-3, 1e-4):
        p_WBV = np.array([[[1 + d, 1 - d]], [[1 - d, 1 + d]]]) / 2
        measured = divergence(np.log(p_WBV).astype(np.float32))
        np.testing.assert_allclose(measured, d**2 / 2, rtol=2e-3)


@pytest.mark.parametrize("workers", [2, 5, 8])
def test_the_free_estimate_is_right_on_average(workers):
    rounds = 3000
    schedule = gosgd_schedule(workers, rounds, 0.5, seed=0)
    rule = d_psgd(Exchange(schedule.bank, "worker"))
    x_WN = jnp.asarray(np.random.default_rng(1).normal(size=(workers, 4)), jnp.float32)
    state_W = jax.vmap(rule.init)(x_WN)
    step = jax.vmap(rule.update, in_axes=(0, 0, 0, None), axis_name="worker")

    def estimate(round):
        _, mixed_W = step(jnp.zeros_like(x_WN), state_W, x_WN, round)  # always from the start
        heard_W = (round.weight_KW > 0).sum(axis=0)
        return estimated_consensus_distance(mixed_W.pair_distance, heard_W)

    estimate_T = np.asarray(jax.jit(lambda table: jax.lax.map(estimate, table))(schedule.table()))
    is_silent_T = schedule.messages() == 0
    np.testing.assert_array_equal(np.isnan(estimate_T), is_silent_T)
    heard = estimate_T[~is_silent_T]
    error = heard.std() / np.sqrt(len(heard))
    assert abs(heard.mean() - consensus_distance_stacked(x_WN)) < 3 * error + 1e-4
