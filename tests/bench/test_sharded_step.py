"""Workers that are sharded take the same steps as workers that are not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from persyn_jax import gossip
from persyn_jax.bench.sharded_step import (
    INNER_AXES,
    on_sharded_mesh,
    shard_shape,
    shard_spec,
    sharded_loss,
    sharded_mixing,
    shards_of,
    state_shardings,
)
from persyn_jax.mesh import FSDP, TENSOR, WORKER, make_mesh, replicated
from persyn_jax.streams import numpy_stream
from persyn_jax.training.step import compiled_programs, init_state, make_train_step

WORKERS, ROUNDS = 2, 4


@pytest.mark.parametrize(
    ("shape", "spec", "part"),
    [
        ((3, 8, 16), P(None, INNER_AXES, None), (3, 2, 16)),  # one axis for all, not the last
        ((8, 32), P(INNER_AXES, None), (2, 32)),
        ((3, 6, 10), P(None, FSDP, TENSOR), (3, 3, 5)),  # no axis divides by 4, two do by 2
        ((3, 5, 8), P(None, None, INNER_AXES), (3, 5, 2)),  # the last if it must be
        ((6, 7), P(FSDP, None), (3, 7)),  # cut in two only
        ((7,), P(None), (7,)),  # whole
        ((), P(), ()),
    ],
)
def test_arrays_are_cut_among_as_many_chips_as_divide_them(shape, spec, part):
    assert shard_spec(shape, (2, 2)) == spec
    assert shard_shape(shape, (2, 2)) == part
    assert shard_shape(shape, (1, 1)) == shape


def loss(params, batch):
    """Of two layers; rows weigh differently, and so do chips."""
    x_BI, y_BO, weight_B = batch
    out_BO = jnp.tanh(x_BI @ params["one"]["kernel"]) @ params["two"]["kernel"]
    error_B = jnp.mean((out_BO + params["bias"][None] - y_BO) ** 2, axis=1)
    weight = weight_B.sum()
    return jnp.sum(error_B * weight_B) / jnp.maximum(weight, 1.0), weight


@pytest.fixture(scope="module")
def training():
    draw = numpy_stream(0, "sharded step")

    def normal(*shape):
        return draw.normal(size=(WORKERS, *shape)).astype(np.float32)

    params = {
        "one": {"kernel": normal(5, 8)},  # cut along its last axis
        "two": {"kernel": normal(8, 6)},  # along its first
        "bias": normal(6),  # in two
    }
    batches = [
        (normal(8, 5), normal(8, 6), draw.integers(0, 3, (WORKERS, 8)).astype(np.float32))
        for _ in range(ROUNDS)
    ]
    return params, batches, optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2))


RULES = {
    "gosgd": gossip.gosgd,
    "all_reduce": gossip.all_reduce,
    "delayed": lambda exchange: gossip.delayed(gossip.d_psgd(exchange), exchange, rounds=1),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_sharded_worker_steps_as_a_whole_one(training, rule):
    """Clipping included, which needs the norm over all chips."""
    _, batches, _ = training
    schedule, mesh, whole_step, whole, step, state = both(training, RULES[rule])
    compiled = on_sharded_mesh(step, mesh, state)
    for t, batch in enumerate(batches):
        round = schedule.round(t)
        whole, expected = whole_step(whole, batch, round)
        round = jax.device_put(round, replicated(mesh))
        state, metrics = compiled(state, jax.device_put(batch, dealt(mesh)), round)
        for a, b in zip(metrics, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5)
    assert compiled_programs(compiled) == 1
    assert_same(state.params, whole.params, shards_of(mesh))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)  # the distance to partners included


def test_a_round_that_is_known_at_compile_time_stays_so(training):
    """Its one permutation is then the only one in the program."""
    _, (batch, *_), _ = training
    schedule, mesh, whole_step, whole, step, state = both(training, RULES["delayed"])
    first = schedule.round(0)
    compiled = on_sharded_mesh(lambda state, batch, _: step(state, batch, first), mesh, state)
    arguments = state, jax.device_put(batch, dealt(mesh)), None
    text = compiled.lower(*arguments).as_text()
    assert "stablehlo.case" not in text
    state, _ = compiled(*arguments)
    whole, _ = whole_step(whole, batch, first)
    assert_same(state.params, whole.params, shards_of(mesh))


def both(training, rule):
    """(schedule, mesh, step and state of whole workers on one device, step and state of sharded
    workers on four devices each)"""
    params, _, optimiser = training
    schedule = gossip.gosgd_schedule(WORKERS, ROUNDS, 0.7, seed=2)
    mixing = rule(gossip.Exchange(schedule.bank, WORKER))
    whole_step = make_train_step(loss, optimiser, mixing)
    whole_step = jax.jit(jax.vmap(whole_step, in_axes=(0, 0, None), axis_name=WORKER))
    start = jax.vmap(lambda params: init_state(params, optimiser, mixing))(params)

    mesh = make_mesh(WORKERS, 2, 2)
    shards = shards_of(mesh)
    mixing = sharded_mixing(rule(gossip.Exchange(schedule.bank, WORKER, INNER_AXES)), shards)
    step = make_train_step(sharded_loss(loss, shards), optimiser, mixing)
    state = jax.device_put(start, state_shardings(start, mesh))
    return schedule, mesh, whole_step, start, step, state


def dealt(mesh):
    """Of a batch: workers have their own rows, and so have the chips of each."""
    return NamedSharding(mesh, P(WORKER, INNER_AXES))


def assert_same(sharded, whole, shards):
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert a.sharding.shard_shape(a.shape) == (1, *shard_shape(a.shape[1:], shards))
