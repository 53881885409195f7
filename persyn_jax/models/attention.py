"""Attention over whole rows: which implementation computes it."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray  # NumPy on the host, JAX inside a program


class AttentionRule(NamedTuple):
    """What a layer's attention makes of queries and keys, whatever else hides keys from it."""

    scale: float
    """Multiplies the scores."""
    softcap: float | None = None
    """c: scores s become c tanh(s / c)."""
    window: int | jax.Array | None = None
    """How many tokens a query sees, its own included; an array in a stack whose layers differ."""


# attend(query_BTHE, key_BTKE, value_BTKE, rule, memory) -> (out_BTHE, memory): what a layer's
# queries look at. `memory` is the layer's key-value cache where there is one, else None.
Attend = Callable[[jax.Array, jax.Array, jax.Array, AttentionRule, Any], tuple[jax.Array, Any]]


def attend_causally(segments_BT: Array) -> Attend:
    """Attention for whole rows: a token sees itself and earlier tokens of its own segment number.

    Padding carries a segment number of its own (0), so that it is seen by nobody else.
    """
    T = segments_BT.shape[1]
    causal_TT = jnp.tril(jnp.ones((T, T), bool))
    mask_B1TT = (causal_TT[None] & (segments_BT[:, :, None] == segments_BT[:, None, :]))[:, None]

    def attend(q_BTHE, k_BTKE, v_BTKE, rule, memory):
        seen_B1TT = mask_B1TT
        if rule.window is not None:
            place_T = jnp.arange(T)
            near_TT = place_T[:, None] - place_T[None, :] < rule.window
            seen_B1TT = seen_B1TT & near_TT[None, None]
        return _attention(q_BTHE, k_BTKE, v_BTKE, seen_B1TT, rule), memory

    return attend


def _attention(
    q_BTHE: jax.Array,
    k_BTKE: jax.Array,
    v_BTKE: jax.Array,
    seen_B1TT: jax.Array,
    rule: AttentionRule,
) -> jax.Array:
    if rule.softcap is None:
        implementation = _implementation(q_BTHE)
        return jax.nn.dot_product_attention(
            q_BTHE,
            k_BTKE,
            v_BTKE,
            mask=seen_B1TT,
            scale=rule.scale,
            # The mask says so already; cuDNN leaves out what it need not compute.
            is_causal=implementation == "cudnn",
            implementation=implementation,
        )
    B, T, H, E = q_BTHE.shape
    K = k_BTKE.shape[2]
    q_BTKGE = q_BTHE.reshape(B, T, K, H // K, E)
    scores_BKGTS = rule.scale * jnp.einsum(
        "BTKGE,BSKE->BKGTS", q_BTKGE, k_BTKE, preferred_element_type=jnp.float32
    )
    scores_BKGTS = soft_capped(scores_BKGTS, rule.softcap)
    scores_BKGTS = jnp.where(seen_B1TT[:, :, None], scores_BKGTS, -jnp.inf)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS).astype(v_BTKE.dtype)
    return jnp.einsum("BKGTS,BSKE->BTKGE", weights_BKGTS, v_BTKE).reshape(B, T, H, E)


def soft_capped(x: jax.Array, cap: float | None) -> jax.Array:
    """cap tanh(x / cap): about x while it is small, never beyond `cap`. None: x."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _implementation(q_BTHE: jax.Array) -> Literal["cudnn"] | None:
    """cuDNN's flash attention where it takes the shapes: it never holds [B, H, T, T] scores."""
    _, T, _, E = q_BTHE.shape
    half_precision = q_BTHE.dtype in (jnp.bfloat16, jnp.float16)
    takes_shapes = E % 8 == 0 and E <= 128 and T % 2 == 0
    return "cudnn" if jax.default_backend() == "gpu" and half_precision and takes_shapes else None
