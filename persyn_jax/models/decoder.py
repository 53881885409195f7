"""One decoder-only transformer, by configuration: training, cached decode and scoring share it.

Parameters are a plain pytree::

    {"embed": {"embedding": [V, D]}, "layers": ..., "final_norm": {"scale": [D]},
     "head": {"kernel": [V, D]}}

`head` is absent when the embeddings are tied. `layers` is either one dict whose leaves carry a
leading axis L (a *stack*: scanned, compiles fast, few leaves to mix) or a tuple of L dicts
(*unrolled*: no layer is copied out of a stack, which decides the speed of decoding on CPU). Every
kernel is stored [out, in], so that the tied embedding serves as head.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from persyn_jax.models.recompute import Recompute, remat

Params = dict[str, Any]
Array = jax.Array | np.ndarray  # NumPy on the host, JAX inside a program
# attend(query_BTHE, key_BTKE, value_BTKE, memory) -> (out_BTHE, memory): what a layer's queries
# look at. `memory` is the layer's key-value cache where there is one, else None.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for positions beyond those of pre-training."""

    kind: Literal["linear", "llama3", "longrope"]
    factor: float = 1.0
    """Of `linear` and `llama3`: by how much low frequencies are divided."""
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192
    """Of `llama3`, where its two factors are counted from."""
    short_factors: tuple[float, ...] = ()
    """Of `longrope`: what divides each of the E/2 frequencies up to the original positions."""
    long_factors: tuple[float, ...] = ()
    """Of `longrope`, beyond them; kept to be written out again: rows never get that long here."""
    attention_factor: float = 1.0
    """Of `longrope`: multiplies sine and cosine."""


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder, and in what it differs from Llama's."""

    vocab_size: int
    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    max_positions: int
    family: Literal["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"] = "llama"
    """What files call it (`model_type`); only reading and writing them asks."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_bias: bool = False
    """q, k and v have a bias (Qwen 2.5)."""
    qk_norm: bool = False
    """Queries and keys are normalised head by head, before they are rotated (Qwen 3, Gemma 3)."""
    post_norms: bool = False
    """What attention and feed-forward return is normalised too (Gemma)."""
    norm_offset: float = 0.0
    """Added to every norm's scale (Gemma: 1)."""
    embedding_scale: float = 1.0
    """Multiplies embeddings (Gemma: the square root of D)."""
    query_scale: float | None = None
    """Multiplies queries; null: one over the square root of E."""
    attention_softcap: float | None = None
    """c: attention scores s become c tanh(s / c) (Gemma 2)."""
    final_softcap: float | None = None
    """The same of the logits."""
    window: int | None = None
    """How many tokens a local layer sees, itself included."""
    local_layers: tuple[bool, ...] = ()
    """Which of the L layers are local; empty: all, if there is a window."""
    rope_scaling: RopeScaling | None = None
    """Of layers that are not local."""
    local_rope_theta: float | None = None
    """Of local layers, unscaled; null: they do as the others (Gemma 3: 10000)."""


class Layout(NamedTuple):
    """How the chips of a mesh share a decoder's parameters and work; `training.sharded` makes them.

    Parameters arrive as each chip holds them. Batches are the chip's own rows.
    """

    gather: Callable[[str, Params], Params]
    """(part, parameters) -> the parameters that this chip works with; of `layers`, one layer's."""
    parts: int
    """Among how many chips heads and feed-forward features are divided."""
    sum_parts: Callable[[jax.Array], jax.Array]
    """Sums what those chips contribute to a layer's output."""
    share: Callable[[Any], Any]
    """This chip's share of arrays [B, R] that those chips all hold."""
    total: Callable[[jax.Array], jax.Array]
    """Sums over all chips that work on one batch."""


