"""One decoder-only transformer, by configuration: training, cached decode and scoring share it.

Parameters are a plain pytree::

    {"embed": {"embedding": [V, D]}, "layers": ..., "final_norm": {"scale": [D]},
     "head": {"kernel": [V, D]}}

`head` is absent when the embeddings are tied. `layers` is either one dict whose leaves carry a
leading axis L (a *stack*: scanned, compiles fast, few leaves to mix) or a tuple of L dicts
(*unrolled*: no layer is copied out of a stack, which decides the speed of decoding on CPU). Each
layer has::

    {"attention_norm": {"scale": [D]}, "mlp_norm": {"scale": [D]},
     "q": {"kernel": [H E, D]}, "k": {"kernel": [K E, D]}, "v": {"kernel": [K E, D]},
     "o": {"kernel": [D, H E]},
     "gate": {"kernel": [F, D]}, "up": {"kernel": [F, D]}, "down": {"kernel": [D, F]}}

and, if the config says so, a `bias` beside the kernels of q, k and v, `q_norm` and `k_norm` with a
`scale` [E], `post_attention_norm` and `post_mlp_norm` with a `scale` [D]. Any of the seven may hold
a LoRA adapter too, `lora_a` [r, in] and `lora_b` [out, r]. Every kernel is stored [out, in], so
that the tied embedding serves as head.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from persyn_jax.models.attention import Array, Attend, AttentionRule, attend_causally, soft_capped
from persyn_jax.models.layout import GATHERED, WHOLE, Layout
from persyn_jax.models.projection import Project, project
from persyn_jax.models.recompute import Recompute, remat
from persyn_jax.models.rope import RopeScaling, Turns, make_turns, rotary_frequencies, rotate

__all__ = [
    "Array",
    "Attend",
    "AttentionRule",
    "DecoderConfig",
    "Params",
    "RopeScaling",
    "attend_causally",
    "hidden_states",
    "init",
    "logits",
    "unroll",
]

Params = dict[str, Any]

_EVERYTHING = 1 << 30  # as a window


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
    lora_scale: float = 1.0
    """Multiplies what adapters add; without adapters it means nothing."""

    def is_local(self, layer: int) -> bool:
        """Whether the layer sees a window only."""
        return self.local_layers[layer] if self.local_layers else self.window is not None


class RMSNorm(nn.Module):
    """x / rms(x) * (scale + offset), computed in float32 (arXiv 1910.07467)."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.constant(1 - self.offset), (x.shape[-1],))
        if self.offset:
            scale = scale.astype(jnp.float32) + self.offset
        x32 = x.astype(jnp.float32)
        square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(square + self.eps)
        return (normed * _last_axis(scale, x.ndim)).astype(x.dtype)


class Dense(nn.Module):
    """x @ kernel.T (+ bias) with the kernel stored [out, in], and what an adapter adds.

    The adapter (LoRA, arXiv 2106.09685) is there if the parameters hold one.
    """

    features: int
    bias: bool = False
    lora_scale: float = 1.0
    project: Project = project

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)
        y = self.project(x, self.param("kernel", init, (self.features, x.shape[-1])), None)
        if self.bias:
            y += _last_axis(self.param("bias", nn.initializers.zeros, (self.features,)), y.ndim)
        if self.has_variable("params", "lora_a"):
            reduce, expand = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
            reduced = self.project(x, reduce, None)
            y += self.project(reduced, expand, None) * self.lora_scale
        return y


class LayerKind(NamedTuple):
    """In what local layers may differ from the others."""

    turns: Turns
    window: int | jax.Array | None


def _layer_kind(c: DecoderConfig, positions_BT: Array, local: bool) -> LayerKind:
    if local and c.local_rope_theta is not None:
        rotation = rotary_frequencies(c.head_dim, c.local_rope_theta, None)
    else:
        rotation = rotary_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
    return LayerKind(make_turns(positions_BT, rotation), c.window if local else None)


class Layer(nn.Module):
    """Pre-norm attention and gated feed-forward. What the queries look at is `attend`'s."""

    config: DecoderConfig
    sum_parts: Callable[[jax.Array], jax.Array] = WHOLE.sum_parts
    """Where `config` has one chip's heads and features: sums over those chips."""
    project: Project = project
    """Multiplies with the kernels."""

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        kind: LayerKind,
        attend: Attend,
        memory: Any,
    ) -> tuple[jax.Array, Any]:
        c = self.config
        B, T, _ = x_BTD.shape

        def norm(name: str, x: jax.Array) -> jax.Array:
            return RMSNorm(c.norm_eps, c.norm_offset, name=name)(x)

        def dense(name: str, features: int, x: jax.Array, bias: bool = False) -> jax.Array:
            return Dense(features, bias, c.lora_scale, self.project, name=name)(x)

        def heads(name: str, count: int, h_BTD: jax.Array) -> jax.Array:
            flat = dense(name, count * c.head_dim, h_BTD, c.attention_bias)
            return flat.reshape(B, T, count, c.head_dim)

        def turned(name: str, count: int, h_BTD: jax.Array) -> jax.Array:
            x_BTHE = heads(name, count, h_BTD)
            x_BTHE = norm(f"{name}_norm", x_BTHE) if c.qk_norm else x_BTHE
            return rotate(x_BTHE, kind.turns)

        h_BTD = norm("attention_norm", x_BTD)
        q_BTHE, k_BTKE = turned("q", c.heads, h_BTD), turned("k", c.kv_heads, h_BTD)
        v_BTKE = heads("v", c.kv_heads, h_BTD)
        scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
        rule = AttentionRule(scale, c.attention_softcap, kind.window)
        out_BTHE, memory = attend(q_BTHE, k_BTKE, v_BTKE, rule, memory)
        added_BTD = self.sum_parts(dense("o", c.d_model, out_BTHE.reshape(B, T, -1)))
        x_BTD = x_BTD + (norm("post_attention_norm", added_BTD) if c.post_norms else added_BTD)
        h_BTD = norm("mlp_norm", x_BTD)
        activation = nn.silu if c.activation == "silu" else nn.gelu  # nn.gelu is the tanh form
        gated = activation(dense("gate", c.d_ff, h_BTD)) * dense("up", c.d_ff, h_BTD)
        added_BTD = self.sum_parts(dense("down", c.d_model, gated))
        return x_BTD + (norm("post_mlp_norm", added_BTD) if c.post_norms else added_BTD), memory


