"""What parameters look like while they travel."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def encode(leaf: jax.Array, dtype: Any) -> Any:
    """The message for `leaf`: a tree of arrays to be sent.

    dtype: None sends the leaf as it is, `jnp.bfloat16` rounds it, `jnp.int8` sends each row (last
    axis) as whole multiples of a float32 scale, its largest magnitude / 127. Vectors are few and
    delicate: int8 sends them as they are.
    """
    if dtype is None or (_is_int8(dtype) and leaf.ndim < 2):
        return leaf
    if not _is_int8(dtype):
        return leaf.astype(dtype)
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    scale = (jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127).astype(jnp.float32)
    steps = wide / jnp.where(scale > 0, scale, 1)
    return jnp.round(steps).astype(jnp.int8), scale


def decode(message: Any, wide: Any) -> jax.Array:
    """What the receiver reads, in the dtype `wide`."""
    if isinstance(message, tuple):
        steps, scale = message
        return times(scale.astype(wide), steps.astype(wide))
    return message.astype(wide)


def times(weight: jax.Array, leaf: jax.Array) -> jax.Array:
    """weight * leaf, rounded, for a weight that is never negative; 0 for weight 0, even of NaN.

    XLA turns product and sum into one fused multiply-add in some layouts and not in others. Going
    through integers, by an exclusive or with a zero that the compiler cannot know to be one, keeps
    the product a product: the result is bitwise the same in all layouts, and that of NumPy.
    """
    product = jnp.where(weight > 0, weight * leaf, 0).astype(leaf.dtype)
    integer = jnp.int64 if leaf.dtype.itemsize == 8 else jnp.int32
    zero = (weight < 0).astype(integer)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(product, integer) ^ zero, leaf.dtype)


def rounded(leaf: jax.Array, dtype: Any) -> jax.Array:
    """`leaf` as a receiver reads it, in its own dtype."""
    return decode(encode(leaf, dtype), jnp.promote_types(leaf.dtype, jnp.float32)).astype(
        leaf.dtype
    )


def wire_bytes(shape: tuple[int, ...], dtype: Any, travels_as: Any) -> int:
    """Bytes of one message for an array of this shape and dtype."""
    message = jax.eval_shape(
        lambda leaf: encode(leaf, travels_as), jax.ShapeDtypeStruct(shape, dtype)
    )
    return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(message))


def _is_int8(dtype: Any) -> bool:
    return jnp.dtype(dtype) == jnp.int8
