"""LoRA on a mesh: adapters alone are trained and exchanged, the base is an argument like any other.

Training itself is checked through `train_student`, in the tests of the pipeline.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from persyn_jax import gossip
from persyn_jax.bench.hlo import collectives
from persyn_jax.config import ConfigError, validate
from persyn_jax.mesh import WORKER, make_mesh, place, replicated
from persyn_jax.models import decoder, rows, weights
from persyn_jax.models.adapters import Adapters, init_adapters, merge, with_adapters
from persyn_jax.streams import numpy_stream
from persyn_jax.training.config import LoraConfig
from persyn_jax.training.losses import adapter_loss, response_loss
from persyn_jax.training.precision import cast_loss
from persyn_jax.training.sharded import (
    INNER_AXES,
    batch_spec,
    chip_layout,
    every_worker,
    make_sharded_step,
    on_sharded_mesh,
    parameter_specs,
    sharded_losses,
    state_shardings,
)
from persyn_jax.training.step import compiled_programs, init_state

ROUNDS, WORKERS, ALPHA = 3, 2, 8
MODEL = dataclasses.replace(weights.RANDOM_TINY, vocab_size=264)
BASE = jax.tree.map(np.asarray, decoder.init(MODEL, jax.random.key(0)))
ADAPTERS = init_adapters(MODEL, 4, LoraConfig().targets, 0, "test")
ADAPTED = dataclasses.replace(MODEL, lora_scale=ALPHA / 4)


def batches(accumulate: bool = False):
    draw = numpy_stream(0, "lora step")

    def conversation():
        prompt, response = draw.integers(0, 256, 5), draw.integers(0, 256, draw.integers(2, 6))
        return rows.Conversation(tuple(prompt.tolist()), tuple(response.tolist()))

    def batch():
        return rows.pack([[conversation()] for _ in range(4)], 12, 8)

    made = [[batch() for _ in range(WORKERS)] for _ in range(ROUNDS)]
    stacked = [jax.tree.map(lambda *leaves: np.stack(leaves), *step) for step in made]
    if accumulate:  # [W, 4, T] -> [W, 2, 2, T]
        stacked = [jax.tree.map(lambda x: x.reshape(WORKERS, 2, 2, -1), b) for b in stacked]
    return stacked


def train(inner=(1, 1), accumulate=1, probability=0.7):
    """(losses [ROUNDS, W], the last state, the placed base, the compiled step, its arguments)"""
    mesh = make_mesh(WORKERS, *inner)
    schedule = gossip.gosgd_schedule(WORKERS, ROUNDS, probability, seed=2)
    mixing = gossip.gosgd(gossip.Exchange(schedule.bank, WORKER, INNER_AXES))
    optimiser = optax.adamw(1e-2, eps=1e-5)  # a gradient that is mere rounding makes no step
    specs, base_specs = parameter_specs(ADAPTERS, mesh), parameter_specs(BASE, mesh)
    layout = chip_layout(with_adapters(base_specs, specs), mesh)
    loss = functools.partial(adapter_loss, ADAPTED, "nothing", layout=layout)
    step = make_sharded_step(loss, optimiser, mixing, mesh, specs, accumulate, (base_specs,))
    stacked = jax.tree.map(lambda leaf: np.stack([leaf] * WORKERS), ADAPTERS)
    state = jax.vmap(lambda params: init_state(params, optimiser, mixing))(stacked)
    state = jax.device_put(state, state_shardings(state, mesh, specs))
    base = place(BASE, every_worker(base_specs, mesh))
    compiled = on_sharded_mesh(step, mesh, state, specs)
    losses, arguments = [], None
    for t, batch in enumerate(batches(accumulate > 1)):
        spec = batch_spec(mesh, leading=int(accumulate > 1))
        batch = jax.device_put(batch, NamedSharding(mesh, spec))
        round = jax.device_put(schedule.round(t), replicated(mesh))
        if arguments is None:
            arguments = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                (state, batch, round, base),
            )
        state, metrics = compiled(state, batch, round, base)
        losses.append(np.asarray(metrics.loss))
    measured = sharded_losses(loss, mesh, specs, (base_specs,))
    if accumulate == 1:
        losses.append(np.asarray(jax.jit(measured)(state.params, batch, base)))
    return np.array(losses), state, base, compiled, arguments


@pytest.fixture(scope="module")
def trained():
    return train()


def test_only_adapters_are_in_the_state_and_the_base_stays_as_it_was(trained):
    losses, state, base, compiled, _ = trained
    assert jax.tree.structure(state.params) == jax.tree.structure(ADAPTERS)
    scalars = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim < 3]
    in_state = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    in_adapters = WORKERS * sum(leaf.nbytes for leaf in jax.tree.leaves(ADAPTERS))
    # Parameters and AdamW's two moments; besides, counts, sum weights and distances.
    assert in_state - sum(leaf.nbytes for leaf in scalars) == 3 * in_adapters
    assert sum(leaf.nbytes for leaf in scalars) < 100
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(base), BASE)
    assert compiled_programs(compiled) == 1
    assert (losses[-1] < losses[-2]).all(), "the last batch after the last step"
    for pair in state.params["layers"].values():
        assert np.asarray(pair["lora_b"]).any()


def test_the_first_loss_is_that_of_the_base(trained):
    """lora_b is 0: against the plain loss of the base, worker by worker."""
    first = batches()[0]
    for worker in range(WORKERS):
        own = jax.tree.map(lambda leaf, w=worker: leaf[w], first)
        expected, _ = response_loss(MODEL, "nothing", BASE, own)
        np.testing.assert_allclose(trained[0][0, worker], expected, rtol=1e-6)


def test_the_gradient_is_that_through_the_merged_kernels():
    """The chain rule by hand: d/dB = s G A', d/dA = s B' G, with G that of W + s B A."""
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), ADAPTERS)
    batch = jax.tree.map(lambda leaf: leaf[0], batches()[0])
    loss = functools.partial(adapter_loss, ADAPTED, "nothing")
    found = jax.jit(jax.grad(loss, has_aux=True))(adapters, batch, BASE)[0]["layers"]
    whole = functools.partial(response_loss, MODEL, "nothing")
    merged = merge(BASE, Adapters(adapters, ALPHA))
    of_kernels = jax.jit(jax.grad(whole, has_aux=True))(merged, batch)[0]["layers"]
    for part, pair in adapters["layers"].items():
        G_Loi, scale = np.asarray(of_kernels[part]["kernel"]), ALPHA / 4
        expected_b = scale * G_Loi @ pair["lora_a"].swapaxes(1, 2)
        expected_a = scale * pair["lora_b"].swapaxes(1, 2) @ G_Loi
        np.testing.assert_allclose(found[part]["lora_b"], expected_b, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found[part]["lora_a"], expected_a, rtol=1e-3, atol=1e-5)


def test_a_spread_worker_that_accumulates_steps_as_a_whole_one(trained):
    """Two batches of two rows over four chips a worker, against one of four on one chip."""
    losses, state, base, compiled, _ = train((2, 2), accumulate=2)
    np.testing.assert_allclose(losses, trained[0][:ROUNDS], rtol=1e-5)
    assert compiled_programs(compiled) == 1
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(trained[1].params), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-4)
    kernel = base["layers"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size, "cut, not copied"


def test_the_exchange_carries_the_adapters_and_nothing_else(trained):
    """Bytes that the compiled step permutes, on one device: of adapters, and a sum weight's few."""
    *_, compiled, arguments = trained
    found = collectives(compiled.lower(*arguments).compile().as_text(), 1)
    sent = sum(one.size for one in found if one.kind == "collective-permute")
    adapters = sum(leaf.nbytes for leaf in jax.tree.leaves(ADAPTERS))
    assert adapters <= sent < adapters + 64
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(BASE))
    assert adapters < base / 3
    gathered = [one for one in found if one.kind not in ("collective-permute", "all-reduce")]
    assert not gathered


def test_what_is_frozen_is_not_rounded_anew():
    """It comes in the dtype that the loss computes in; what is trained is rounded."""

    def loss(params, batch, base):
        assert (params.dtype, base.dtype) == (jnp.bfloat16, jnp.float32)
        return (params * base.astype(params.dtype)).sum(), batch

    mean, weight = cast_loss(loss, "bfloat16")(jnp.ones(3), jnp.float32(5), jnp.full(3, 2.0))
    assert (mean.dtype, float(mean), float(weight)) == (jnp.float32, 6, 5)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"targets": []}, "targets"),
        ({"targets": ["q", "q"]}, "one is given twice"),
        ({"targets": ["q_proj"]}, "targets"),
    ],
)
def test_a_wrong_config_is_one_line(given, named):
    with pytest.raises(ConfigError, match=named) as caught:
        validate(LoraConfig, given, "config")
    assert "\n" not in str(caught.value)
