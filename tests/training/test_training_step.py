"""The train step: one worker against optax, many workers in both layouts, and their sum weights."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from training_tiny import (
    assert_bitwise_equal,
    head_training,
    language_training,
    make_head,
    make_pairs,
    stacked,
)

from persyn_jax import gossip
from persyn_jax.mesh import WORKER, per_worker
from persyn_jax.training.loop import run_steps
from persyn_jax.training.losses import Pairs, bradley_terry_loss
from persyn_jax.training.step import (
    compiled_programs,
    init_state,
    make_train_step,
    on_mesh,
    placed_shapes,
)


def on_one_device(training):
    """The same step for all workers by vmap."""
    return jax.jit(jax.vmap(training.one_step, in_axes=(0, 0, None), axis_name=WORKER))


def by_hand(params, batches, optimiser):
    """Plain training with optax: no mesh, no gossip."""

    @jax.jit
    def step(params, opt_state, batch):
        (loss, _), gradients = jax.value_and_grad(bradley_terry_loss, has_aux=True)(params, batch)
        updates, opt_state = optimiser.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, optax.tree.norm(gradients)

    opt_state, reported = optimiser.init(params), []
    for batch in batches:
        params, opt_state, loss, norm = step(params, opt_state, batch)
        reported.append((float(loss), float(norm), len(batch.winner)))
    return params, opt_state, reported


def test_one_worker_is_plain_training():
    training = head_training(workers=1, probability=1.0, rounds=5)
    state, reported = training.mesh_start(), []
    for number in training.steps:
        state, m = training.mesh_step(
            state, training.batch_at(number), training.schedule.round(number)
        )
        reported.append((float(m.loss[0]), float(m.gradient_norm[0]), int(m.weight[0])))
    batches = [make_pairs(number, 0) for number in training.steps]
    params, opt_state, expected = by_hand(training.params, batches, training.optimiser)
    np.testing.assert_allclose(reported, expected, rtol=1e-5)
    for found, wanted in ((state.params, params), (state.opt_state, opt_state)):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a[0], b, rtol=1e-5, atol=1e-7)


def test_workers_that_never_push_train_each_on_their_own():
    """With probability 0 each is the plain training on its own batches, and keeps its 1/W."""
    training = head_training(workers=4, probability=0.0, rounds=3)
    state = training.mesh_start()
    for number in training.steps:
        state, _ = training.mesh_step(
            state, training.batch_at(number), training.schedule.round(number)
        )
    assert (np.asarray(state.mix_state.sum_weight) == 0.25).all()
    for worker in range(4):
        batches = [make_pairs(number, worker) for number in training.steps]
        params, _, _ = by_hand(training.params, batches, training.optimiser)
        np.testing.assert_allclose(state.params["kernel"][worker], params["kernel"], rtol=1e-5)
    assert len(np.unique(state.params["bias"], axis=0)) == 4


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_sum_weights_differ_while_their_total_stays_1(workers):
    training = head_training(workers, probability=0.2)
    state, weights = training.mesh_start(), []
    for number in training.steps:
        state, _ = training.mesh_step(
            state, training.batch_at(number), training.schedule.round(number)
        )
        weights.append(np.asarray(state.mix_state.sum_weight, np.float64))
    np.testing.assert_allclose(np.sum(weights, axis=1), 1, atol=1e-6)
    assert max(np.ptp(weight_W) for weight_W in weights) > 0.1
    np.testing.assert_allclose(weights, training.schedule.sum_weights()[1:], atol=1e-5)
    assert set(training.schedule.branches_TK[:, 0]) == set(range(workers)), (
        "not every branch was taken"
    )
    assert compiled_programs(training.mesh_step) == 1


def test_both_layouts_train_alike():
    """Four workers of a language model, a device each or all on one: every loss, every norm."""
    training = language_training(workers=4, probability=0.6)
    stacked_step = on_one_device(training)
    each = training.mesh_start()
    one = jax.vmap(training.start)(stacked(training.params, 4))
    for number in training.steps:
        batch, round = training.batch_at(number), training.schedule.round(number)
        each, found = training.mesh_step(each, batch, round)
        one, expected = stacked_step(one, batch, round)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        np.testing.assert_array_equal(each.mix_state.sum_weight, one.mix_state.sum_weight)
    assert training.schedule.messages().any()
    assert compiled_programs(training.mesh_step) == 1
    assert np.ptp(found.loss) > 0.01, "the workers must see different data"
    for a, b in zip(jax.tree.leaves(each.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_the_exchange_is_bitwise_the_same_in_both_layouts():
    """With learning rate 0 a step is nothing but the exchange; the workers start different."""
    training = dataclasses.replace(
        head_training(workers=8, probability=0.5), optimiser=optax.sgd(0.0)
    )
    apart = jax.tree.map(lambda *rows: np.stack(rows), *[make_head(seed) for seed in range(8)])
    each = on_mesh(training.start, training.mesh, (0,))(
        jax.device_put(apart, per_worker(training.mesh))
    )
    one, stacked_step = jax.vmap(training.start)(apart), on_one_device(training)
    for number in range(12):
        batch, round = training.batch_at(number), training.schedule.round(number)
        each, _ = training.mesh_step(each, batch, round)
        one, _ = stacked_step(one, batch, round)
        assert_bitwise_equal(each.params, one.params)
        assert_bitwise_equal(each.mix_state.sum_weight, one.mix_state.sum_weight)
    assert np.ptp(each.params["kernel"], axis=0).max() < np.ptp(apart["kernel"], axis=0).max() / 4


def test_the_gradient_is_taken_where_the_rule_says():
    """A rule that moves the point by 1: the optimiser sees the gradient and the weights there."""
    rule = gossip.MixingTransformation(
        init=lambda params: (),
        evaluate_at=lambda params, mix_state: jax.tree.map(lambda leaf: leaf + 1, params),
        update=lambda updates, mix_state, params, round: (
            optax.apply_updates(params, updates),
            mix_state,
        ),
    )
    optimiser = optax.adamw(0.1, weight_decay=0.5)
    head, pairs = make_head(1), make_pairs(1)
    moved = jax.tree.map(lambda leaf: leaf + 1, head)
    gradients = jax.grad(lambda params: bradley_terry_loss(params, pairs)[0])(moved)
    updates, _ = optimiser.update(gradients, optimiser.init(head), moved)
    expected = optax.apply_updates(head, updates)

    step = jax.jit(make_train_step(bradley_terry_loss, optimiser, rule))
    state, metrics = step(init_state(head, optimiser, rule), pairs, None)
    np.testing.assert_allclose(metrics.loss, bradley_terry_loss(moved, pairs)[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_worker_without_data_has_gradient_0_and_disturbs_nobody():
    training = head_training(workers=2, probability=0.0)
    batch: Pairs = training.batch_at(0)
    batch.weights[1] = 0
    state, metrics = training.mesh_step(training.mesh_start(), batch, training.schedule.round(0))
    assert (metrics.loss[1], metrics.weight[1], metrics.gradient_norm[1]) == (0, 0, 0)
    alone, expected = head_training(workers=1, probability=0.0), make_pairs(0, 0)
    wanted, _ = alone.mesh_step(
        alone.mesh_start(), Pairs(*(field[None] for field in expected)), alone.schedule.round(0)
    )
    np.testing.assert_allclose(state.params["bias"][0], wanted.params["bias"][0], rtol=1e-6)


def test_a_donated_state_is_gone_and_one_program_takes_first_state_and_results():
    training = head_training(workers=4, probability=0.5, rounds=6)
    step = on_mesh(training.one_step, training.mesh, (0, 0, None), donate=True)
    start = training.mesh_start()
    arguments = (step, start, training.batch_at, training.schedule, training.steps, training.mesh)
    for taken in run_steps(*arguments):
        assert taken.state.params["kernel"].sharding == per_worker(training.mesh)
    assert start.params["kernel"].is_deleted()
    assert compiled_programs(step) == 1


def test_placed_shapes_compile_to_the_program_that_the_arrays_run():
    training = head_training(workers=4, probability=0.5)
    state, batch = training.mesh_start(), training.batch_at(0)
    shapes = placed_shapes(state, per_worker(training.mesh))
    assert jax.tree.map(lambda leaf: leaf.sharding, shapes) == jax.tree.map(
        lambda leaf: leaf.sharding, state
    )
    round = training.schedule.round(0)
    ahead = training.mesh_step.lower(shapes, batch, round).compile()
    assert_bitwise_equal(ahead(state, batch, round), training.mesh_step(state, batch, round))
