"""Steps over several batches at once, and the loss in bfloat16, against the plain ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_tiny import CONFIG, LOSS, head_training, make_conversations, make_pairs, tiny_params

from persyn_jax.models import rows
from persyn_jax.models.weights import RANDOM_TINY
from persyn_jax.training.losses import bradley_terry_loss, response_loss
from persyn_jax.training.precision import cast_loss
from persyn_jax.training.step import accumulated, compiled_programs, make_train_step, on_mesh

PARAMS = tiny_params()
CONVERSATIONS = make_conversations(8)
gradient_of = jax.jit(jax.value_and_grad(LOSS, has_aux=True))
accumulated_gradient_of = jax.jit(accumulated(jax.value_and_grad(LOSS, has_aux=True)))


def pack(rows_of_conversations) -> rows.Rows:
    return rows.pack(rows_of_conversations, CONFIG.row_tokens, CONFIG.row_response_tokens)


def split(batch, count: int):
    """[A * B, ...] -> [A, B, ...]"""
    return jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch)


def assert_close(found, expected, tolerance: float):
    """To this part of each leaf's largest entry."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            a, b, atol=tolerance * max(1e-3, np.abs(b).max()), rtol=tolerance
        )


@settings(max_examples=15)
@given(st.lists(st.booleans(), min_size=8, max_size=8))
def test_accumulated_batches_equal_one_large_batch(has_row):
    """Rows with and without conversations: the batches weigh unlike, some of them nothing."""
    filled = [[c] if there else [] for c, there in zip(CONVERSATIONS, has_row, strict=True)]
    batch = pack(filled)
    (loss, weight), gradient = gradient_of(PARAMS, batch)
    (found_loss, found_weight), found = accumulated_gradient_of(PARAMS, split(batch, 4))
    assert found_weight == weight
    np.testing.assert_allclose(found_loss, loss, rtol=1e-6, atol=1e-6)
    assert_close(found, gradient, 2e-6)
    assert accumulated_gradient_of._cache_size() == 1


def test_the_mean_is_over_tokens_not_over_batches():
    """The mean of the batches' means is another number here: the check above is no accident."""
    batch = pack([[c] for c in CONVERSATIONS])
    (loss, _), _ = gradient_of(PARAMS, batch)
    means, weights = zip(
        *[
            gradient_of(PARAMS, jax.tree.map(lambda leaf, i=i: leaf[i], split(batch, 4)))[0]
            for i in range(4)
        ],
        strict=True,
    )
    assert len(set(map(float, weights))) > 1
    assert abs(np.mean(means) - loss) > 1e-3


def test_a_step_that_accumulates_is_the_step_on_the_large_batch():
    """On a mesh of two workers that push, so that gradients, metrics and mixing all agree."""
    training = head_training(workers=2, probability=1.0, rounds=2)
    batch_W = jax.tree.map(
        lambda *leaves: np.stack(leaves), *[make_pairs(w, count=12) for w in range(2)]
    )
    optimiser = optax.sgd(1.0, momentum=0.9)

    def after_two_steps(accumulate: int):
        step = make_train_step(bradley_terry_loss, optimiser, training.mixing, accumulate)
        step = on_mesh(step, training.mesh, (0, 0, None))
        given = batch_W
        if accumulate > 1:
            given = jax.tree.map(
                lambda leaf: leaf.reshape(2, accumulate, -1, *leaf.shape[2:]), batch_W
            )
        state = dataclasses.replace(training, optimiser=optimiser).mesh_start()
        for number in training.steps:
            state, metrics = step(state, given, training.schedule.round(number))
        assert compiled_programs(step) == 1
        return state, metrics

    (once, plain), (thrice, metrics) = after_two_steps(1), after_two_steps(3)
    assert_close(thrice.params, once.params, 1e-6)
    for found, expected in zip(metrics, plain, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert metrics.weight.tolist() == [12, 12]


def test_float32_is_the_loss_itself():
    assert cast_loss(LOSS, "float32") is LOSS


def test_bfloat16_rounds_the_computation_and_nothing_that_lasts():
    batch = pack([[c] for c in CONVERSATIONS])
    (loss, weight), gradient = gradient_of(PARAMS, batch)
    short = jax.jit(jax.value_and_grad(cast_loss(LOSS, "bfloat16"), has_aux=True))
    (found_loss, found_weight), found = short(PARAMS, batch)
    assert found_weight == weight
    assert (found_loss.dtype, found_weight.dtype) == (jnp.float32, jnp.float32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    assert 0 < abs(found_loss - loss) < 0.02 * loss
    dot = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, found, gradient)))
    assert dot / (optax.tree.norm(found) * optax.tree.norm(gradient)) > 0.99


def test_bfloat16_multiplies_no_float32_matrices():
    """Every matrix product of the model, forward and back, takes bfloat16; but for the two that
    follow from the logits' gradient, which is float32 as they are."""
    batch = pack([[c] for c in CONVERSATIONS])
    gradient = jax.grad(cast_loss(LOSS, "bfloat16"), has_aux=True)
    text = jax.jit(gradient).lower(PARAMS, batch).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    operands = [line.split(" : (")[1].split(") ->")[0] for line in products]
    assert len(operands) > 20
    float32 = [pair for pair in operands if "bf16" not in pair]
    assert len(float32) == 2
    assert all("259xf32" in pair for pair in float32), float32


def test_small_updates_are_not_lost_to_bfloat16():
    """1e-3 of a parameter's size is below bfloat16's half step: float32 masters keep it."""
    loss = cast_loss(lambda params, batch: (params["w"].sum(), jnp.ones(())), "bfloat16")
    params = {"w": jnp.ones(3)}
    for _ in range(8):
        gradient = jax.grad(loss, has_aux=True)(params, None)[0]
        params = {"w": params["w"] - 1e-3 * gradient["w"]}
    np.testing.assert_allclose(params["w"], 1 - 8e-3, rtol=1e-5)


@pytest.mark.parametrize("policy", ["layers", "dots"])
def test_recomputing_changes_no_value(policy):
    batch = pack([[c] for c in CONVERSATIONS])
    loss = functools.partial(response_loss, RANDOM_TINY, policy)
    (found_loss, _), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS, batch)
    (expected_loss, _), expected = gradient_of(PARAMS, batch)
    np.testing.assert_allclose(found_loss, expected_loss, rtol=1e-6)
    assert_close(found, expected, 1e-5)
