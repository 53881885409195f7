"""The optimiser's schedule, the stop at numbers that are not finite, and the uniform mean."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_tiny import head_training

from persyn_jax.mesh import make_mesh
from persyn_jax.training.config import OptimiserConfig
from persyn_jax.training.loop import make_optimiser, run_steps, uniform_mean


def step_sizes(config: OptimiserConfig, steps: int) -> list[float]:
    """Length of each step on a gradient of 1: Adam's is the learning rate then."""
    optimiser = make_optimiser(config, steps)
    params, gradient = jnp.zeros(()), jnp.ones(())
    state, sizes = optimiser.init(params), []
    for _ in range(steps):
        updates, state = optimiser.update(gradient, state, params)
        sizes.append(float(-updates))
    return sizes


def test_learning_rate_rises_linearly_and_falls_like_a_cosine():
    config = OptimiserConfig(learning_rate=0.5, warmup_fraction=0.2)
    steps = np.arange(20)
    expected = np.where(steps < 4, steps / 4, (1 + np.cos(np.pi * (steps - 4) / 16)) / 2) / 2
    np.testing.assert_allclose(step_sizes(config, 20), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_every_length_of_training_and_of_warm_up_is_possible(steps, fraction):
    sizes = step_sizes(OptimiserConfig(learning_rate=0.5, warmup_fraction=fraction), steps)
    assert sizes[0] == 0
    assert np.isfinite(sizes).all()
    assert max(sizes) <= 0.5 * (1 + 1e-4)


def test_gradients_are_clipped_by_their_global_norm():
    """Seen from Adam: only the direction of a long gradient is left, a short one is as it was."""
    params = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    long = {"a": jnp.array([300.0, 0.0]), "b": jnp.array(-400.0)}
    state = make_optimiser(OptimiserConfig(clip_norm=2.0), 10).init(params)
    _, state = make_optimiser(OptimiserConfig(clip_norm=2.0), 10).update(long, state, params)
    first_moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(first_moment["a"], [0.1 * 1.2, 0], rtol=1e-5)
    np.testing.assert_allclose(first_moment["b"], 0.1 * -1.6, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_the_training_and_names_the_step(value):
    training = head_training(workers=2, probability=1.0, rounds=6)

    def batch_at(number: int):
        batch = training.batch_at(number)
        if number == 3:
            batch.pooled[1] = value
        return batch

    arguments = (training.mesh_step, training.mesh_start(), batch_at, training.schedule)
    steps = run_steps(*arguments, training.steps, training.mesh)
    assert [next(steps).number for _ in range(3)] == [0, 1, 2]
    with pytest.raises(FloatingPointError, match=r"training step 3: not finite: loss by worker \["):
        next(steps)


def test_a_gradient_that_is_not_finite_stops_the_training_though_the_loss_is():
    """sqrt at 0: value 0, slope infinite. The optimiser's moments would carry it on for ever."""
    training = head_training(workers=2, probability=0.0, rounds=2)
    kinked = dataclasses.replace(
        training,
        params={"bias": np.zeros(3, np.float32)},
        loss=lambda params, batch: (jnp.sqrt(jnp.abs(params["bias"]).sum()), jnp.float32(1)),
    )
    arguments = (kinked.mesh_step, kinked.mesh_start(), kinked.batch_at, kinked.schedule)
    steps = run_steps(*arguments, kinked.steps, kinked.mesh)
    with pytest.raises(FloatingPointError, match=r"step 0: .*loss by worker \[0\.0, 0\.0\]"):
        next(steps)


def test_steps_carry_absolute_numbers_so_a_resumed_training_sees_the_same_rounds():
    training = head_training(workers=2, probability=0.5, rounds=8)
    asked = []

    def batch_at(number: int):
        asked.append(number)
        return training.batch_at(number)

    arguments = (training.mesh_step, training.mesh_start(), batch_at, training.schedule)
    numbers = [taken.number for taken in run_steps(*arguments, range(5, 8), training.mesh)]
    assert asked == numbers == [5, 6, 7]


def test_uniform_mean_weighs_all_workers_alike_and_keeps_the_dtype():
    stacked = {
        "a": jnp.array([[1.0, 2.0], [3.0, 8.0], [5.0, 2.0]], jnp.float32),
        "b": jnp.array([1.0, 2.0, 6.0], jnp.bfloat16),
    }
    mean = uniform_mean(stacked, make_mesh(1))
    np.testing.assert_array_equal(mean["a"], np.array([3.0, 4.0], np.float32))
    assert mean["b"] == 3
    assert {name: leaf.dtype for name, leaf in mean.items()} == {
        "a": np.dtype(np.float32),
        "b": jnp.bfloat16,
    }


def test_uniform_mean_does_not_round_on_the_way():
    """In float32 the sum of these would already be 2**24."""
    stacked = jnp.array([[2.0**24], [1.0], [1.0], [2.0]], jnp.float32)
    assert uniform_mean(stacked, make_mesh(1)) == (2**24 + 4) / 4