def _last_axis(vector: jax.Array, ndim: int) -> jax.Array:
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def init(config: DecoderConfig, key: jax.Array) -> Params:
    """Random parameters, float32, layers stacked."""
    embed_key, head_key, layer_key = jax.random.split(key, 3)

    def attend(q, k, v, rule, memory):  # shapes are all that initialising needs
        return q, memory

    def init_layer(key):
        x_BTD, positions_BT = jnp.zeros((1, 1, config.d_model)), jnp.zeros((1, 1), jnp.int32)
        kind = _layer_kind(config, positions_BT, False)
        return Layer(config).init(key, x_BTD, kind, attend, None)["params"]

    shape_VD = (config.vocab_size, config.d_model)
    params = {
        "embed": {"embedding": 0.02 * jax.random.normal(embed_key, shape_VD)},
        "layers": jax.vmap(init_layer)(jax.random.split(layer_key, config.layers)),
        "final_norm": {"scale": jnp.full(config.d_model, 1 - config.norm_offset, jnp.float32)},
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
    project: Project = project,
) -> tuple[jax.Array, Any]:
    """Runs the decoder up to and with its final norm.

    tokens_BT, positions_BT: int32. memory: what `attend` of each layer gets, a tuple of L, or None;
    only unrolled layers take one. recompute: what the backward pass of a stack computes again.
    layout: how chips share the work, inside a `shard_map`. project: multiplies with the kernels.
    Returns (hidden_BTD, what `attend` of each layer returned as its memory).
    Raises ValueError for stacked layers with a memory.
    """
    chex.assert_equal_shape([tokens_BT, positions_BT])
    chex.assert_type([tokens_BT, positions_BT], jnp.int32)
    stacked = not isinstance(params["layers"], tuple)
    if stacked and memory is not None:
        raise ValueError("stacked layers take no memory: unroll the parameters first")

    layer = Layer(_of_one_chip(config, layout.parts), layout.sum_parts, project)

    def run_layer(x_BTD, layer_params, kind, layer_memory=None):
        return _apply(
            layer, layout.gather("layers", layer_params), x_BTD, kind, attend, layer_memory
        )

    x_BTD = layout.gather("embed", params["embed"])["embedding"][tokens_BT]
    if config.embedding_scale != 1.0:  # rounded to the parameters' dtype, as in Gemma's own code
        x_BTD = x_BTD * jnp.asarray(config.embedding_scale, x_BTD.dtype)
    local = [config.is_local(i) for i in range(config.layers)]
    # Sines are made once for all layers of a kind, on the way forward and back.
    kinds = {
        is_local: _layer_kind(config, positions_BT, is_local) for is_local in sorted(set(local))
    }
    if stacked:
        again = functools.partial(_remat, recompute=recompute, gathers=layout is not WHOLE)
        x_BTD = _scan_layers(run_layer, x_BTD, params["layers"], local, kinds, again)
    elif memory is None:
        for layer_params, is_local in zip(params["layers"], local, strict=True):
            x_BTD, _ = run_layer(x_BTD, layer_params, kinds[is_local])
    else:
        after = []
        for layer_params, is_local, own in zip(params["layers"], local, memory, strict=True):
            x_BTD, layer_memory = run_layer(x_BTD, layer_params, kinds[is_local], own)
            after.append(layer_memory)
        memory = tuple(after)
    final_norm = RMSNorm(config.norm_eps, config.norm_offset)
    return _apply(final_norm, params["final_norm"], x_BTD), memory


def _scan_layers(
    run_layer: Callable,
    x_BTD: jax.Array,
    stack: Params,
    local: list[bool],
    kinds: dict[bool, LayerKind],
    again: Callable,
) -> jax.Array:
    """again: makes of one layer's function what the backward pass wants of it."""
    if len(kinds) == 1:  # a constant: no mask that a layer does not need

        def body(x_BTD, layer_params):
            return run_layer(x_BTD, layer_params, kinds[local[0]])

        scanned = stack
    else:
        theirs, others = kinds[True], kinds[False]._replace(window=_EVERYTHING)

        def body(x_BTD, layer):
            layer_params, is_local = layer
            kind = jax.tree.map(lambda a, b: jnp.where(is_local, a, b), theirs, others)
            return run_layer(x_BTD, layer_params, kind)

        scanned = (stack, np.array(local))
    x_BTD, _ = jax.lax.scan(again(body), x_BTD, scanned)
    return x_BTD


def _remat(body: Callable, recompute: Recompute, gathers: bool) -> Callable:
    if recompute == "nothing" and gathers:  # one layer's parameters at a time, not all that ran
        kept = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
        return jax.checkpoint(body, policy=kept)
    return remat(body, recompute)


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


def logits(
    config: DecoderConfig, params: Params, hidden: jax.Array, project: Project = project
) -> jax.Array:
    """hidden [..., D] -> float32 logits [..., V], also of bfloat16 parameters."""
    found = project(hidden, head_kernel(params), jnp.float32)
    return soft_capped(found, config.final_softcap)
