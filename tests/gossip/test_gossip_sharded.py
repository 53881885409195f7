"""Workers that are themselves sharded: shards meet shards, and nothing is gathered."""

import functools
import re

import chex
import jax
import numpy as np
import pytest
from gossip_cases import random_schedule
from gossip_layouts import QUICK, on_one_device
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from persyn_jax import gossip
from persyn_jax.gossip import Exchange, xor_bank
from persyn_jax.mesh import FSDP, TENSOR, WORKER, make_mesh

WORKERS, ROUNDS = 2, 12
SPECS = {"embed": P(WORKER, FSDP, TENSOR), "layers": P(WORKER, None, FSDP), "norm": P(WORKER)}
SHAPES = {"embed": (8, 16), "layers": (3, 4, 8), "norm": (8,)}
RULES = {"gosgd": gossip.gosgd, "diloco": gossip.diloco}
SCHEDULE = random_schedule(xor_bank(WORKERS), ROUNDS, 1, seed=0, dropped=0.2)
MEANS = random_schedule(xor_bank(WORKERS), ROUNDS, 1, seed=1, average=0.5)
each_rule = pytest.mark.parametrize("name", RULES)


def make_trees(seed):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=(WORKERS, *shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def specs_of(tree):
    """Arrays of parameters lie as the parameters do, scalars one a worker."""

    def spec(path, leaf):
        named = [spec for name, spec in SPECS.items() if name in jax.tree_util.keystr(path)]
        return named[0] if named else P(WORKER)

    return jax.tree_util.tree_map_with_path(spec, tree)


def rule_of(name):
    return RULES[name](Exchange(xor_bank(WORKERS), WORKER, inner_axes=(FSDP, TENSOR)))


def over_all_axes(update, state_W):
    """`update` over the mesh of 2 workers x 2 x 2."""
    params_specs, state_specs = specs_of(make_trees(0)), specs_of(state_W)

    def local(updates, state, params, round):
        own = jax.tree.map(lambda leaf: leaf[0], (updates, state, params))
        return jax.tree.map(lambda leaf: leaf[None], update(*own, round))

    step = jax.shard_map(
        local,
        mesh=make_mesh(WORKERS, fsdp=2, tensor=2),
        in_specs=(params_specs, state_specs, params_specs, P()),
        out_specs=(params_specs, state_specs),
    )
    return jax.jit(step, compiler_options=QUICK)


def placed(tree):
    mesh = make_mesh(WORKERS, fsdp=2, tensor=2)
    return jax.device_put(
        tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs_of(tree))
    )


@functools.cache
def programs(name):
    """The rule's step for sharded workers, and that for whole ones on one device."""
    state_W = jax.vmap(rule_of(name).init)(make_trees(0))
    whole = RULES[name](Exchange(xor_bank(WORKERS), WORKER))
    return over_all_axes(rule_of(name).update, state_W), on_one_device(
        whole.update, compiler_options=QUICK
    )


def run_both(name, schedule, updates_TW):
    """Yields (sharded, whole): parameters and state after each round."""
    in_shards, on_one = programs(name)
    params_W = make_trees(0)
    whole = params_W, jax.vmap(rule_of(name).init)(params_W)
    sharded = placed(whole)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, sharded)
    for t, updates_W in enumerate(updates_TW):
        row = schedule.round(t)
        whole = on_one(updates_W, whole[1], whole[0], row)
        sharded = jax.block_until_ready(in_shards(placed(updates_W), sharded[1], sharded[0], row))
        assert jax.tree.map(lambda leaf: leaf.sharding, sharded) == shardings
        yield jax.device_get(sharded), jax.device_get(whole)


@each_rule
def test_a_sharded_worker_does_what_a_whole_one_does(name):
    updates_TW = [make_trees(t) for t in range(1, ROUNDS + 1)]
    distances = []
    for sharded, whole in run_both(name, SCHEDULE, updates_TW):
        if name == "gosgd":
            chex.assert_trees_all_equal(sharded[0], whole[0])
            chex.assert_trees_all_equal(sharded[1].sum_weight, whole[1].sum_weight)
        chex.assert_trees_all_close(sharded, whole, rtol=1e-5, atol=1e-5)
        distances.append(whole[1].pair_distance)
    assert np.max(distances) > 100, "the distance is that of all shards"


@each_rule
def test_exact_means_of_sharded_workers(name):
    updates_TW = [make_trees(t) for t in range(1, ROUNDS + 1)]
    for sharded, whole in run_both(name, MEANS, updates_TW):
        chex.assert_trees_all_close(sharded, whole, rtol=1e-5, atol=1e-5)


@each_rule
@pytest.mark.parametrize("leaf", SHAPES)
def test_a_bad_number_in_one_shard_silences_the_whole_worker(name, leaf):
    updates_TW = [make_trees(t) for t in range(1, ROUNDS + 1)]
    for t, updates_W in enumerate(updates_TW):
        if t % 2:
            updates_W[leaf][1].flat[-1] = np.nan
    for sharded, whole in run_both(name, SCHEDULE, updates_TW):
        chex.assert_trees_all_close(sharded, whole, rtol=1e-5, atol=1e-5)
        chex.assert_tree_all_finite(sharded)


@each_rule
def test_the_program_sends_shards_and_gathers_nothing(name):
    """Without rounds that have an exact mean, only scalars are summed over devices."""
    rule = rule_of(name)
    params_W = make_trees(0)
    state_W = jax.vmap(rule.init)(params_W)

    def without_mean(updates, state, params, round):
        return rule.update(updates, state, params, round._replace(average=np.False_))

    step = over_all_axes(without_mean, state_W)
    text = (
        step.lower(placed(params_W), placed(state_W), placed(params_W), SCHEDULE.round(0))
        .compile()
        .as_text()
    )
    assert not re.search("all-gather|all-to-all|reduce-scatter", text)
    reduced = re.findall(r"= (\S+) all-reduce", text)
    assert "s32[]" in reduced, "the bit that says whether the update is finite"
    assert set(reduced) <= {"s32[]", "f32[]"}
    sent = re.findall(r"= f32\[([\d,]*)\]\S* collective-permute(?:-start)?\(", text)
    sizes = sorted(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in sent)
    parameters = [8, 8 * 16 // 4, 3 * 4 * 8 // 2]  # norm, embed, layers: what one device holds
    scalars = len(sizes) - len(parameters)
    assert sizes == [1] * scalars + sorted(parameters)
