"""Workers that are each spread over the chips of `fsdp` and `tensor`, and their train step.

Parameters, optimiser state and gossip state are cut among a worker's chips and stay so:

    fsdp     every chip sees a part of the worker's rows; a layer's parameters are gathered when it
             runs, and its gradient is scattered back (ZeRO-3, arXiv 1910.02054)
    tensor   heads and feed-forward features are divided (Megatron-LM, arXiv 1909.08053), and so are
             the response tokens whose logits are computed
    worker   nothing but the exchange: shards meet shards

Loss and exchange run in a `shard_map` over all axes; the optimiser sees whole arrays and the
compiler divides its work.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from persyn_jax.config import ConfigError
from persyn_jax.gossip import MixingTransformation, Round
from persyn_jax.mesh import FSDP, TENSOR, WORKER, compiler_options, per_worker
from persyn_jax.models.adapters import with_adapters
from persyn_jax.models.decoder import DecoderConfig, Params
from persyn_jax.models.layout import GATHERED, WHOLE, Layout
from persyn_jax.training.config import TrainConfig
from persyn_jax.training.losses import adapter_loss, response_loss
from persyn_jax.training.precision import cast_loss
from persyn_jax.training.step import (
    LossFunction,
    StepMetrics,
    TrainState,
    TrainStep,
    accumulated,
)

INNER_AXES = (FSDP, TENSOR)
"""The axes over which a worker is spread: `inner_axes` of its `gossip.Exchange`."""

# By parameter: which axis of a kernel [out, in] is cut over `tensor`.
_OUT = ("q", "k", "v", "gate", "up")
_IN = ("o", "down")
_VOCABULARY = ("embed", "head")


def check_mesh(config: DecoderConfig, rows: int, responses: int, mesh: Mesh) -> None:
    """Raises ConfigError for a model or a batch that this mesh cannot divide."""
    fsdp, tensor = mesh.shape[FSDP], mesh.shape[TENSOR]
    for what, count, axis, chips in (
        ("key-value heads of the model", config.kv_heads, TENSOR, tensor),
        ("feed-forward features of the model", config.d_ff, TENSOR, tensor),
        ("training.row_response_tokens", responses, TENSOR, tensor),
        ("training.rows", rows, FSDP, fsdp),
    ):
        if count % chips:
            raise ConfigError(f"mesh.{axis} {chips} must divide the {what}, {count}")


def parameter_specs(shapes: Params, mesh: Mesh) -> Params:
    """How each parameter of one worker is cut: a tree of `PartitionSpec`.

    shapes: parameters, or their shapes. Heads and features must divide over `tensor`, see
    `check_mesh`. What does not divide evenly over `fsdp` is left whole. So are norms, biases and
    adapters there: they are small. The last axis is cut over `fsdp` only where no other will do,
    since the exchange handles whole rows.
    """

    def spec(path, leaf) -> PartitionSpec:
        names = [str(getattr(key, "key", "")) for key in path]
        return _spec(names[-2], names[-1], leaf.shape, mesh.shape[FSDP], mesh.shape[TENSOR])

    return jax.tree_util.tree_map_with_path(spec, shapes)


def _spec(part: str, name: str, shape: tuple[int, ...], fsdp: int, tensor: int) -> PartitionSpec:
    cut: dict[int, Any] = {}
    last = len(shape) - 1
    if name == "bias" and part in _OUT:
        cut[last] = TENSOR
    elif part in _VOCABULARY:
        # Gathered whole before it is used, so any cut will do.
        axes = [axis for axis in (last - 1, last) if shape[axis] % (fsdp * tensor) == 0]
        if axes:
            cut[axes[0]] = INNER_AXES
        elif axes := [axis for axis in (last - 1, last) if shape[axis] % fsdp == 0]:
            cut[axes[0]] = FSDP
    elif part in _OUT + _IN:
        out, divided = last - 1, last - 1 if part in _OUT else last
        if (name, divided) not in (("lora_a", out), ("lora_b", last)):  # its rank is never divided
            cut[divided] = TENSOR
        for axis in (out, last) if name == "kernel" else ():
            if shape[axis] % (fsdp * (tensor if axis in cut else 1)) == 0:
                cut[axis] = (TENSOR, FSDP) if axis in cut else FSDP
                break
    # An axis of one chip is never named: there is nothing to tell its shards apart.
    used = {name for name, chips in ((FSDP, fsdp), (TENSOR, tensor)) if chips > 1}
    return PartitionSpec(*(_only(used, cut.get(axis)) for axis in range(len(shape))))


def _only(used: set[str], cut: Any) -> Any:
    names = tuple(name for name in _names(cut) if name in used)
    return names if len(names) > 1 else names[0] if names else None


def specs_like(tree: Any, params: Params, specs: Params) -> Any:
    """How the leaves of a state that belongs to `params` are cut: those that stand at a parameter's
    path and have its shape as that parameter, others (counts, scalars, sums of rows) not at all."""
    known = {
        _path(path): (leaf.shape, spec)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(specs, is_leaf=_is_spec),
            strict=True,
        )
    }

    def spec(path, leaf) -> PartitionSpec:
        names = _path(path)
        for start in range(len(names)):
            shape, found = known.get(names[start:], (None, None))
            if found is not None and shape == leaf.shape:
                return found
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


def _path(path) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,)) for key in path)


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)


def chip_layout(specs: Params, mesh: Mesh) -> Layout:
    """The layout of a decoder whose parameters are cut by `specs`; inside `shard_map` only."""
    tensor = mesh.shape[TENSOR]
    several = tuple(axis for axis in INNER_AXES if mesh.shape[axis] > 1)
    if not several:
        return WHOLE

    def gather(part: str, params: Params) -> Params:
        whole = part in _VOCABULARY

        def leaf_of(leaf, spec):
            # In a loop over layers the leading axis is gone.
            axes = tuple(spec)[len(spec) - leaf.ndim :]
            return _gather(leaf, axes, INNER_AXES if whole else (FSDP,))

        return jax.tree.map(leaf_of, params, specs[part])

    def share(tree):
        first = lax.axis_index(TENSOR)

        def own(leaf_BR):
            part = leaf_BR.shape[1] // tensor
            return lax.dynamic_slice_in_dim(leaf_BR, first * part, part, axis=1)

        return jax.tree.map(own, tree) if tensor > 1 else tree

    return Layout(
        gather=gather,
        parts=tensor,
        sum_parts=lambda x: lax.psum(x, TENSOR) if tensor > 1 else x,
        share=share,
        total=lambda x: lax.psum(x, several),
    )


def _gather(leaf: jax.Array, axes: tuple, names: tuple[str, ...]) -> jax.Array:
    """The array whole along the mesh axes `names`; its transpose scatters the sum of gradients."""
    for axis, cut in enumerate(axes):
        over = tuple(name for name in _names(cut) if name in names)
        if over:
            leaf = lax.all_gather(leaf, over, axis=axis, tiled=True)
    return checkpoint_name(leaf, GATHERED)


def _names(cut: Any) -> tuple[str, ...]:
    return cut if isinstance(cut, tuple) else (cut,) if cut else ()


def student_loss(
    model: DecoderConfig, config: TrainConfig, trained: Params, base: Params, mesh: Mesh
) -> tuple[LossFunction, Params, tuple[Params, ...]]:
    """(loss, specs, frozen_specs) of the student's training, as `make_sharded_step` takes them.

    trained, base: parameters or their shapes; base is what the adapters of LoRA stand beside, {}
    without. The loss takes it in `compute_dtype`.
    """
    specs, base_specs = parameter_specs(trained, mesh), parameter_specs(base, mesh)
    if config.lora is None:
        layout = chip_layout(specs, mesh)
        loss = functools.partial(response_loss, model, config.recompute, layout=layout)
        return cast_loss(loss, config.compute_dtype), specs, ()
    layout = chip_layout(with_adapters(base_specs, specs), mesh)
    adapted = replace(model, lora_scale=config.lora.alpha / config.lora.rank)
    loss = functools.partial(adapter_loss, adapted, config.recompute, layout=layout)
    return cast_loss(loss, config.compute_dtype), specs, (base_specs,)


def batch_spec(mesh: Mesh, leading: int = 0) -> PartitionSpec:
    """Of a batch of all workers [W, ..., B, T]: rows are dealt over `fsdp`.

    leading: axes between W and B.
    """
    fsdp = (FSDP,) if mesh.shape[FSDP] > 1 else ()
    return PartitionSpec(WORKER, *(None for _ in range(leading)), *fsdp)


def make_sharded_step(
    loss: LossFunction,
    optimiser: optax.GradientTransformation,
    mixing: MixingTransformation,
    mesh: Mesh,
    specs: Params,
    accumulate: int = 1,
    frozen_specs: tuple[Params, ...] = (),
) -> TrainStep:
    """`train_step(state, batch, round, *frozen)` of all workers at once: leaves lead with axis W.

    loss: of one chip's shards and rows, the mean over the worker; see `chip_layout`. mixing: built
    on an exchange with `INNER_AXES`. specs: of the parameters. accumulate: A; beyond 1 the leaves
    of a batch are [W, A, B, ...], see `step.make_train_step`. frozen_specs: how the loss's frozen
    arguments, which have no axis W, are cut among a worker's chips. To be compiled by
    `on_sharded_mesh`.
    """
    rows_spec = batch_spec(mesh, leading=int(accumulate > 1))
    gradient_of = jax.value_and_grad(loss, has_aux=True)
    if accumulate > 1:
        gradient_of = accumulated(gradient_of)
    params_W = _all_workers(specs)
    mix = sharded_mixing(mixing, mesh, specs)

    def gradients_of(params: Params, batch: Any, *frozen: Params):
        def one_chip(params, batch, *frozen):
            return _row(gradient_of(*_own((params, batch)), *frozen))

        scalars = PartitionSpec(WORKER)
        return jax.shard_map(
            one_chip,
            mesh=mesh,
            in_specs=(params_W, rows_spec, *frozen_specs),
            out_specs=((scalars, scalars), params_W),
        )(params, batch, *frozen)

    def train_step(
        state: TrainState, batch: Any, round: Round, *frozen: Params
    ) -> tuple[TrainState, StepMetrics]:
        at = jax.vmap(mixing.evaluate_at)(state.params, state.mix_state)
        (loss_W, weight_W), gradients = gradients_of(at, batch, *frozen)
        updates, opt_state = jax.vmap(optimiser.update)(gradients, state.opt_state, at)
        params, mix_state = mix(updates, state.mix_state, state.params, round)
        norm_W = jax.vmap(optax.tree.norm)(gradients)
        return TrainState(params, opt_state, mix_state), StepMetrics(loss_W, weight_W, norm_W)

    return train_step


def sharded_mixing(mixing: MixingTransformation, mesh: Mesh, specs: Params):
    """`mixing.update` of all workers at once: their updates, state, parameters and the round."""
    params_W = _all_workers(specs)

    def mix(updates: Any, mix_state: Any, params: Any, round: Round):
        own_state, own_params = _shapes_of_one((mix_state, params))
        state_W = _all_workers(specs_like(own_state, own_params, specs))
        # A round that is known while the program is traced must stay so; another is an argument.
        rounds = (round,) if isinstance(round.branch_K, jax.Array) else ()

        def one_chip(updates, mix_state, params, *rounds):
            (own_round,) = rounds or (round,)
            updates, mix_state, params = _own((updates, mix_state, params))
            return _row(mixing.update(updates, mix_state, params, own_round))

        return jax.shard_map(
            one_chip,
            mesh=mesh,
            in_specs=(params_W, state_W, params_W, *(PartitionSpec() for _ in rounds)),
            out_specs=(params_W, state_W),
        )(updates, mix_state, params, *rounds)

    return mix


def sharded_losses(
    loss: LossFunction, mesh: Mesh, specs: Params, frozen_specs: tuple[Params, ...] = ()
):
    """(params, batch, *frozen) of all workers -> their losses, float32[W]. loss, frozen_specs: as
    of `make_sharded_step`."""

    def one_chip(params, batch, *frozen):
        mean, _ = loss(*_own((params, batch)), *frozen)
        return mean[None]

    return jax.shard_map(
        one_chip,
        mesh=mesh,
        in_specs=(_all_workers(specs), batch_spec(mesh), *frozen_specs),
        out_specs=PartitionSpec(WORKER),
    )


def on_sharded_mesh(step: TrainStep, mesh: Mesh, state: TrainState, specs: Params):
    """`step` compiled, its state donated and laid out as `state_shardings` says."""
    shardings = state_shardings(state, mesh, specs), per_worker(mesh)
    options = compiler_options(mesh)
    return jax.jit(step, out_shardings=shardings, donate_argnums=(0,), compiler_options=options)


def state_shardings(
    state: TrainState, mesh: Mesh, specs: Params, by_worker: bool = True
) -> TrainState:
    """Where each leaf [W, ...] of a state of all workers lies. state: or its shapes.

    by_worker: False for a state of other workers than the mesh has; each chip then has its part of
    all of them.
    """
    own = _shapes_of_one(state)
    first = WORKER if by_worker else None
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, PartitionSpec(first, *spec)),
        specs_like(own, own.params, specs),
        is_leaf=_is_spec,
    )


def all_workers(specs: Params, mesh: Mesh) -> Params:
    """Where the parameters [W, ...] of all workers lie."""
    return every_worker(_all_workers(specs), mesh)


def every_worker(specs: Params, mesh: Mesh) -> Params:
    """Where parameters lie that each worker has a copy of, cut among its chips by `specs`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def _shapes_of_one(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)


def _all_workers(specs: Any) -> Any:
    return jax.tree.map(lambda spec: PartitionSpec(WORKER, *spec), specs, is_leaf=_is_spec)


def _own(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _row(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), tree)
