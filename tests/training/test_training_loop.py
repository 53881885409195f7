"""The stop at numbers that are not finite, and the uniform mean."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from training_tiny import head_training

from persyn_jax.mesh import make_mesh
from persyn_jax.training.loop import run_steps, uniform_mean


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
