import doctest
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gossip_layouts import on_a_device_each, on_one_device
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from persyn_jax import gossip
from persyn_jax.gossip import GoSGDState, Round, gosgd, gosgd_schedule, no_mixing
from persyn_jax.mesh import WORKER, make_mesh

several_workers = pytest.mark.parametrize("workers", [2, 4, 8])


@cache
def gosgd_step(workers, layout=on_one_device):
    mixing = gosgd(gosgd_schedule(workers, 0, 0.5, 0).bank, WORKER)
    return layout(mixing.update) if layout is on_one_device else layout(mixing.update, workers)


def start(workers, seed=0, dimension=5):
    """Workers that start different, with sum weights that differ."""
    generator = np.random.default_rng(seed)
    params_W = {
        "kernel": generator.normal(size=(workers, 3, dimension)).astype(np.float32),
        "bias": generator.normal(size=(workers, dimension)).astype(np.float32),
    }
    sum_weight_W = generator.dirichlet(np.full(workers, 5.0)).astype(np.float32)
    return params_W, GoSGDState(sum_weight_W)


def zeros(params_W):
    return jax.tree.map(jnp.zeros_like, params_W)


def weighted_sum(params_W, state_W):
    """sum_m alpha_m x_m in float64, all arrays in one vector."""
    alpha_W = np.asarray(state_W.sum_weight, np.float64)
    leaves_W = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params_W)]
    return np.concatenate([np.tensordot(alpha_W, leaf_W, 1).ravel() for leaf_W in leaves_W])


def gosgd_oracle(x_WN, alpha_W, updates_WN, push_W, receivers_W):
    """One round of Algorithms 1 and 2 of GoSGD with their queues, in NumPy."""
    x, alpha = x_WN.copy(), alpha_W.copy()
    queues: list[list[tuple]] = [[] for _ in x]
    for i in range(len(x)):
        x[i] = x[i] + updates_WN[i]
        if push_W[i]:
            alpha[i] = alpha[i] / 2
            queues[receivers_W[i]].append((x[i].copy(), alpha[i]))
    for i, queue in enumerate(queues):
        for x_j, alpha_j in queue:
            x[i] = alpha_j / (alpha[i] + alpha_j) * x_j + alpha[i] / (alpha[i] + alpha_j) * x[i]
            alpha[i] = alpha_j + alpha[i]
    return x, alpha


@settings(max_examples=15)
@given(
    workers=st.sampled_from([2, 3, 4, 5, 8]),
    probability=st.floats(0.05, 1),
    seed=st.integers(0, 2**31),
)
def test_fifty_rounds_agree_with_the_papers_algorithm(workers, probability, seed):
    schedule = gosgd_schedule(workers, 50, probability, seed)
    generator = np.random.default_rng(seed)
    x = x_WN = generator.normal(size=(workers, 7)).astype(np.float32)
    alpha = np.full(workers, 1 / workers)
    params_W = {"x": x_WN}
    state_W = jax.vmap(gosgd(schedule.bank, WORKER).init)(params_W)
    for t in range(50):
        updates_WN = (0.1 * generator.normal(size=(workers, 7))).astype(np.float32)
        receivers_W = schedule.bank.receivers[schedule.branches_T[t]]
        x, alpha = gosgd_oracle(
            x.astype(np.float64), alpha, updates_WN, schedule.push_TW[t], receivers_W
        )
        params_W, state_W = gosgd_step(workers)(
            {"x": updates_WN}, state_W, params_W, schedule.round(t)
        )
        np.testing.assert_allclose(params_W["x"], x, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state_W.sum_weight, alpha, atol=(t + 1) * 2.0**-24)  # a unit
    np.testing.assert_allclose(schedule.sum_weights()[-1], alpha, rtol=1e-12)


@several_workers
def test_sum_weights_total_1_at_every_step_while_they_differ(workers):
    schedule = gosgd_schedule(workers, 10_000, 0.4, seed=1)
    mixing = gosgd(schedule.bank, WORKER)
    update = jax.vmap(mixing.update, in_axes=(0, 0, 0, None), axis_name=WORKER)
    params_W, _ = start(workers)
    state_W = jax.vmap(mixing.init)(params_W)
    np.testing.assert_array_equal(state_W.sum_weight, np.full(workers, 1 / workers, np.float32))

    def step(carry, row):
        params_W, state_W = update(zeros(carry[0]), carry[1], carry[0], row)
        return (params_W, state_W), state_W.sum_weight

    rows = Round(schedule.branches_T, schedule.push_TW)  # the whole table is data to one scan
    _, sum_weight_TW = jax.lax.scan(step, (params_W, state_W), rows)
    assert sum_weight_TW.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(sum_weight_TW, np.float64).sum(axis=1), 1.0)
    assert (np.ptp(sum_weight_TW, axis=1) > 0).mean() > 0.5
    assert (np.asarray(sum_weight_TW) > 0).all()


