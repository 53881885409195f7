"""Mixed precision: the loss computes in a short type, everything that lasts stays float32."""

from typing import Any

import jax
import jax.numpy as jnp

from persyn_jax.training.config import ComputeDtype
from persyn_jax.training.step import LossFunction


def cast_loss(loss: LossFunction, dtype: ComputeDtype) -> LossFunction:
    """`loss` at the float32 parameters rounded to `dtype`; its gradient is float32.

    So optimiser and mixing work on float32 master weights. The batch is not touched: its weights
    are counts. Nor is what is frozen, which needs no master weights: it comes in `dtype`. The loss
    itself must sum in float32, as `response_loss` does.
    """

    def cast(params: Any, batch: Any, *frozen: Any) -> tuple[jax.Array, jax.Array]:
        def rounded(leaf: jax.Array) -> jax.Array:
            return jnp.asarray(leaf, dtype) if leaf.dtype == jnp.float32 else leaf

        mean, weight = loss(jax.tree.map(rounded, params), batch, *frozen)
        return mean.astype(jnp.float32), weight

    return loss if dtype == "float32" else cast