WHOLE = Layout(
    gather=lambda part, params: params,
    parts=1,
    sum_parts=lambda x: x,
    share=lambda tree: tree,
    total=lambda x: x,
)
"""One chip has it all."""


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32 (arXiv 1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        scale_D = self.param("scale", nn.initializers.ones, (x_BTD.shape[-1],))
        x32_BTD = x_BTD.astype(jnp.float32)
        square_BT1 = jnp.mean(x32_BTD * x32_BTD, axis=-1, keepdims=True)
        normed_BTD = x32_BTD * jax.lax.rsqrt(square_BT1 + self.eps)
        return (normed_BTD * scale_D[None, None]).astype(x_BTD.dtype)


class Dense(nn.Module):
    """x @ kernel.T with the kernel stored [out, in]."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)
        kernel = self.param("kernel", init, (self.features, x.shape[-1]))
        return project(x, kernel)


class Layer(nn.Module):
    """Pre-norm attention and gated feed-forward. What the queries look at is `attend`'s."""

    config: DecoderConfig
    sum_parts: Callable[[jax.Array], jax.Array] = WHOLE.sum_parts
    """Where `config` has one chip's heads and features: sums over those chips."""

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, attend: Attend, memory: Any
    ) -> tuple[jax.Array, Any]:
        c = self.config
        B, T, _ = x_BTD.shape

        def heads(name: str, count: int, h_BTD: jax.Array) -> jax.Array:
            return Dense(count * c.head_dim, name=name)(h_BTD).reshape(B, T, count, c.head_dim)

        h_BTD = RMSNorm(c.norm_eps, name="attention_norm")(x_BTD)
        q_BTHE = rotate(heads("q", c.heads, h_BTD), positions_BT, c.rope_theta)
        k_BTKE = rotate(heads("k", c.kv_heads, h_BTD), positions_BT, c.rope_theta)
        v_BTKE = heads("v", c.kv_heads, h_BTD)
        out_BTHE, memory = attend(q_BTHE, k_BTKE, v_BTKE, memory)
        out_BTD = Dense(c.d_model, name="o")(out_BTHE.reshape(B, T, -1))
        x_BTD = x_BTD + self.sum_parts(out_BTD)
        h_BTD = RMSNorm(c.norm_eps, name="mlp_norm")(x_BTD)
        gated = nn.silu(Dense(c.d_ff, name="gate")(h_BTD)) * Dense(c.d_ff, name="up")(h_BTD)
        return x_BTD + self.sum_parts(Dense(c.d_model, name="down")(gated)), memory


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x[..., in] times kernel [out, in] -> [..., out]: both contract their last axis."""
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ())))


def rotate(x_BTHE: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, rotate-half form (RoFormer, as in Llama's Hugging Face code)."""
    half = x_BTHE.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_BTF = positions_BT[:, :, None].astype(jnp.float32) * frequencies[None, None]
    angles_BT1F = angles_BTF[:, :, None]
    cos, sin = jnp.cos(angles_BT1F), jnp.sin(angles_BT1F)
    x1, x2 = x_BTHE[..., :half], x_BTHE[..., half:]
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return rotated.astype(x_BTHE.dtype)


def init(config: DecoderConfig, key: jax.Array) -> Params:
    """Random parameters, float32, layers stacked."""
    embed_key, head_key, layer_key = jax.random.split(key, 3)

    def attend(q, k, v, memory):  # shapes are all that initialising needs
        return q, memory

    def init_layer(key):
        x_BTD, positions_BT = jnp.zeros((1, 1, config.d_model)), jnp.zeros((1, 1), jnp.int32)
        return Layer(config).init(key, x_BTD, positions_BT, attend, None)["params"]

    shape_VD = (config.vocab_size, config.d_model)
    params = {
        "embed": {"embedding": 0.02 * jax.random.normal(embed_key, shape_VD)},
        "layers": jax.vmap(init_layer)(jax.random.split(layer_key, config.layers)),
        "final_norm": {"scale": jnp.ones(config.d_model)},
    }
    if not config.tied_embeddings:
        params["head"] = {"kernel": 0.02 * jax.random.normal(head_key, shape_VD)}
    return params


def unroll(params: Params) -> Params:
    """The same parameters with `layers` as a tuple of L dicts."""
    stack = params["layers"]
    depth = jax.tree.leaves(stack)[0].shape[0]
    layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(depth))
    return params | {"layers": layers}


