"""The table of all rules, through every way of exchanging: what each of them must keep to."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gossip_cases import CASES, MEANS, ROUNDS, WORKERS
from gossip_layouts import QUICK, on_one_device, over_rounds, over_static_rounds
from gossip_runs import (
    WAYS,
    at_round,
    on_eight_devices,
    results,
    rows,
    rule_of,
    run,
    run_with,
    start,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from persyn_jax.mesh import WORKER, make_mesh

each_case = pytest.mark.parametrize("name", CASES)
STEPS, STATIC = 20, 4
"""Rounds that are run one call each, and rounds that are unrolled in a program."""


def first_rounds(tree_WT, rounds):
    return jax.tree.map(lambda leaf_WT: leaf_WT[:, :rounds], tree_WT)


def check_equal(case, actual, expected):
    """To the bit where the case claims it. Distances are sums that XLA takes in any order."""
    compare = chex.assert_trees_all_equal
    if not case.exact:
        compare = functools.partial(chex.assert_trees_all_close, rtol=1e-6, atol=1e-6)
    compare(actual[0], expected[0])
    compare(without_distance(actual[1]), without_distance(expected[1]))
    chex.assert_trees_all_close(actual[1], expected[1], rtol=1e-5, atol=1e-5)


def without_distance(state):
    """The state, with zeros for the distance."""

    def visit(path, leaf):
        return np.zeros_like(leaf) if "pair_distance" in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(visit, state)


@each_case
def test_one_program_keeps_shardings_and_needs_nothing_but_the_state(name):
    """After half of the rounds all that there is goes through the host, as in a checkpoint."""
    schedules = CASES[name].schedule
    rule = rule_of(name, schedules)
    params_W, updates_WT = start()
    own, shared = (NamedSharding(make_mesh(WORKERS), spec) for spec in (P(WORKER), P()))
    step = on_eight_devices(rule.update, compiler_options=QUICK)
    carry = jax.device_put((params_W, jax.vmap(rule.init)(params_W)), own)
    after_T = []
    for t in range(STEPS):
        update_W = jax.device_put(at_round(updates_WT, t), own)
        row = jax.device_put(rows(schedules, t), shared)
        carry = step(update_W, carry[1], carry[0], row)
        assert all(leaf.sharding == own for leaf in jax.tree.leaves(carry))
        after_T.append(jax.device_get(carry))
        if t == STEPS // 2:
            carry = jax.device_put(after_T[-1], own)
    assert step._cache_size() == 1
    after_WT = jax.tree.map(lambda *leaves_W: np.stack(leaves_W, axis=1), *after_T)
    check_equal(CASES[name], after_WT, first_rounds(run(name, "take"), STEPS))


@each_case
def test_digits_give_the_same_bits(name):
    check_equal(CASES[name], run(name, "digits"), run(name, "take"))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exact])
def test_messages_read_where_they_lie_give_the_same_bits(name):
    (params_WT, state_WT), (taken_WT, taken_state_WT) = run(name, "one device"), run(name, "take")
    actual = params_WT, without_distance(state_WT)  # it is not measured then
    check_equal(CASES[name], actual, (taken_WT, without_distance(taken_state_WT)))


@each_case
def test_static_rounds_give_the_same_bits(name):
    schedules = CASES[name].schedule
    rule = rule_of(name, schedules)
    static = [rows(schedules, t) for t in range(STATIC)]
    unrolled = on_eight_devices(over_static_rounds(rule.update, static), compiler_options=QUICK)
    actual = results(rule, unrolled, schedules, *start())
    check_equal(CASES[name], actual, first_rounds(run(name, "take"), STATIC))


@each_case
@pytest.mark.parametrize("way", ["dense", "gather"])
def test_the_matrix_mode_gives_the_same_numbers(name, way):
    tolerance = CASES[name].rounds_to
    chex.assert_trees_all_close(run(name, way), run(name, "take"), rtol=tolerance, atol=tolerance)


SHIPPED = ("gosgd", "in int8")
"""The plainest of the exact rules, and that with most products for the compiler to fuse."""


@pytest.mark.parametrize("name", SHIPPED)
def test_permutations_give_the_same_bits_with_all_optimisations(name):
    schedules = CASES[name].schedule
    rule = rule_of(name, schedules)
    one, each = (
        results(rule, layout(over_rounds(rule.update)), schedules, *start())
        for layout in (on_one_device, on_eight_devices)
    )
    check_equal(CASES[name], each, one)


def check_matrices(case, schedule, params_WT):
    before_WW = np.eye(WORKERS)
    after_WTW = params_WT["unit"][:, :, 0].astype(np.float64)
    for t in range(ROUNDS):
        expected_WW = case.matrix(schedule, t) @ before_WW
        np.testing.assert_allclose(after_WTW[:, t], expected_WW, atol=1e-6)
        before_WW = after_WTW[:, t]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.matrix])
def test_unit_vectors_are_mixed_by_the_matrices_of_the_schedule(name):
    check_matrices(CASES[name], CASES[name].schedule, run(name, "take")[0])


@pytest.mark.parametrize("name", ["gosgd", "push_sum", "d_psgd"])
@pytest.mark.parametrize("way", WAYS)
def test_exact_means_are_the_same_in_every_way(name, way):
    """With messages after them, and some workers not there."""
    after_WT = run_with(name, way, MEANS, *start())
    check_matrices(CASES[name], MEANS, after_WT[0])
    expected = run_with(name, "take", MEANS, *start())
    chex.assert_trees_all_close(after_WT[0], expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.mass])
def test_mass_is_conserved_by_the_exchange(name):
    """The mass of all workers after a round is that after the local steps, before the exchange."""

    def total(params_W, state_W):
        mass_W = jax.vmap(CASES[name].mass)(params_W, state_W)
        return jax.tree.map(lambda leaf_W: np.asarray(leaf_W, np.float64).sum(axis=0), mass_W)

    params_W, updates_WT = start()
    state_W = jax.vmap(rule_of(name, CASES[name].schedule).init)(params_W)
    for t in range(ROUNDS):
        stepped_W = jax.tree.map(np.add, params_W, at_round(updates_WT, t))
        before = total(stepped_W, state_W)
        params_W, state_W = at_round(run(name, "take"), t)
        chex.assert_trees_all_close(total(params_W, state_W), before, rtol=0, atol=3e-6)


@each_case
def test_dtypes_and_shapes_are_kept(name):
    """Those of parameters and of state, which is made of arrays only."""
    tree = {"unit": jnp.ones((5, 3), jnp.bfloat16), "kernel": jnp.ones((2, 5, 3))}
    schedules = CASES[name].schedule
    rule = rule_of(name, schedules)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * WORKERS), tree)
    state = jax.vmap(rule.init)(stacked)
    update = jax.vmap(rule.update, in_axes=(0, 0, 0, None), axis_name=WORKER)
    after = jax.eval_shape(update, stacked, state, stacked, rows(schedules, 0))
    assert jax.tree.map(jax.typeof, (stacked, state)) == jax.tree.map(
        lambda leaf: jax.core.ShapedArray(leaf.shape, leaf.dtype, leaf.weak_type), after
    )
    at = jax.eval_shape(jax.vmap(rule.evaluate_at), stacked, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(at, stacked)
