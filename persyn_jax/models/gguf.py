"""GGUF files as decoders: what each architecture's metadata and tensors mean.

Conventions are llama.cpp's (its converter and the graphs under src/models), where they leave the
metadata silent too; a model is the same here whether it came from a GGUF file or from the Hugging
Face folder that the file was made of.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.models.decoder import DecoderConfig
from persyn_jax.models.file_checks import positive_float, positive_int, shown
from persyn_jax.models.gguf_file import GgufFile, Tensor, read
from persyn_jax.models.rope import RopeScaling, rotary_frequencies

__all__ = ["GgufFile", "decoder_config", "parameter_names", "parameters_only", "read"]

FAMILIES: tuple[str, ...] = get_args(get_type_hints(DecoderConfig)["family"])

# They are in the config, as `rope_scaling`.
_ROPE_TABLES = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


@dataclass(frozen=True)
class _Metadata:
    """A file's metadata under its architecture's name."""

    file: GgufFile
    family: str

    def value(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.family}.{key}")

    def given(self, key: str) -> bool:
        """Whether it is there and not 0, which stands for none."""
        value = self.value(key)
        return value is not None and not (isinstance(value, int | float) and value == 0)

    def whole(self, key: str, default: int | None = None, most: int = 1 << 20) -> int:
        return positive_int(self._value_or(key, default), self._where(key), most)

    def number(self, key: str, default: float | None = None) -> float:
        """Of a float32 the shortest decimal: 1e-6 and not 9.999999974752427e-07."""
        where = self._where(key)
        found = positive_float(self._value_or(key, default), where)
        return positive_float(float(str(np.float32(found))), where)

    def _value_or(self, key: str, default: Any) -> Any:
        value = self.value(key)
        found = default if value is None else value
        if found is None:
            raise ConfigError(f"{self._where(key)} is missing")
        return found

    def _where(self, key: str) -> str:
        return f"{self.file.path}: metadata '{self.family}.{key}'"


def decoder_config(file: GgufFile) -> DecoderConfig:
    """The decoder's shape. Raises ConfigError for what is missing, impossible or not supported."""
    family = file.get("general.architecture")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(
            f"{file.path}: architecture {shown(family)}; supported from GGUF: "
            + ", ".join(map(repr, FAMILIES))
        )
    m = _Metadata(file, family)
    d_model, heads = m.whole("embedding_length"), m.whole("attention.head_count")
    head_dim = m.whole("attention.key_length", default=max(d_model // heads, 1))
    for key in ("rope.dimension_count", "attention.value_length"):
        if (found := m.whole(key, default=head_dim)) != head_dim:
            raise ConfigError(
                f"{file.path}: metadata '{family}.{key}' is {found}; supported: the width of a "
                f"head, {head_dim}"
            )
    theta = m.number("rope.freq_base", default=10000.0 if family == "gemma2" else None)
    plain = DecoderConfig(
        vocab_size=file.find("token_embd.weight").shape[0],
        layers=m.whole("block_count", most=1 << 12),
        d_model=d_model,
        d_ff=m.whole("feed_forward_length"),
        heads=heads,
        kv_heads=m.whole("attention.head_count_kv", default=heads),
        head_dim=head_dim,
        rope_theta=theta,
        norm_eps=m.number("attention.layer_norm_rms_epsilon"),
        tied_embeddings="output.weight" not in file.tensors,
        max_positions=m.whole("context_length", most=1 << 30),
        family=family,  # pyrefly: ignore[bad-argument-type]
    )
    changed = _of_family(m, plain)
    if (scaling := _rope_scaling(m, plain)) is not None:
        changed["rope_scaling"] = scaling
        if scaling.kind == "longrope":
            changed["max_positions"] = scaling.original_max_positions
    return dataclasses.replace(plain, **changed)


def _of_family(m: _Metadata, plain: DecoderConfig) -> dict[str, Any]:
    """The fields in which the architecture differs from Llama's."""
    if m.family == "qwen2":
        return {"attention_bias": True}
    if m.family == "qwen3":
        return {"qk_norm": True}
    if m.family == "phi3":
        key = "attention.sliding_window"
        return {"window": m.whole(key, most=1 << 30)} if m.given(key) else {}
    if m.family == "gemma2":
        local = {"window": m.whole("attention.sliding_window", default=4096, most=1 << 30)}
        return (
            _gemma(plain, deepest=46)
            | _local_layers(m, plain.layers, period=2)
            | local
            | {
                "attention_softcap": m.number("attn_logit_softcapping", default=50.0),
                "final_softcap": m.number("final_logit_softcapping", default=30.0),
            }
        )
    if m.family == "gemma3":
        fields = _gemma(plain, deepest=62) | {"qk_norm": True}
        if m.given("final_logit_softcapping"):
            fields["final_softcap"] = m.number("final_logit_softcapping")
        if m.given("attention.sliding_window"):
            fields |= _local_layers(m, plain.layers, period=6) | {
                "window": m.whole("attention.sliding_window", most=1 << 30),
                "local_rope_theta": m.number("rope.freq_base_swa", default=10000.0),
            }
        return fields
    return {}


def _gemma(plain: DecoderConfig, deepest: int) -> dict[str, Any]:
    # The metadata does not say how queries are scaled. In the largest model, told by its depth as
    # llama.cpp does, it is by D / heads in place of E.
    width = plain.d_model // plain.heads if plain.layers == deepest else plain.head_dim
    return {
        "activation": "gelu_tanh",
        "post_norms": True,
        "norm_offset": 1.0,
        "embedding_scale": math.sqrt(plain.d_model),
        "query_scale": width**-0.5,
    }


def _local_layers(m: _Metadata, layers: int, period: int) -> dict[str, Any]:
    """Every `period`-th layer sees everything, unless the metadata has a pattern of its own."""
    key = "attention.sliding_window_pattern"
    pattern = m.value(key)
    if isinstance(pattern, np.ndarray):
        if pattern.dtype != bool or len(pattern) != layers:
            raise ConfigError(
                f"{m.file.path}: metadata '{m.family}.{key}' is {shown(pattern)}, must be one "
                f"boolean for each of {layers} layers"
            )
        return {"local_layers": tuple(pattern.tolist())}
    period = m.whole(key, default=period)
    return {"local_layers": tuple((i + 1) % period != 0 for i in range(layers))}


def _rope_scaling(m: _Metadata, plain: DecoderConfig) -> RopeScaling | None:
    path, half = m.file.path, max(plain.head_dim // 2, 1)
    kind = m.value("rope.scaling.type")
    if kind is not None and (
        not isinstance(kind, str) or kind not in ("none", "linear", "longrope")
    ):
        raise ConfigError(
            f"{path}: RoPE scaling {shown(kind)}; supported from GGUF: 'linear', 'longrope'"
        )
    if "rope_freqs.weight" in m.file.tensors:
        return _named(_factors(m.file, "rope_freqs.weight", half), plain)
    if kind == "longrope" or "rope_factors_short.weight" in m.file.tensors:
        return RopeScaling(
            "longrope",
            original_max_positions=m.whole("rope.scaling.original_context_length", most=1 << 30),
            short_factors=_factors(m.file, "rope_factors_short.weight", half),
            long_factors=_factors(m.file, "rope_factors_long.weight", half),
            attention_factor=m.number("rope.scaling.attn_factor", default=1.0),
        )
    # llama.cpp takes a factor without a type for a linear one.
    factor = m.number("rope.scaling.factor", default=1.0) if kind != "none" else 1.0
    return None if factor == 1.0 else RopeScaling("linear", factor=factor)


def _factors(file: GgufFile, name: str, half: int) -> tuple[float, ...]:
    factors = file.read(name, (half,))
    if not ((factors > 0) & (factors < 1e30)).all():
        raise ConfigError(f"{file.path}: tensor {name!r} must hold finite numbers above 0")
    return tuple(factors.tolist())


def _named(factors: tuple[float, ...], plain: DecoderConfig) -> RopeScaling | None:
    """What `rope_freqs` stands for: Llama 3's rule where its constants give these factors.

    Other factors are kept as they are: LongRoPE divides frequencies by a table too.
    """
    if set(factors) == {1.0}:
        return None
    llama3 = RopeScaling("llama3", factor=max(factors))
    plainly, scaled = (
        rotary_frequencies(plain.head_dim, plain.rope_theta, scaling).frequencies_F
        for scaling in (None, llama3)
    )
    if np.allclose(factors, plainly / scaled, rtol=1e-4, atol=0):
        return llama3
    return RopeScaling(
        "longrope",
        original_max_positions=plain.max_positions,
        short_factors=factors,
        long_factors=factors,
    )


def parameter_names(config: DecoderConfig) -> dict[str, Any]:
    """The parameters' tree with tensor names for arrays; {} is the number of the layer."""
    layers = {
        "attention_norm": {"scale": "blk.{}.attn_norm.weight"},
        "mlp_norm": {"scale": "blk.{}.ffn_norm.weight"},
        "q": {"kernel": "blk.{}.attn_q.weight"},
        "k": {"kernel": "blk.{}.attn_k.weight"},
        "v": {"kernel": "blk.{}.attn_v.weight"},
        "o": {"kernel": "blk.{}.attn_output.weight"},
        "gate": {"kernel": "blk.{}.ffn_gate.weight"},
        "up": {"kernel": "blk.{}.ffn_up.weight"},
        "down": {"kernel": "blk.{}.ffn_down.weight"},
    }
    if config.attention_bias:
        for part in "qkv":
            layers[part]["bias"] = f"blk.{{}}.attn_{part}.bias"
    if config.qk_norm:
        layers["q_norm"] = {"scale": "blk.{}.attn_q_norm.weight"}
        layers["k_norm"] = {"scale": "blk.{}.attn_k_norm.weight"}
    if config.post_norms:
        layers["post_attention_norm"] = {"scale": "blk.{}.post_attention_norm.weight"}
        layers["post_mlp_norm"] = {"scale": "blk.{}.post_ffw_norm.weight"}
    names = {
        "embed": {"embedding": "token_embd.weight"},
        "layers": layers,
        "final_norm": {"scale": "output_norm.weight"},
    }
    return names if config.tied_embeddings else names | {"head": {"kernel": "output.weight"}}


def parameters_only(file: GgufFile, config: DecoderConfig) -> GgufFile:
    """The file with its parameters alone, under the names of `parameter_names`.

    RoPE tables are left out, and Phi-3's fused tensors stand there as their parts: rows follow each
    other in a file, so a part is a tensor like any other. Raises ConfigError for a wrong shape.
    """
    tensors = {name: at for name, at in file.tensors.items() if name not in _ROPE_TABLES}
    if config.family == "phi3":
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        attention = {"attn_q": query, "attn_k": key, "attn_v": key}
        mlp = {"ffn_gate": config.d_ff, "ffn_up": config.d_ff}
        for i in range(config.layers):
            for fused, parts in (("attn_qkv", attention), ("ffn_up", mlp)):
                name = f"blk.{i}.{fused}.weight"
                whole = file.find(name)
                del tensors[name]
                tensors |= _rows(file, name, whole, parts, f"blk.{i}.{{}}.weight")
    return dataclasses.replace(file, tensors=tensors)


def _rows(
    file: GgufFile, name: str, whole: Tensor, parts: dict[str, int], pattern: str
) -> dict[str, Tensor]:
    """`whole` cut into `parts`, their names and numbers of rows."""
    rows = sum(parts.values())
    if len(whole.shape) != 2 or whole.shape[0] != rows:
        raise ConfigError(
            f"{file.path}: tensor {name!r} has shape {whole.shape}, expected {rows} rows: "
            + " + ".join(f"{part} {count}" for part, count in parts.items())
        )
    found, offset = {}, whole.offset
    for part, count in parts.items():
        size = whole.size // rows * count
        shape = (count, whole.shape[1])
        found[pattern.format(part)] = Tensor(whole.ggml_type, shape, offset, size)
        offset += size
    return found


def read_parameter(
    file: GgufFile, config: DecoderConfig, name: str, shape: tuple[int, ...]
) -> np.ndarray:
    """Tensor `name` of `parameters_only` as float32 in the decoder's layout.

    Raises ConfigError as `GgufFile.read`.
    """
    array = file.read(name, shape)
    if name.endswith("norm.weight") and config.norm_offset:
        return array - np.float32(config.norm_offset)  # the file has them added
    part = name.removesuffix(".weight").rpartition(".")[2]
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(part)
    if config.family != "llama" or heads is None:
        return array
    # This architecture's q and k rows are stored for interleaved RoPE; ours is rotate-half.
    return array.reshape(heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
