"""The train step of one worker, and the same step run by all workers of a mesh.

    train_step(state, batch, round) -> (state, metrics)

is pure and unaware of how workers are laid out, apart from the axis name inside `mixing`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from persyn_jax import mesh as meshes
from persyn_jax.gossip import MixingTransformation, Round

LossFunction = Callable[[Any, Any], tuple[jax.Array, jax.Array]]
"""(params, batch) -> (mean loss, weight)"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that training carries from step to step; arrays only. Of all workers: each leaf leads with axis W."""

    params: Any
    opt_state: Any
    mix_state: Any


class StepMetrics(NamedTuple):
    """What one worker reports of one step. Of all workers: each leaf is [W]."""

    loss: jax.Array
    weight: jax.Array
    """Response tokens (or pairs) the loss was averaged over."""
    gradient_norm: jax.Array


TrainStep = Callable[[TrainState, Any, Round], tuple[TrainState, StepMetrics]]


def init_state(
    params: Any, optimizer: optax.GradientTransformation, mixing: MixingTransformation
) -> TrainState:
    """The state of one worker."""
    return TrainState(params, optimizer.init(params), mixing.init(params))


def make_train_step(
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    mixing: MixingTransformation,
) -> TrainStep:
    """One worker's step: gradient where the mixing rule wants it taken, optimiser, then update and mix."""

    def train_step(state: TrainState, batch: Any, round: Round):
        at = mixing.evaluate_at(state.params, state.mix_state)
        (loss, weight), gradients = jax.value_and_grad(loss_function, has_aux=True)(at, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, at)
        params, mix_state = mixing.update(updates, state.mix_state, state.params, round)
        metrics = StepMetrics(loss, weight, optax.global_norm(gradients))
        return TrainState(params, opt_state, mix_state), metrics

    return train_step


def on_mesh(function: Callable, mesh: Mesh, replicated: int = 0, donate: bool = False) -> Callable:
    """`function` of one worker, run by every worker of the mesh at once, compiled.

    Arguments and results get a leading axis W sharded over the workers; the last `replicated` arguments are given to all
    workers alike. donate: the first argument's memory is reused for the result.
    """
    row, whole = PartitionSpec(meshes.WORKER), PartitionSpec()

    def all_workers(*arguments):
        own = arguments[: len(arguments) - replicated]
        shared = arguments[len(arguments) - replicated :]
        specs = (row,) * len(own) + (whole,) * len(shared)

        def one_worker(*arguments):
            own = jax.tree.map(lambda a: a[0], arguments[: len(arguments) - replicated])
            result = function(*own, *arguments[len(arguments) - replicated :])
            return jax.tree.map(lambda a: jnp.expand_dims(a, 0), result)

        mapped = jax.shard_map(one_worker, mesh=mesh, in_specs=specs, out_specs=row)
        return mapped(*own, *shared)

    return jax.jit(all_workers, donate_argnums=(0,) if donate else ())


def stack_on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Every worker starts from `tree`: each leaf [...] becomes [W, ...], one copy a worker and none more."""
    workers = mesh.shape[meshes.WORKER]
    sharding = meshes.per_worker(mesh)

    def place(leaf):
        leaf = jnp.asarray(leaf)[None]
        shards = [jax.device_put(leaf, device) for device in mesh.devices.flat]
        return jax.make_array_from_single_device_arrays((workers, *leaf.shape[1:]), sharding, shards)

    return jax.tree.map(place, tree)
