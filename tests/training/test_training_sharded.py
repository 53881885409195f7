"""Workers spread over chips take the same steps as workers on one device each."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.mlir import ir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from persyn_jax import gossip
from persyn_jax.config import ConfigError
from persyn_jax.mesh import FSDP, TENSOR, WORKER, make_mesh, replicated
from persyn_jax.models import decoder, rows, weights
from persyn_jax.streams import numpy_stream
from persyn_jax.training.losses import response_loss
from persyn_jax.training.sharded import (
    INNER_AXES,
    batch_spec,
    check_mesh,
    chip_layout,
    make_sharded_step,
    on_sharded_mesh,
    parameter_specs,
    state_shardings,
)
from persyn_jax.training.step import compiled_programs, init_state, make_train_step

ROUNDS = 4
MODEL = dataclasses.replace(weights.RANDOM_TINY, vocab_size=264, d_model=32, d_ff=64)
PARAMS = jax.tree.map(np.asarray, decoder.init(MODEL, jax.random.key(0)))
CLIPPED = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2))


def random_batch(draw, count):
    """`count` rows of two conversations each, of unequal lengths."""

    def conversation():
        prompt, response = draw.integers(0, 256, 9), draw.integers(0, 256, draw.integers(2, 8))
        return rows.Conversation(tuple(prompt.tolist()), tuple(response.tolist()))

    return rows.pack([[conversation(), conversation()] for _ in range(count)], 36, 16)


def batches_of(workers, count):
    draw = numpy_stream(0, "sharded step", workers)
    made = [[random_batch(draw, count) for _ in range(workers)] for _ in range(ROUNDS)]
    return [jax.tree.map(lambda *leaves: np.stack(leaves), *batch) for batch in made]


def train(
    mesh_shape, batches, rule=gossip.gosgd, recompute="nothing", optimiser=CLIPPED, params=PARAMS
):
    """(metrics of every step, the last state, programs compiled)"""
    mesh = make_mesh(*mesh_shape)
    workers = mesh.shape[WORKER]
    schedule = gossip.gosgd_schedule(workers, ROUNDS, 0.7, seed=2)
    if rule is gossip.all_reduce:
        schedule = gossip.topologies.complete(workers, ROUNDS)
    mixing = rule(gossip.Exchange(schedule.bank, WORKER, INNER_AXES))
    specs = parameter_specs(params, mesh)
    layout = chip_layout(specs, mesh)
    loss = functools.partial(response_loss, MODEL, recompute, layout=layout)
    step = make_sharded_step(loss, optimiser, mixing, mesh, specs)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf] * workers), params)
    state = jax.vmap(lambda params: init_state(params, optimiser, mixing))(stacked)
    state = jax.device_put(state, state_shardings(state, mesh, specs))
    compiled = on_sharded_mesh(step, mesh, state, specs)
    metrics = []
    for t, batch in enumerate(batches):
        batch = jax.device_put(batch, NamedSharding(mesh, batch_spec(mesh)))
        round = jax.device_put(schedule.round(t), replicated(mesh))
        state, of_step = compiled(state, batch, round)
        metrics.append(jax.tree.map(np.asarray, of_step))
    return metrics, state, compiled_programs(compiled)


def assert_same_metrics(found, expected, rtol):
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol)


@pytest.fixture(scope="module", autouse=True)
def short_chunks():
    """Several chunks of response tokens on every chip, the last not full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "CHUNK", 5)
        yield


@pytest.fixture(scope="module")
def whole():
    """Two workers on a device each."""
    return train((2, 1, 1), batches_of(2, 4))


def test_a_device_a_worker_is_the_plain_step(whole):
    """The optimiser outside `shard_map`, the rest inside: `make_train_step` under vmap."""
    metrics, state, programs = whole
    schedule = gossip.gosgd_schedule(2, ROUNDS, 0.7, seed=2)
    mixing = gossip.gosgd(gossip.Exchange(schedule.bank, WORKER))
    loss = functools.partial(response_loss, MODEL, "nothing")
    step = make_train_step(loss, CLIPPED, mixing)
    step = jax.jit(jax.vmap(step, in_axes=(0, 0, None), axis_name=WORKER))
    stacked = jax.tree.map(lambda leaf: np.stack([leaf] * 2), PARAMS)
    plain = jax.vmap(lambda params: init_state(params, CLIPPED, mixing))(stacked)
    expected = []
    for t, batch in enumerate(batches_of(2, 4)):
        plain, of_step = step(plain, batch, schedule.round(t))
        expected.append(of_step)
    assert_same_metrics(metrics, expected, rtol=2e-6)
    assert programs == 1
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("inner", "recompute"),
    [((4, 1), "nothing"), ((1, 2), "dots"), ((2, 2), "layers")],
)
def test_a_spread_worker_steps_as_a_whole_one(whole, inner, recompute):
    """Losses, tokens and gradient norms of every step; sums run in another order, so not bitwise.

    Clipping included, which needs the norm over all chips.
    """
    metrics, state, programs = train((2, *inner), batches_of(2, 4), recompute=recompute)
    assert_same_metrics(metrics, whole[0], rtol=1e-5)
    assert programs == 1
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole[1].params), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-4)


