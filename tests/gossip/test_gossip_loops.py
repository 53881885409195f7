"""Gossip in somebody else's training loop: plain pytrees, Flax NNX, Equinox.

What is added is the same each time: `add_gossip` and `start_workers`. The loops end with the same
parameters, bit by bit, as the project's own.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from persyn_jax import gossip
from persyn_jax.mesh import WORKER, make_mesh, per_worker
from persyn_jax.streams import numpy_stream
from persyn_jax.training.loop import run_steps
from persyn_jax.training.step import init_state, make_train_step, on_mesh, stack_on_mesh

WORKERS, STEPS, ROWS, INPUTS, WIDTH = 4, 12, 16, 6, 32

# What gossip adds to any loop.


def add_gossip(local_step, mixing, mesh):
    """local_step(params, opt_state, batch) -> (updates, opt_state) is yours, of one worker.

    Returns step(state, batch, round) -> state: the same on all workers, and then they mix.
    """

    def worker(state, batch, round):
        (params, opt_state, mix_state), batch = jax.tree.map(lambda leaf: leaf[0], (state, batch))
        at = mixing.evaluate_at(params, mix_state)
        updates, opt_state = local_step(at, opt_state, batch)
        params, mix_state = mixing.update(updates, mix_state, params, round)
        return jax.tree.map(lambda leaf: leaf[None], (params, opt_state, mix_state))

    specs = P("worker"), P("worker"), P()
    return jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=specs, out_specs=P("worker")))


def start_workers(params, optimiser, mixing, mesh):
    """Every worker starts with these parameters: each array gets a leading axis, workers."""
    state = params, optimiser.init(params), mixing.init(params)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * mesh.size), state)
    return jax.device_put(stacked, NamedSharding(mesh, P("worker")))


# Three loops with it.


def train_plain(params, optimiser, batches, schedule, mesh):
    """Parameters are a pytree of arrays."""
    mixing = gossip.gosgd(gossip.Exchange(schedule.bank, axis_name="worker"))

    def local_step(params, opt_state, batch):
        gradients = jax.grad(lambda params: loss(lambda x: mlp(params, x), batch))(params)
        return optimiser.update(gradients, opt_state, params)

    step = add_gossip(local_step, mixing, mesh)
    state = start_workers(params, optimiser, mixing, mesh)
    for t, batch in enumerate(batches):
        state = step(state, batch, schedule.round(t))
    return state[0]


def train_nnx(model, optimiser, batches, schedule, mesh):
    """A Flax NNX module, taken apart into its graph and its parameters, and put together again."""
    mixing = gossip.gosgd(gossip.Exchange(schedule.bank, axis_name="worker"))
    graph, params = nnx.split(model)

    def local_step(params, opt_state, batch):
        gradients = jax.grad(lambda params: loss(nnx.merge(graph, params), batch))(params)
        return optimiser.update(gradients, opt_state, params)

    step = add_gossip(local_step, mixing, mesh)
    state = start_workers(params, optimiser, mixing, mesh)
    for t, batch in enumerate(batches):
        state = step(state, batch, schedule.round(t))
    return state[0]


def train_equinox(model, optimiser, batches, schedule, mesh):
    """An Equinox module, which is a pytree itself: its arrays are the parameters."""
    mixing = gossip.gosgd(gossip.Exchange(schedule.bank, axis_name="worker"))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def local_step(params, opt_state, batch):
        gradients = jax.grad(lambda params: loss(eqx.combine(params, static), batch))(params)
        return optimiser.update(gradients, opt_state, params)

    step = add_gossip(local_step, mixing, mesh)
    state = start_workers(params, optimiser, mixing, mesh)
    for t, batch in enumerate(batches):
        state = step(state, batch, schedule.round(t))
    return state[0]


# One model, three times.


def loss(model, batch):
    x_BI, y_B1 = batch
    return jnp.mean((model(x_BI) - y_B1) ** 2)


def mlp(params, x_BI):
    hidden_BH = jnp.tanh(x_BI @ params["w1"] + params["b1"][None])
    return hidden_BH @ params["w2"] + params["b2"][None]


class NnxMlp(nnx.Module):
    def __init__(self, params):
        self.one = nnx.Linear(INPUTS, WIDTH, rngs=nnx.Rngs(0))
        self.two = nnx.Linear(WIDTH, 1, rngs=nnx.Rngs(0))
        self.one.kernel[...], self.one.bias[...] = params["w1"], params["b1"]
        self.two.kernel[...], self.two.bias[...] = params["w2"], params["b2"]

    def __call__(self, x_BI):
        return self.two(jnp.tanh(self.one(x_BI)))


class EquinoxMlp(eqx.Module):
    w1: jax.Array
    b1: jax.Array
    w2: jax.Array
    b2: jax.Array
    activation: callable = jnp.tanh

    def __call__(self, x_BI):
        return self.activation(x_BI @ self.w1 + self.b1[None]) @ self.w2 + self.b2[None]


# The same training, and what it must end with.


@pytest.fixture(scope="module")
def training():
    draw = numpy_stream(0, "loops")
    params = {
        "w1": draw.normal(size=(INPUTS, WIDTH)),
        "b1": draw.normal(size=WIDTH),
        "w2": draw.normal(size=(WIDTH, 1)),
        "b2": draw.normal(size=1),
    }
    params = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in params.items()}
    mesh = make_mesh(WORKERS)
    batches = [
        jax.device_put(
            (
                draw.normal(size=(WORKERS, ROWS, INPUTS)).astype(np.float32),
                draw.normal(size=(WORKERS, ROWS, 1)).astype(np.float32),
            ),
            per_worker(mesh),
        )
        for _ in range(STEPS)
    ]
    schedule = gossip.gosgd_schedule(WORKERS, STEPS, exchange_probability=0.5, seed=1)
    return params, optax.adamw(1e-1), batches, schedule, mesh


@pytest.fixture(scope="module")
def expected(training):
    """What the project's own loop makes of it."""
    params, optimiser, batches, schedule, mesh = training
    mixing = gossip.gosgd(gossip.Exchange(schedule.bank, WORKER))

    def loss_and_weight(params, batch):
        return loss(lambda x_BI: mlp(params, x_BI), batch), jnp.float32(1)

    step = on_mesh(make_train_step(loss_and_weight, optimiser, mixing), mesh, (0, 0, None))
    start = on_mesh(lambda params: init_state(params, optimiser, mixing), mesh, (0,))
    state = start(stack_on_mesh(params, mesh))
    *_, last = run_steps(step, state, batches.__getitem__, schedule, range(STEPS), mesh)
    assert gossip.consensus_distance_stacked(last.state.params) > 0, "workers must differ"
    return last.state.params


def assert_bitwise(found, expected):
    for name, leaf in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(leaf), err_msg=name)


def test_plain_pytrees(training, expected):
    assert_bitwise(train_plain(*training), expected)


def test_flax_nnx(training, expected):
    params, *rest = training
    trained = nnx.to_pure_dict(train_nnx(NnxMlp(params), *rest))
    one, two = trained["one"], trained["two"]
    found = {"w1": one["kernel"], "b1": one["bias"], "w2": two["kernel"], "b2": two["bias"]}
    assert_bitwise(found, expected)


def test_equinox(training, expected):
    params, *rest = training
    assert_bitwise(vars(train_equinox(EquinoxMlp(**params), *rest)), expected)
