"""How fast the exchange is, as ratios against the least that anyone must do, in one run.

Contenders take turns, so that a busy machine slows all of them alike; the first turn of each, which
compiles, is not counted. All work on donated memory.
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from pydantic import Field

from persyn_jax import gossip
from persyn_jax import mesh as meshes
from persyn_jax.bench import cnn
from persyn_jax.config import config_class
from persyn_jax.mesh import WORKER
from persyn_jax.streams import jax_stream, numpy_stream


@config_class
class SpeedConfig:
    """What is timed, and how often."""

    workers: Annotated[int, Field(ge=2)] = 4
    """Of the exchange; as many host devices are needed. A power of two."""
    layers: Annotated[int, Field(ge=1)] = 30
    """Of SmolLM2-135M's shapes: 30 make 135 million parameters, 540 MB a worker."""
    turns: Annotated[int, Field(ge=2)] = 9
    """Of each contender, the first not counted."""
    bank_workers: Annotated[int, Field(ge=2)] = 64
    """Of the bank whose compile time is measured."""
    simulated_workers: Annotated[int, Field(ge=2)] = 64
    simulated_batch: Annotated[int, Field(ge=1)] = 1
    """Images of one worker in one step of the simulator."""


class Ratio(NamedTuple):
    """One comparison: medians over the turns."""

    name: str
    seconds: float
    reference: str
    reference_seconds: float
    ratio: float


def against(name: str, run: Callable, reference: str, least: Callable, turns: int) -> Ratio:
    """`run(turn)` against `least(turn)`, by turns; both wait for their results."""
    times: dict[Callable, list[float]] = {least: [], run: []}
    for turn in range(turns):
        for contender, taken in times.items():
            started = time.perf_counter()
            contender(turn)
            taken.append(time.perf_counter() - started)
    mine, theirs = (statistics.median(times[contender][1:]) for contender in (run, least))
    return Ratio(name, mine, reference, theirs, mine / theirs)


def language_model_shapes(layers: int) -> dict[str, Any]:
    """SmolLM2-135M's arrays, layers unrolled."""
    width, keys, hidden = 576, 192, 1536
    layer = {
        "q": (width, width),
        "k": (keys, width),
        "v": (keys, width),
        "o": (width, width),
        "gate": (hidden, width),
        "up": (hidden, width),
        "down": (width, hidden),
        "norm_1": (width,),
        "norm_2": (width,),
    }
    return {"embed": (49152, width), "norm": (width,), "layers": [layer] * layers}


def bank_on_devices(config: SpeedConfig, distance: bool = True) -> Ratio:
    """The bank, pytree in and pytree out, against one static ppermute and average of the bytes.

    distance: whether the distance to the partner is wanted too; else the compiler leaves it out.
    """
    workers = config.workers
    mesh = meshes.make_mesh(workers)
    schedule = gossip.gosgd_schedule(workers, config.turns, 1.0, seed=0)
    exchange = gossip.Exchange(schedule.bank, WORKER)
    ring = [(w, (w + 1) % workers) for w in range(workers)]

    def mixed(params, gain_K, round):
        params, gap = gossip.mix(params, gain_K, round, exchange)
        return (params, gap) if distance else (params, jnp.float32(0))

    def averaged(flat):
        return (flat + lax.ppermute(flat, WORKER, ring)) * 0.5

    place = meshes.per_worker(mesh)
    params = _random(language_model_shapes(config.layers), workers, place)
    count = sum(leaf.size for leaf in jax.tree.leaves(params)) // workers
    held = {"params": params, "flat": jax.device_put(np.zeros((workers, count), np.float32), place)}
    half_WK = jax.device_put(np.full((workers, 1), 0.5, np.float32), place)
    mix = _on_devices(mixed, mesh, 2, shared=1)
    average = _on_devices(averaged, mesh, 1, shared=0)

    def run(turn):
        held["params"], _ = jax.block_until_ready(
            mix(held["params"], half_WK, schedule.round(turn))
        )

    def least(turn):
        held["flat"] = jax.block_until_ready(average(held["flat"]))

    return against(
        f"bank, {workers} host devices, {count / 1e6:.0f}M parameters each"
        + (", with the distance to the partner" if distance else ""),
        run,
        "one static ppermute and average of the same bytes",
        least,
        config.turns,
    )