@pytest.mark.parametrize("mesh_shape", [(4, 2, 1), (2, 2, 2)])
def test_eight_chips_see_one_loss_however_they_are_arranged(mesh_shape):
    """With plain SGD and an exact mean every step, W workers of B rows are one of W B rows."""
    sgd = optax.sgd(0.1)
    eight = batches_of(8, 1)
    eight = [batch._replace(weights=_even(batch.weights)) for batch in eight]
    expected, _, _ = train((8, 1, 1), eight, gossip.all_reduce, optimiser=sgd)
    workers = mesh_shape[0]
    joined = [
        jax.tree.map(lambda leaf: leaf.reshape(workers, -1, *leaf.shape[2:]), b) for b in eight
    ]
    found, _, _ = train(mesh_shape, joined, gossip.all_reduce, optimiser=sgd)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.loss.mean(), other.loss.mean(), rtol=1e-5)


def _even(weights):
    """Every row counts four response tokens, so that means of means are means."""
    return np.where(np.arange(weights.shape[-1]) < 4, 1, 0).astype(np.float32) + 0 * weights


def test_a_rule_with_buffers_runs_on_shards():
    """Its buffers are cut as the parameters are."""

    def delayed(exchange):
        return gossip.delayed(gossip.push_sum(exchange), exchange, rounds=1)

    batches = batches_of(2, 4)
    expected, _, _ = train((2, 1, 1), batches, delayed)
    found, state, _ = train((2, 2, 2), batches, delayed)
    assert_same_metrics(found, expected, rtol=2e-5)
    kernel = state.params["layers"]["down"]["kernel"]
    buffers = [leaf for leaf in jax.tree.leaves(state.mix_state) if leaf.shape == kernel.shape]
    assert buffers
    for leaf in buffers:
        assert leaf.sharding == kernel.sharding


def test_a_round_that_is_known_at_compile_time_stays_so():
    """Its one permutation is then the only one in the program."""
    mesh = make_mesh(2, 2, 2)
    schedule = gossip.gosgd_schedule(2, ROUNDS, 1.0, seed=2)
    mixing = gossip.d_psgd(gossip.Exchange(schedule.bank, WORKER, INNER_AXES))
    specs = parameter_specs(PARAMS, mesh)
    loss = functools.partial(response_loss, MODEL, "nothing", layout=chip_layout(specs, mesh))
    step = make_sharded_step(loss, CLIPPED, mixing, mesh, specs)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf] * 2), PARAMS)
    state = jax.vmap(lambda params: init_state(params, CLIPPED, mixing))(stacked)
    state = jax.device_put(state, state_shardings(state, mesh, specs))
    first, batch = schedule.round(0), batches_of(2, 4)[0]

    def choices(step) -> int:
        """Choices among branches that hold a permutation; those among platforms do not."""
        lowered, found = on_sharded_mesh(step, mesh, state, specs).lower(state, batch, first), []

        def look(operation):
            if operation.name == "stablehlo.case":
                found.append("collective_permute" in str(operation))
            return ir.WalkResult.ADVANCE

        lowered.compiler_ir().operation.walk(look)
        return sum(found)

    assert choices(step) > 0
    assert choices(lambda state, batch, _: step(state, batch, first)) == 0


def test_how_parameters_are_cut():
    """Tensor: features out of q, k, v, gate, up; into o and down. Fsdp: another axis if it can."""
    mesh = make_mesh(1, 2, 2)
    specs = parameter_specs(PARAMS, mesh)
    layers = specs["layers"]
    assert layers["q"]["kernel"] == layers["up"]["kernel"] == P(None, (TENSOR, FSDP), None)
    assert layers["o"]["kernel"] == layers["down"]["kernel"] == P(None, FSDP, TENSOR)
    assert layers["mlp_norm"]["scale"] == P(None, None)
    assert specs["embed"]["embedding"] == P(INNER_AXES, None)
    odd = {
        "embed": {"embedding": jnp.zeros((259, 30))},
        "layers": ({"q": {"kernel": jnp.zeros((6, 30))}},),
    }
    specs = parameter_specs(odd, mesh)
    assert specs["embed"]["embedding"] == P(None, FSDP), "259 rows divide by nothing, 30 by two"
    assert specs["layers"][0]["q"]["kernel"] == P(TENSOR, FSDP), "6 do not divide by four"


@pytest.mark.parametrize(
    ("mesh_shape", "rows", "message"),
    [
        ((1, 1, 4), 1, "mesh.tensor 4 must divide the key-value heads of the model, 2"),
        ((1, 2, 1), 3, "mesh.fsdp 2 must divide the training.rows, 3"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(mesh_shape, rows, message):
    with pytest.raises(ConfigError, match=message):
        check_mesh(MODEL, rows, 16, make_mesh(*mesh_shape))
