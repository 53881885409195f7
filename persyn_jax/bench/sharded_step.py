"""The train step of workers that are each sharded over `fsdp` and `tensor`, both in the manner of
fully sharded data parallelism.

Every chip of a worker holds a part of its parameters and optimiser state and sees a part of its
batch. The gradient gathers the parameters inside the worker and scatters its mean back. The
exchange runs on each chip's own part: shards meet shards, and a model crosses between two workers
once, however many chips they have.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from persyn_jax.gossip import MixingTransformation
from persyn_jax.mesh import FSDP, TENSOR, WORKER, per_worker
from persyn_jax.training.step import LossFunction, TrainState

INNER_AXES = (FSDP, TENSOR)
"""The axes over which a worker is sharded: `inner_axes` of its `gossip.Exchange`."""

Shards = tuple[int, int]
"""Chips of a worker along `INNER_AXES`."""


def shards_of(mesh: Mesh) -> Shards:
    return mesh.shape[FSDP], mesh.shape[TENSOR]


def shard_spec(shape: tuple[int, ...], shards: Shards) -> PartitionSpec:
    """How an array of one worker is cut: along one axis among all chips if one divides evenly, else
    along an axis for each of `INNER_AXES` that finds one.

    Longer axes go first, and the last axis is taken only where no other will do, since the exchange
    handles whole rows. What does not divide at all is held whole by every chip.
    """
    cut: dict[int, str | tuple[str, ...]] = {}

    def take(names: str | tuple[str, ...], parts: int) -> bool:
        axes = [axis for axis, length in enumerate(shape) if length % parts == 0 < length]
        axes = [axis for axis in axes if axis not in cut]
        if axes:
            cut[max(axes, key=lambda axis: (axis < len(shape) - 1, shape[axis]))] = names
        return bool(axes)

    if not take(INNER_AXES, math.prod(shards)):
        for name, parts in zip(INNER_AXES, shards, strict=True):
            take(name, parts)
    return PartitionSpec(*(cut.get(axis) for axis in range(len(shape))))


def shard_shape(shape: tuple[int, ...], shards: Shards) -> tuple[int, ...]:
    """The part that one chip holds."""
    parts = dict(zip((INNER_AXES, *INNER_AXES), (math.prod(shards), *shards), strict=True))
    spec = shard_spec(shape, shards)
    return tuple(length // parts.get(names, 1) for length, names in zip(shape, spec, strict=True))


def sharded_loss(loss: LossFunction, shards: Shards) -> LossFunction:
    """`loss` of a worker whose parameters are cut by `shard_spec` and whose rows are dealt out.

    Its gradient is taken on the chips (JAX cannot look into a map over some of the axes for that),
    so there is no second derivative.
    """

    def one_chip(params, batch, specs):
        mean, weight = loss(jax.tree.map(_gather, params, specs), batch)
        total = lax.psum(weight, INNER_AXES)
        return lax.psum(mean * weight, INNER_AXES) / jnp.maximum(total, 1.0), total

    def forward(params, batch):
        specs = _specs(params, shards)
        values = jax.shard_map(
            lambda params, batch: jax.value_and_grad(one_chip, has_aux=True)(params, batch, specs),
            in_specs=(specs, PartitionSpec(INNER_AXES)),
            out_specs=(PartitionSpec(), specs),
            axis_names=set(INNER_AXES),
        )
        return values(params, batch)

    def backward(gradients, cotangents):
        return jax.tree.map(lambda leaf: leaf * cotangents[0], gradients), None

    differentiable = jax.custom_vjp(lambda params, batch: forward(params, batch)[0])
    differentiable.defvjp(forward, backward)
    return differentiable


def sharded_mixing(mixing: MixingTransformation, shards: Shards) -> MixingTransformation:
    """`mixing`, whose exchange has `INNER_AXES`, on each chip's part of parameters and state."""

    def update(updates, mix_state, params, round):
        specs, state_specs = _specs(params, shards), _specs(mix_state, shards)
        # A round that is known while the program is traced must stay so; another is an argument.
        rounds = (round,) if isinstance(round.branch_K, jax.Array) else ()

        def one_chip(updates, mix_state, params, *rounds):
            (own_round,) = rounds or (round,)
            return mixing.update(updates, mix_state, params, own_round)

        return jax.shard_map(
            one_chip,
            in_specs=(specs, state_specs, specs, *(PartitionSpec() for _ in rounds)),
            out_specs=(specs, state_specs),
            axis_names=set(INNER_AXES),
        )(updates, mix_state, params, *rounds)

    return mixing._replace(update=update)


def on_sharded_mesh(step: Callable, mesh: Mesh, state: TrainState) -> jax.stages.Wrapped:
    """`step(state, batch, round)` of one sharded worker, run by all workers at once, compiled.

    state: of all workers, for its shapes; it is donated, and comes back as `state_shardings` says.

    The counterpart of `training.step.on_mesh`: workers are told apart, and inside a worker the
    compiler sees one program over whole arrays, but where a map over `INNER_AXES` says otherwise.
    """

    def one_worker(state, batch, round):
        state, batch = jax.tree.map(lambda leaf: leaf[0], (state, batch))
        return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), step(state, batch, round))

    all_workers = jax.shard_map(
        one_worker,
        mesh=mesh,
        in_specs=(PartitionSpec(WORKER), PartitionSpec(WORKER), PartitionSpec()),
        out_specs=PartitionSpec(WORKER),
        axis_names={WORKER},
    )
    shardings = state_shardings(state, mesh), per_worker(mesh)
    return jax.jit(all_workers, out_shardings=shardings, donate_argnums=(0,))


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Where each leaf [W, ...] of a state of all workers lies."""
    shards = shards_of(mesh)

    def sharding(leaf) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(WORKER, *shard_spec(leaf.shape[1:], shards)))

    return jax.tree.map(sharding, state)


def _specs(tree: Any, shards: Shards) -> Any:
    return jax.tree.map(lambda leaf: shard_spec(leaf.shape, shards), tree)


def _gather(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The whole array; its transpose scatters the sum of the chips' gradients."""
    for axis, names in enumerate(spec):
        if names:
            leaf = lax.all_gather(leaf, names, axis=axis, tiled=True)
    return leaf