def take_on_one_device(config: SpeedConfig) -> Ratio:
    """Many workers on one device, against one average in place for each of them."""
    workers = config.workers
    schedule = gossip.gosgd_schedule(workers, config.turns, 1.0, seed=0)
    exchange = gossip.Exchange(schedule.bank, WORKER, one_device=True)

    def mixed(params, gain_K, round):
        return gossip.mix(params, gain_K, round, exchange)[0]

    mix = jax.jit(jax.vmap(mixed, in_axes=(0, 0, None), axis_name=WORKER), donate_argnums=0)
    average = jax.jit(lambda own, other: (own + other) * 0.5, donate_argnums=0)
    held = {"params": _random(language_model_shapes(config.layers), workers, None)}
    count = sum(leaf.size for leaf in jax.tree.leaves(held["params"])) // workers
    flat = [jnp.zeros(count) for _ in range(workers)]
    half_WK = jnp.full((workers, 1), 0.5)

    def run(turn):
        held["params"] = jax.block_until_ready(mix(held["params"], half_WK, schedule.round(turn)))

    def least(turn):
        for w in range(workers):
            flat[w] = jax.block_until_ready(average(flat[w], flat[w ^ 1]))

    return against(
        f"take, {workers} workers on one device, {count / 1e6:.0f}M parameters each",
        run,
        f"{workers} averages of two arrays of the same bytes, in place",
        least,
        config.turns,
    )


def simulator(config: SpeedConfig) -> Ratio:
    """GoSGD steps of the small CNN, all workers as one array, against a Python loop over a jitted
    step a worker, of the network written with XLA's own convolutions."""
    workers, batch = config.simulated_workers, config.simulated_batch
    schedule = gossip.gosgd_schedule(workers, config.turns, 0.1, seed=0)
    mixing = gossip.gosgd(gossip.Exchange(schedule.bank, WORKER, one_device=True))
    rng = numpy_stream(0, "speed images")
    images_WBHWC = rng.integers(0, 256, (workers, batch, 28, 28, 3)).astype(np.uint8)
    labels_WB = rng.integers(0, 10, (workers, batch))
    one = cnn.init(jax_stream(0, "speed start"), 3)

    def step(params, mix_state, batch, round):
        gradients = jax.grad(cnn.loss)(params, batch)
        updates = jax.tree.map(lambda leaf: -0.01 * leaf, gradients)
        return mixing.update(updates, mix_state, params, round)

    batched = jax.jit(
        jax.vmap(step, in_axes=(0, 0, 0, None), axis_name=WORKER), donate_argnums=(0, 1)
    )

    @jax.jit
    def alone(params, batch):
        gradients = jax.grad(cnn.loss_by_convolutions)(params, batch)
        return jax.tree.map(lambda leaf, gradient: leaf - 0.01 * gradient, params, gradients)

    @jax.jit
    def push(receiver, sender, gain):
        return jax.tree.map(lambda own, other: own + gain * (other - own), receiver, sender)

    params = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], workers, axis=0), one)
    held = {"state": (params, jax.vmap(mixing.init)(params)), "loop": [one] * workers}

    def run(turn):
        batch = images_WBHWC, labels_WB
        held["state"] = jax.block_until_ready(batched(*held["state"], batch, schedule.round(turn)))

    def least(turn):
        loop = [
            alone(params, (images_WBHWC[w], labels_WB[w])) for w, params in enumerate(held["loop"])
        ]
        for receiver, sender, _ in schedule.edges(turn):
            loop[receiver] = push(loop[receiver], loop[sender], 1 / 3)
        held["loop"] = jax.block_until_ready(loop)

    return against(
        f"simulator, {workers} workers of the small CNN, batch {batch}",
        run,
        "a Python loop over one jitted step a worker",
        least,
        config.turns,
    )


def bank_compile_seconds(workers: int) -> float:
    """Of GoSGD's update with the full bank of so many workers, for a small tree, under vmap's
    counterpart on devices: ahead of time, on the CPU."""
    schedule = gossip.gosgd_schedule(workers, 1, 1.0, seed=0)
    rule = gossip.gosgd(gossip.Exchange(schedule.bank, WORKER))
    mesh = meshes.make_mesh(workers)
    params = {"w": jnp.zeros((workers, 64, 64)), "b": jnp.zeros((workers, 64))}
    state = jax.vmap(rule.init)(params)
    update = _on_devices(rule.update, mesh, 3, shared=1)
    started = time.perf_counter()
    update.lower(params, state, params, schedule.round(0)).compile()
    return time.perf_counter() - started


def _on_devices(function: Callable, mesh: Mesh, own: int, shared: int):
    """`function` of one worker on all devices: `own` arguments with axis W, then `shared` ones."""
    row, whole = PartitionSpec(WORKER), PartitionSpec()

    def worker(*arguments):
        mine = jax.tree.map(lambda leaf: leaf[0], arguments[:own])
        return jax.tree.map(lambda leaf: leaf[None], function(*mine, *arguments[own:]))

    specs = (row,) * own + (whole,) * shared
    on_all = jax.shard_map(worker, mesh=mesh, in_specs=specs, out_specs=row)
    return jax.jit(on_all, donate_argnums=0)


def _random(shapes: dict[str, Any], workers: int, sharding) -> Any:
    rng = numpy_stream(0, "speed parameters")

    def array(shape):
        drawn = rng.random((workers, *shape), np.float32)
        return jnp.asarray(drawn) if sharding is None else jax.device_put(drawn, sharding)

    return jax.tree.map(array, shapes, is_leaf=lambda node: isinstance(node, tuple))
