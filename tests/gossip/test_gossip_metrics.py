import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gossip_layouts import on_a_device_each, on_one_device

from persyn_jax.gossip import (
    consensus_distance,
    consensus_distance_stacked,
    weighted_mean,
    weighted_mean_stacked,
)
from persyn_jax.mesh import WORKER


def make_params(workers):
    generator = np.random.default_rng(workers)
    return {
        "kernel": generator.normal(size=(workers, 6, 5)).astype(np.float32),
        "bias": generator.normal(size=(workers, 6)).astype(np.float32),
    }


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_consensus_distance_is_the_mean_over_pairs(workers):
    params_W = make_params(workers)
    flat_WN = np.concatenate([leaf.reshape(workers, -1) for leaf in params_W.values()], axis=1)
    pairs_WWN = flat_WN[:, None].astype(np.float64) - flat_WN[None]
    expected = (pairs_WWN**2).sum() / (
        2 * workers
    )  # sum ||x_m - xbar||^2 = sum_ij ||x_i - x_j||^2 / 2M
    np.testing.assert_allclose(consensus_distance_stacked(params_W), expected, rtol=1e-6)

    def step(params, _):
        return consensus_distance(params, WORKER)

    for run in (on_one_device(step), on_a_device_each(step, workers)):
        measured_W = run(params_W, np.int32(0))
        assert (measured_W.shape, measured_W.dtype) == ((workers,), jnp.float32)
        np.testing.assert_allclose(measured_W, np.full(workers, expected), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_weighted_mean_in_every_form(workers):
    params_W = make_params(workers)
    weight_W = np.random.default_rng(0).uniform(0.1, 1, workers)  # need not total 1
    expected = {
        name: sum(w * leaf for w, leaf in zip(weight_W, leaf_W, strict=True)) / weight_W.sum()
        for name, leaf_W in params_W.items()
    }
    chex.assert_trees_all_close(weighted_mean_stacked(params_W, weight_W), expected, rtol=1e-6)

    def step(params, sum_weight, _):
        return weighted_mean(params, sum_weight, WORKER)

    for run in (on_one_device(step), on_a_device_each(step, workers)):
        means_W = run(params_W, weight_W.astype(np.float32), np.int32(0))
        for worker in range(workers):
            mean = jax.tree.map(lambda leaf_W, worker=worker: leaf_W[worker], means_W)
            chex.assert_trees_all_close(mean, expected, rtol=1e-5, atol=1e-6)
