"""What the backward pass computes again instead of keeping it. Light: imports no JAX by itself."""

from collections.abc import Callable
from typing import Literal

Recompute = Literal["nothing", "layers", "dots"]
"""`nothing`: every activation is kept. `layers`: only what enters a layer is kept (a third more
work). `dots`: what matrix products of a layer give is kept, the rest is computed again (on CPU no
slower than `nothing`, with three quarters of its memory)."""


def remat(function: Callable, policy: Recompute) -> Callable:
    """`function`, one layer, as its gradient under `policy` wants it. Values stay the same."""
    import jax

    if policy == "nothing":
        return function
    if policy == "layers":
        return jax.checkpoint(function)
    # Attention scores come from a product with batch axes: they are the large ones, so not kept.
    kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(function, policy=kept)