def hidden_states(
    config: DecoderConfig,
    params: Params,
    tokens_BT: Array,
    positions_BT: Array,
    attend: Attend,
    memory: Any = None,
    recompute: Recompute = "nothing",
    layout: Layout = WHOLE,
) -> tuple[jax.Array, Any]:
    """Runs the decoder up to and with its final norm.

    tokens_BT, positions_BT: int32. memory: what `attend` of each layer gets, a tuple of L, or None;
    only unrolled layers take one. recompute: let the backward pass recompute each layer of a stack
    instead of keeping its activations (a third more work, activations of one layer instead of L).
    Returns (hidden_BTD, what `attend` of each layer returned as its memory).
    Raises ValueError for stacked layers with a memory.
    """
    chex.assert_equal_shape([tokens_BT, positions_BT])
    chex.assert_type([tokens_BT, positions_BT], jnp.int32)
    stacked = not isinstance(params["layers"], tuple)
    if stacked and memory is not None:
        raise ValueError("stacked layers take no memory: unroll the parameters first")

    layer = Layer(_of_one_chip(config, layout.parts), layout.sum_parts)

    def run_layer(x_BTD, layer_params, layer_memory=None):
        layer_params = layout.gather("layers", layer_params)
        return _apply(layer, layer_params, x_BTD, positions_BT, attend, layer_memory)

    x_BTD = layout.gather("embed", params["embed"])["embedding"][tokens_BT]
    if stacked:
        if recompute != "nothing":
            body = remat(run_layer, recompute)
        elif layout is not WHOLE:  # what was gathered is gathered again: one layer's at a time
            body = jax.checkpoint(run_layer, policy=_KEEP_ALL_BUT_GATHERED)
        else:
            body = run_layer
        x_BTD, _ = jax.lax.scan(body, x_BTD, params["layers"])
    elif memory is None:
        for layer_params in params["layers"]:
            x_BTD, _ = run_layer(x_BTD, layer_params)
    else:
        after = []
        for layer_params, layer_memory in zip(params["layers"], memory, strict=True):
            x_BTD, layer_memory = run_layer(x_BTD, layer_params, layer_memory)
            after.append(layer_memory)
        memory = tuple(after)
    return _apply(RMSNorm(config.norm_eps), params["final_norm"], x_BTD), memory


GATHERED = "gathered"
"""`jax.ad_checkpoint.checkpoint_name` of parameters that a layout has gathered."""
_KEEP_ALL_BUT_GATHERED = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)


def _of_one_chip(config: DecoderConfig, parts: int) -> DecoderConfig:
    return replace(
        config,
        heads=config.heads // parts,
        kv_heads=config.kv_heads // parts,
        d_ff=config.d_ff // parts,
    )


def _apply(module: nn.Module, params: Params, *arguments: Any) -> Any:
    return module.apply({"params": params}, *arguments)


def head_kernel(params: Params, layout: Layout = WHOLE) -> jax.Array:
    """[V, D], what makes logits of hidden states: the head's, or the tied embeddings."""
    if "head" in params:
        return layout.gather("head", params["head"])["kernel"]
    return layout.gather("embed", params["embed"])["embedding"]


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """hidden [..., D] -> float32 logits [..., V]."""
    kernel_VD = head_kernel(params)
    return project(hidden, kernel_VD).astype(jnp.float32)


def attend_causally(segments_BT: Array) -> Attend:
    """Attention for whole rows: a token sees itself and earlier tokens of its own segment number.

    Padding carries a segment number of its own (0), so that it is seen by nobody else.
    """
    T = segments_BT.shape[1]
    causal_TT = jnp.tril(jnp.ones((T, T), bool))
    mask_B1TT = (causal_TT[None] & (segments_BT[:, :, None] == segments_BT[:, None, :]))[:, None]

    def attend(q_BTHE, k_BTKE, v_BTKE, memory):
        return jax.nn.dot_product_attention(q_BTHE, k_BTKE, v_BTKE, mask=mask_B1TT), memory

    return attend
