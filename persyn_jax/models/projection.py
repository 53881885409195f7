"""The matrix product of activations with a kernel, and its form for the few rows of decoding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# project(x[..., in], kernel [out, in], dtype) -> [..., out]. dtype: of sums and result; None: that
# of the operands.
Project = Callable[[jax.Array, jax.Array, Any], jax.Array]

_FEW = range(2, 33)
"""Rows that `project_few` multiplies its own way. One row is read as fast by XLA's own product, and
64 rows take as long as it takes to pack the kernel for them."""


def project(x: jax.Array, kernel: jax.Array, dtype: Any = None) -> jax.Array:
    """x[..., in] times kernel [out, in] -> [..., out]: both contract their last axis."""
    axes = (((x.ndim - 1,), (1,)), ((), ()))
    return _cotangent_first(jax.lax.dot_general(x, kernel, axes, preferred_element_type=dtype))


@jax.custom_vjp
def _cotangent_first(y: jax.Array) -> jax.Array:
    """y. On its way back, the cotangent is there before anything is multiplied with it.

    On CPU, XLA else fuses what makes it with how it is turned for the kernel's gradient, and then
    does both entry by entry: a step of training takes 1.08 times as long (JAX 0.12).
    """
    return y


def _forward(y: jax.Array) -> tuple[jax.Array, None]:
    return y, None


def _backward(_: None, dy: jax.Array) -> tuple[jax.Array]:
    barrier = jax.lax.optimization_barrier
    return (jax.lax.platform_dependent(dy, cpu=barrier, default=lambda dy: dy),)


_cotangent_first.defvjp(_forward, _backward)


def project_few(x: jax.Array, kernel: jax.Array, dtype: Any = None) -> jax.Array:
    """`project` for a program that is bound by reading its kernels: equal to rounding.

    On CPU, XLA packs a kernel in each call before it multiplies, which for a few rows takes as long
    as the multiplying. A fused multiply and reduce reads it once, as it lies: whole decoding steps
    take 0.6 to 0.7 of the time with 8 rows, 0.8 with 32. There is no fast gradient.
    """
    rows = x.size // x.shape[-1]
    if rows not in _FEW:
        return project(x, kernel, dtype)

    def reduced(x: jax.Array, kernel: jax.Array) -> jax.Array:
        # Measured, with JAX 0.10 and 0.12: without these barriers a step takes 1.2 to 1.7 times as
        # long, with that of the result alone up to 5 times; with x as the first factor, as long as
        # with XLA's product.
        x_RI, kernel_OI = jax.lax.optimization_barrier((x.reshape(rows, -1), kernel))
        product_ROI = kernel_OI[None].astype(jnp.float32) * x_RI[:, None].astype(jnp.float32)
        y_RO = jnp.sum(product_ROI, axis=-1).astype(dtype or x.dtype)
        return jax.lax.optimization_barrier(y_RO).reshape(*x.shape[:-1], -1)

    def multiplied(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return project(x, kernel, dtype)

    return jax.lax.platform_dependent(x, kernel, cpu=reduced, default=multiplied)