@pytest.mark.parametrize("workers", [3, 5, 7])
def test_sum_weights_of_any_number_of_workers_total_1(workers):
    mixing = gosgd(gossip.shift_bank(workers), WORKER)
    sum_weight_W = jax.vmap(mixing.init)(np.zeros(workers)).sum_weight
    np.testing.assert_allclose(np.asarray(sum_weight_W, np.float64).sum(), 1, atol=1e-6)


@several_workers
def test_an_exchange_leaves_the_weighted_sum_where_it_is(workers):
    schedule = gosgd_schedule(workers, 30, 0.5, seed=2)
    params_W, state_W = start(workers)
    for t in range(schedule.rounds):
        before = weighted_sum(params_W, state_W)
        params_W, state_W = gosgd_step(workers)(
            zeros(params_W), state_W, params_W, schedule.round(t)
        )
        # Float32 rounding of numbers of order 1; the schedule's matrices hold it to 1e-12.
        np.testing.assert_allclose(weighted_sum(params_W, state_W), before, atol=1e-6)


@several_workers
def test_without_updates_different_starts_meet_at_their_weighted_mean(workers):
    schedule = gosgd_schedule(workers, 300, 0.5, seed=3)
    params_W, state_W = start(workers)
    target = gossip.weighted_mean_stacked(params_W, state_W.sum_weight)
    plain = gossip.weighted_mean_stacked(params_W, np.ones(workers))
    assert (
        np.abs(target["kernel"] - plain["kernel"]).max() > 0.01
    )  # a mean that ignores weights fails
    for t in range(schedule.rounds):
        params_W, state_W = gosgd_step(workers)(
            zeros(params_W), state_W, params_W, schedule.round(t)
        )
    for name, leaf in target.items():
        np.testing.assert_allclose(
            params_W[name], np.broadcast_to(leaf, (workers, *leaf.shape)), atol=1e-5
        )


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
def test_one_device_and_a_device_each_agree_bitwise(workers):
    schedule = gosgd_schedule(workers, 30, 0.5, seed=4)
    generator = np.random.default_rng(4)
    one = each = start(workers)
    for t in range(schedule.rounds):
        updates_W = jax.tree.map(
            lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), one[0]
        )
        one = gosgd_step(workers)(updates_W, one[1], one[0], schedule.round(t))
        each = gosgd_step(workers, on_a_device_each)(updates_W, each[1], each[0], schedule.round(t))
        chex.assert_trees_all_equal(one, each)


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
def test_pushing_unit_vectors_rebuilds_the_mixing_matrix(workers):
    schedule = gosgd_schedule(workers, 20, 0.5, seed=5)
    _, state_W = start(workers)
    eye_WW = np.eye(workers, dtype=np.float32)
    for t in range(schedule.rounds):
        matrix_WW = schedule.mixing_matrix(t, np.asarray(state_W.sum_weight, np.float64))
        mixed_WW, state_W = gosgd_step(workers)(
            np.zeros_like(eye_WW), state_W, eye_WW, schedule.round(t)
        )
        np.testing.assert_allclose(mixed_WW, matrix_WW, atol=1e-6)


def test_two_hundred_rounds_run_in_one_compiled_program():
    workers = 4
    mesh = make_mesh(workers)
    schedule = gosgd_schedule(workers, 200, 0.3, seed=6)
    assert set(schedule.branches_T) == {0, 1, 2, 3}
    step = on_a_device_each(gosgd(schedule.bank, WORKER).update, workers, donate_argnums=(1, 2))
    params_W, state_W = jax.device_put(start(workers), NamedSharding(mesh, P(WORKER)))
    updates_W = jax.device_put(zeros(params_W), NamedSharding(mesh, P(WORKER)))
    for t in range(schedule.rounds):
        row = jax.device_put(schedule.round(t), NamedSharding(mesh, P()))
        params_W, state_W = step(updates_W, state_W, params_W, row)
    assert step._cache_size() == 1


def test_a_silent_round_only_applies_the_update():
    silent = gosgd_schedule(4, 1, 0.0, seed=0).round(0)
    params_W, state_W = start(4)
    updates_W, _ = start(4, seed=1)
    expected_W = jax.tree.map(np.add, params_W, updates_W)
    for layout in (on_one_device, on_a_device_each):
        mixed_W, mixed_state_W = gosgd_step(4, layout)(updates_W, state_W, params_W, silent)
        chex.assert_trees_all_equal(mixed_W, expected_W)
        chex.assert_trees_all_equal(mixed_state_W, state_W)


