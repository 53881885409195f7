"""Optimisers by name, as chains of optax transformations.

Leaves are told apart by where they stand in the tree (see `models.decoder`), never by their rank:
a stack of L norms has the rank of a matrix, a stack of L matrices has not.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from persyn_jax.training.config import OptimiserConfig

_VECTORS = ("scale", "bias")
"""Names of leaves that are vectors, or stacks of vectors."""


def make_optimiser(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser of one worker for a run of `steps` steps.

    A tree of stacked layers and its unrolled twin take the same steps.
    """
    links = [_scaled_gradient(config)]
    if config.clip_norm is not None:
        links.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        links.append(optax.add_decayed_weights(config.weight_decay, mask=decays))
    return optax.chain(*links, optax.scale_by_learning_rate(learning_rate(config, steps)))


def by_part(
    optimisers: Mapping[str, optax.GradientTransformation],
) -> optax.GradientTransformation:
    """Each top-level part of a tree with an optimiser of its own, clipping included."""

    def init(params: Any) -> Any:
        return {part: one.init(params[part]) for part, one in optimisers.items()}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        own = {
            part: one.update(updates[part], state[part], params[part])
            for part, one in optimisers.items()
        }
        return {part: both[0] for part, both in own.items()}, {
            part: both[1] for part, both in own.items()
        }

    return optax.GradientTransformation(init, update)


def learning_rate(config: OptimiserConfig, steps: int) -> optax.Schedule:
    """Step number -> learning rate. Neither the first step nor the last one has rate 0.

    Of w warm-up steps, step t has (t + 1) / w of the peak; the cosine starts after them.
    """
    warmup, peak = round(config.warmup_fraction * steps), config.learning_rate
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, warmup - 1)
    after = optax.constant_schedule(peak)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), config.end_fraction)
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


def decays(params: Any) -> Any:
    """Which leaves weight decay shrinks: all but norms and biases."""
    return jax.tree.map_with_path(lambda path, _: not _is_vector(path), params)


def _scaled_gradient(config: OptimiserConfig) -> optax.GradientTransformation:
    """What the name stands for, without learning rate, sign and decay."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    match config.name:
        case "adamw":
            return adam
        case "adafactor":
            # The learning rate is the step's size: no scaling by the parameters' own size.
            return optax.chain(_factored_rms(), _clip_each_rms(1.0))
        case "muon":
            momentum = 0.95 if config.momentum is None else config.momentum
            return optax.partition({"muon": _muon(momentum), "adam": adam}, _muon_or_adam)
        case "sgd":
            return optax.trace(0.9 if config.momentum is None else config.momentum, nesterov=True)


def _factored_rms() -> optax.GradientTransformation:
    """optax's, whose `init` JAX refuses inside a shard_map: its state starts as zeros anyway."""
    factored = optax.scale_by_factored_rms()

    def init(params: Any) -> Any:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        state = jax.eval_shape(factored.init, shapes)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)

    return optax.GradientTransformation(init, factored.update)


def _muon(momentum: float) -> optax.GradientTransformation:
    """Steps as large as Adam's are: a root mean square of 0.2 (Moonlight, arXiv 2502.16982)."""

    def last_two_axes(tree: Any) -> Any:  # any other axis is a stack's
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), tree)

    def scaled(update: jax.Array) -> jax.Array:  # of an orthogonal [m, n] each entry is about
        return 0.2 * max(update.shape[-2:]) ** 0.5 * update  # 1 / sqrt(max(m, n))

    return optax.chain(
        contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=last_two_axes),
        optax.stateless(lambda updates, _: jax.tree.map(scaled, updates)),
    )


def _muon_or_adam(params: Any) -> Any:
    """Labels: Muon for the layers' matrices, Adam for embeddings, heads, norms and biases."""

    def label(path: tuple, _: Any) -> str:
        return "muon" if _key(path, 0) == "layers" and not _is_vector(path) else "adam"

    return jax.tree.map_with_path(label, params)


def _clip_each_rms(longest: float) -> optax.GradientTransformation:
    """Shortens each matrix or vector, also those of a stack, to this root mean square."""

    def shortened(path: tuple, update: jax.Array) -> jax.Array:
        axes = tuple(range(update.ndim))[-1 if _is_vector(path) else -2 :]
        rms = jnp.sqrt(jnp.mean(update * update, axis=axes, keepdims=True))
        return update / jnp.maximum(1.0, rms / longest)

    return optax.stateless(lambda updates, _: jax.tree.map_with_path(shortened, updates))


def _is_vector(path: tuple) -> bool:
    return _key(path, -1) in _VECTORS


def _key(path: tuple, place: int) -> str | None:
    return getattr(path[place], "key", None) if path else None
