"""The train step of one worker, and the same step run by all workers of a mesh.

    train_step(state, batch, round, *frozen) -> (state, metrics)

is pure and unaware of how workers are laid out, apart from the axis name inside `mixing`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from persyn_jax import mesh as meshes
from persyn_jax.gossip import MixingTransformation, Round
from persyn_jax.gossip.base import Array

LossFunction = Callable[..., tuple[jax.Array, jax.Array]]
"""(params, batch, *frozen) -> (mean loss, weight behind it). frozen: what is neither trained nor
mixed, nor part of a state, as the base of adapters; the same for all workers."""
GradientFunction = Callable[..., tuple[tuple[jax.Array, jax.Array], Any]]
"""(params, batch, *frozen) -> ((mean loss, weight behind it), gradient of the mean loss)"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that training carries from step to step; arrays only.

    Of one worker; of all workers, each leaf leads with axis W.
    """

    params: Any
    opt_state: Any
    mix_state: Any


class StepMetrics(NamedTuple):
    """What a worker reports of one step: scalars; of all workers, [W]."""

    loss: Array
    weight: Array
    """Response tokens (or pairs) that the loss is the mean of."""
    gradient_norm: Array
    """Before clipping."""


TrainStep = Callable[..., tuple[TrainState, StepMetrics]]
"""(state, batch, round, *frozen) -> (state, metrics)"""


def init_state(
    params: Any, optimiser: optax.GradientTransformation, mixing: MixingTransformation
) -> TrainState:
    """The state of one worker."""
    return TrainState(params, optimiser.init(params), mixing.init(params))


def make_train_step(
    loss_function: LossFunction,
    optimiser: optax.GradientTransformation,
    mixing: MixingTransformation,
    accumulate: int = 1,
) -> TrainStep:
    """One worker's step: the gradient where the mixing rule wants it, then update and mix.

    accumulate: A. Beyond 1 the leaves of a batch are [A, B, ...], and the step is that of one batch
    [A * B, ...], with the activations of B rows at a time.
    """
    gradient_of = jax.value_and_grad(loss_function, has_aux=True)
    if accumulate > 1:
        gradient_of = accumulated(gradient_of)

    def train_step(
        state: TrainState, batch: Any, round: Round, *frozen: Any
    ) -> tuple[TrainState, StepMetrics]:
        at = mixing.evaluate_at(state.params, state.mix_state)
        (loss, weight), gradients = gradient_of(at, batch, *frozen)
        updates, opt_state = optimiser.update(gradients, state.opt_state, at)
        params, mix_state = mixing.update(updates, state.mix_state, state.params, round)
        metrics = StepMetrics(loss, weight, optax.tree.norm(gradients))
        return TrainState(params, opt_state, mix_state), metrics

    return train_step


def accumulated(gradient_of: GradientFunction) -> GradientFunction:
    """`gradient_of` over the batches along the leading axis of its batch, each by its own weight.

    The weight must be that of a mean: mean loss times weight is a sum over the batch.
    """

    def over_batches(
        params: Any, batches: Any, *frozen: Any
    ) -> tuple[tuple[jax.Array, jax.Array], Any]:
        def add(total: Any, batch: Any) -> tuple[Any, None]:
            (loss, weight), gradients = gradient_of(params, batch, *frozen)
            means, weighed = total
            means = jax.tree.map(lambda sum, mean: sum + weight * mean, means, (loss, gradients))
            return (means, weighed + weight), None

        first = jax.tree.map(lambda leaf: leaf[0], batches)
        (loss, weight), gradients = jax.eval_shape(gradient_of, params, first, *frozen)
        start = jax.tree.map(jnp.zeros_like, ((loss, gradients), weight))
        ((loss, gradients), weight), _ = jax.lax.scan(add, start, batches)
        share = 1 / jnp.maximum(weight, 1.0)  # a worker without tokens has gradient 0
        return (loss * share, weight), jax.tree.map(lambda sum: sum * share, gradients)

    return over_batches


def on_mesh(
    function: Callable, mesh: Mesh, in_axes: Sequence[int | None], donate: bool = False
) -> jax.stages.Wrapped:
    """`function` of one worker, run by every worker of the mesh at once, compiled.

    With a device a worker it is what `jax.vmap(function, in_axes, axis_name=WORKER)` is on one.
    in_axes: 0 for an argument whose leaves lead with axis W, None for one that all workers share.
    donate: the first argument's memory is reused for the result. Results lead with axis W.
    """
    row, whole = meshes.per_worker(mesh), meshes.replicated(mesh)

    def one_worker(*arguments):
        own = [
            argument if axis is None else jax.tree.map(lambda leaf: leaf[0], argument)
            for argument, axis in zip(arguments, in_axes, strict=True)
        ]
        return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), function(*own))

    all_workers = jax.shard_map(
        one_worker,
        mesh=mesh,
        in_specs=tuple(whole.spec if axis is None else row.spec for axis in in_axes),
        out_specs=row.spec,
    )
    return jax.jit(all_workers, out_shardings=row, donate_argnums=(0,) if donate else ())


def compiled_programs(function: jax.stages.Wrapped) -> int:
    """How many programs a function from `on_mesh` has compiled so far."""
    return function._cache_size()  # pyrefly: ignore[missing-attribute]  JAX has no public name


def stack_on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Every worker starts from `tree`: each leaf [...] becomes [W, ...], one copy a worker."""
    workers, sharding = mesh.shape[meshes.WORKER], meshes.per_worker(mesh)

    def place(leaf):
        row = jnp.asarray(leaf)[None]
        shards = [jax.device_put(row, device) for device in mesh.devices.flat]
        shape = (workers, *row.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    return jax.tree.map(place, tree)


def placed_shapes(tree: Any, sharding: NamedSharding) -> Any:
    """`tree`'s shapes and dtypes as they lie under `sharding`, with no memory behind them."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