@pytest.mark.parametrize("layout", [on_one_device, on_a_device_each])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_worker_with_a_bad_update_drops_it_and_does_not_push(poison, layout):
    workers, bad = 4, 2
    schedule = gosgd_schedule(workers, 50, 0.7, seed=7)
    t = int(np.flatnonzero(schedule.push_TW[:, bad])[0])
    row = schedule.round(t)
    params_W, state_W = start(workers)
    updates_W, _ = start(workers, seed=1)
    poisoned_W, clean_W = (jax.tree.map(np.copy, updates_W) for _ in range(2))
    poisoned_W["bias"][bad, 0] = poison
    for leaf_W in clean_W.values():
        leaf_W[bad] = 0
    no_coin = Round(row.branch, np.where(np.arange(workers) == bad, False, row.push_W))

    step = gosgd_step(workers, layout)
    actual = step(poisoned_W, state_W, params_W, row)
    chex.assert_trees_all_equal(actual, step(clean_W, state_W, params_W, no_coin))
    assert all(np.isfinite(leaf_W).all() for leaf_W in jax.tree.leaves(actual))
    np.testing.assert_allclose(actual[1].sum_weight.sum(), 1, atol=1e-6)


def test_a_worker_that_is_lost_in_nan_infects_nobody():
    # Its gradients are NaN as well; its messages travel, with no weight.
    workers, lost = 4, 1
    schedule = gosgd_schedule(workers, 50, 1.0, seed=8)
    params_W, state_W = start(workers)
    params_W["kernel"][lost] = np.nan
    updates_W = jax.tree.map(np.zeros_like, params_W)
    updates_W["bias"][lost] = np.nan
    for t in range(schedule.rounds):
        params_W, state_W = gosgd_step(workers)(updates_W, state_W, params_W, schedule.round(t))
    healthy = np.arange(workers) != lost
    assert np.isfinite(np.asarray(params_W["kernel"])[healthy]).all()
    np.testing.assert_allclose(state_W.sum_weight.sum(), 1, atol=1e-6)


def test_parameters_keep_their_dtype_and_weights_stay_float32():
    params_W = {"half": jnp.ones((4, 3), jnp.bfloat16), "single": jnp.ones((4, 3))}
    state_W = jax.vmap(gosgd(gosgd_schedule(4, 0, 0.5, 0).bank, WORKER).init)(params_W)
    row = gosgd_schedule(4, 1, 1.0, seed=0).round(0)
    mixed_W, mixed_state_W = gosgd_step(4)(params_W, state_W, params_W, row)
    chex.assert_trees_all_equal_shapes_and_dtypes((mixed_W, mixed_state_W), (params_W, state_W))


def test_one_worker_alone_just_takes_its_steps():
    params_W, _ = start(1)
    updates_W, _ = start(1, seed=1)
    schedule = gosgd_schedule(1, 3, 1.0, seed=0)
    state_W = jax.vmap(gosgd(schedule.bank, WORKER).init)(params_W)
    mixed_W, mixed_state_W = gosgd_step(1, on_a_device_each)(
        updates_W, state_W, params_W, schedule.round(0)
    )
    chex.assert_trees_all_equal(mixed_W, jax.tree.map(np.add, params_W, updates_W))
    np.testing.assert_array_equal(mixed_state_W.sum_weight, [1.0])


def test_no_mixing_adds_the_updates_whatever_the_coins_say():
    mixing = no_mixing()
    params_W, _ = start(4)
    updates_W, _ = start(4, seed=1)
    state_W = jax.vmap(mixing.init)(params_W)
    row = gosgd_schedule(4, 1, 1.0, seed=0).round(0)
    for run in (on_one_device(mixing.update), on_a_device_each(mixing.update, 4)):
        mixed_W, _ = run(updates_W, state_W, params_W, row)
        chex.assert_trees_all_equal(mixed_W, jax.tree.map(np.add, params_W, updates_W))


@pytest.mark.parametrize("mixing", [gosgd(gossip.xor_bank(2), WORKER), no_mixing()])
def test_the_gradient_is_taken_at_the_parameters(mixing):
    params = {"x": jnp.arange(3.0)}
    chex.assert_trees_all_equal(mixing.evaluate_at(params, mixing.init(params)), params)


def test_the_compiled_step_permutes_and_gathers_nothing():
    params_W, state_W = start(8)
    row = gosgd_schedule(8, 1, 1.0, seed=0).round(0)
    step = gosgd_step(8, on_a_device_each)
    text = step.lower(zeros(params_W), state_W, params_W, row).compile().as_text()
    assert "collective-permute" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text


def test_the_example_of_the_package_runs():
    assert doctest.testmod(gossip).attempted > 5
    assert doctest.testmod(gossip).failed == 0
