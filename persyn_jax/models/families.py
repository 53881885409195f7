"""What the `config.json` of a Hugging Face folder says of a decoder, family by family.

What a file leaves out is what `transformers` 5 takes it for; the names that `transformers` 4 wrote
are read too. `folder` writes what is read here.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from persyn_jax.config import ConfigError
from persyn_jax.models.decoder import DecoderConfig, RopeScaling
from persyn_jax.models.file_checks import positive_float, positive_int, shown

FULL, SLIDING = "full_attention", "sliding_attention"

ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "gemma2": _GEMMA
    | {
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": _GEMMA | {"max_position_embeddings": 131072, "rope_theta": 1e6},
    "phi3": {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
}
# What changes a model in ways that the decoder does not know, unless it is false, null or absent.
_UNSUPPORTED = (
    "mlp_bias",
    "use_bidirectional_attention",
    "quantization_config",
    "trust_remote_code",
    "_attn_implementation",
)


@dataclass(frozen=True)
class _File:
    """The values of one config.json, defaults filled in."""

    path: Path
    model_type: str
    values: dict[str, Any]

    def whole(self, key: str, fallback: int | None = None, most: int = 1 << 20) -> int:
        value = self.values.get(key)
        return positive_int(fallback if value is None else value, f"{self.path}: {key}", most)

    def number(self, key: str, fallback: float | None = None) -> float:
        value = self.values.get(key)
        return positive_float(fallback if value is None else value, f"{self.path}: {key}")

    def number_or_none(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value is True

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "a JSON object")
        return value or {}

    def wrong(self, key: str, allowed: str) -> ConfigError:
        return ConfigError(
            f"{self.path}: {key} is {shown(self.values.get(key))}, must be {allowed}"
        )


def decoder_config(path: Path, values: dict[str, Any]) -> DecoderConfig:
    """The decoder that a config.json, read from `path`, describes.

    Raises ConfigError naming the key that is missing, impossible or not supported.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        supported = ", ".join(map(repr, _DEFAULTS))
        raise ConfigError(f"{path}: model_type {shown(model_type)}; supported: {supported}")
    file = _File(path, model_type, _DEFAULTS[model_type] | values)
    _refuse_what_is_not_supported(file)
    activation = "hidden_activation" if model_type.startswith("gemma") else "hidden_act"
    found = file.values.get(activation, "silu")
    if not isinstance(found, str) or found not in ACTIVATIONS:
        raise file.wrong(activation, " or ".join(map(repr, ACTIVATIONS)))
    heads, d_model = file.whole("num_attention_heads"), file.whole("hidden_size")
    plain = DecoderConfig(
        vocab_size=file.whole("vocab_size"),
        layers=file.whole("num_hidden_layers", most=1 << 12),
        d_model=d_model,
        d_ff=file.whole("intermediate_size"),
        heads=heads,
        kv_heads=file.whole("num_key_value_heads", heads),
        head_dim=file.whole("head_dim", max(d_model // heads, 1)),
        rope_theta=1.0,  # set below
        norm_eps=file.number("rms_norm_eps", 1e-6),
        tied_embeddings=file.flag("tie_word_embeddings"),
        max_positions=file.whole("max_position_embeddings", most=1 << 30),
        family="gemma3" if model_type == "gemma3_text" else model_type,  # pyrefly: ignore
        activation=ACTIVATIONS[found],
        attention_bias=model_type == "qwen2",
        qk_norm=model_type in ("qwen3", "gemma3_text"),
    )
    return dataclasses.replace(
        plain, **_gemma(file, d_model), **_windows(file, plain), **_rope(file, plain)
    )


def _refuse_what_is_not_supported(file: _File) -> None:
    for key in _UNSUPPORTED:
        if file.values.get(key):
            raise file.wrong(key, "absent: it is not supported")
    # Of Qwen 2 the key says nothing: it always has biases, and only those that the decoder has.
    if file.model_type != "qwen2" and file.flag("attention_bias"):
        raise file.wrong("attention_bias", "false: it is not supported")
    if file.values.get("partial_rotary_factor") not in (None, 1):
        raise file.wrong("partial_rotary_factor", "1: all else is not supported")
    # Phi-3's own code, which its files name, is what `transformers` has.
    code = file.mapping("auto_map").values()
    if not all(file.model_type == "phi3" and str(name).endswith(_PHI3_CODE) for name in code):
        raise file.wrong("auto_map", "absent: code of the model's own is never run")


_PHI3_CODE = ("_phi3.Phi3Config", "_phi3.Phi3ForCausalLM")


def _gemma(file: _File, d_model: int) -> dict[str, Any]:
    if not file.model_type.startswith("gemma"):
        return {}
    return {
        "post_norms": True,
        "norm_offset": 1.0,
        "embedding_scale": math.sqrt(d_model),
        "query_scale": file.number("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": file.number_or_none("attn_logit_softcapping"),
        "final_softcap": file.number_or_none("final_logit_softcapping"),
    }


def _windows(file: _File, plain: DecoderConfig) -> dict[str, Any]:
    window = None
    if file.values.get("sliding_window") is not None:
        window = file.whole("sliding_window", most=1 << 30)
    if file.model_type == "phi3":
        return {"window": window}
    if file.model_type.startswith("qwen") and not file.flag("use_sliding_window"):
        window = None
    local = _local_layers(file, plain.layers, window)
    if not any(local):
        return {}
    if window is None or file.model_type == "llama":
        raise file.wrong("layer_types", f"{FULL} alone: no window is given")
    return {"window": window, "local_layers": local}


def _local_layers(file: _File, layers: int, window: int | None) -> tuple[bool, ...]:
    given = file.values.get("layer_types")
    if given is not None:
        known = isinstance(given, list) and all(kind in (FULL, SLIDING) for kind in given)
        if not known or len(given) != layers:
            raise file.wrong("layer_types", f"{FULL} or {SLIDING} for each of {layers} layers")
        return tuple(kind == SLIDING for kind in given)
    if file.model_type.startswith("gemma"):
        every = 2 if file.model_type == "gemma2" else file.whole("sliding_window_pattern", 6)
        return tuple((i + 1) % every != 0 for i in range(layers))
    first = layers if window is None else file.values.get("max_window_layers")
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise file.wrong("max_window_layers", "a whole number")
    return tuple(i >= first for i in range(layers))


def _rope(file: _File, plain: DecoderConfig) -> dict[str, Any]:
    """Frequencies; of LongRoPE also the positions that it is used for, its original ones."""
    scaling, parameters = file.mapping("rope_scaling"), file.mapping("rope_parameters")
    if file.model_type != "gemma3_text":
        rope = _Rope(file, scaling or parameters)
        theta, scaled = rope.number("rope_theta", file.number("rope_theta", 1e4)), rope.read(plain)
        if scaled is not None and scaled.kind == "longrope":
            positions = {"max_positions": scaled.original_max_positions}
            return {"rope_theta": theta, "rope_scaling": scaled} | positions
        return {"rope_theta": theta, "rope_scaling": scaled}
    if parameters.keys() - {FULL, SLIDING}:
        raise file.wrong("rope_parameters", f"an object with {FULL} and {SLIDING}")
    parts = _File(file.path, file.model_type, parameters)
    full, sliding = (_Rope(file, parts.mapping(kind)) for kind in (FULL, SLIDING))
    full = _Rope(file, full.values | scaling)
    if sliding.read(plain) is not None:
        raise file.wrong("rope_parameters", f"unscaled in {SLIDING}")
    scaled = full.read(plain)
    if scaled is not None and scaled.kind == "longrope":
        raise file.wrong("rope_parameters", "another RoPE scaling than 'longrope'")
    found = {
        "rope_theta": full.number("rope_theta", file.number("rope_theta")),
        "rope_scaling": scaled,
    }
    local = sliding.number("rope_theta", file.number("rope_local_base_freq", 1e4))
    return found | ({"local_rope_theta": local} if _windows(file, plain) else {})


@dataclass(frozen=True)
class _Rope:
    """One object of RoPE parameters."""

    file: _File
    values: dict[str, Any]

    def number(self, key: str, fallback: float | None = None) -> float:
        value = self.values.get(key)
        where = f"{self.file.path}: RoPE {key}"
        return positive_float(fallback if value is None else value, where)

    def read(self, plain: DecoderConfig) -> RopeScaling | None:
        kind = self.values.get("rope_type", self.values.get("type"))
        if self.values.get("partial_rotary_factor") not in (None, 1):
            raise self._wrong("partial_rotary_factor", "1: all else is not supported")
        if kind in (None, "default"):
            return None
        if kind == "linear":
            return RopeScaling("linear", factor=self.number("factor"))
        if kind == "llama3":
            return self._llama3(plain)
        if kind == "longrope" or (kind == "su" and self.file.model_type == "phi3"):
            return self._longrope(plain)
        raise ConfigError(
            f"{self.file.path}: RoPE scaling {shown(kind)}; supported: 'default', 'linear', "
            "'llama3', 'longrope'"
        )

    def _llama3(self, plain: DecoderConfig) -> RopeScaling:
        low, high = self.number("low_freq_factor"), self.number("high_freq_factor")
        if high <= low:
            raise self._wrong("high_freq_factor", f"above low_freq_factor, {low}")
        return RopeScaling(
            "llama3",
            factor=self.number("factor"),
            low_frequency_factor=low,
            high_frequency_factor=high,
            original_max_positions=self._original(plain),
        )

    def _longrope(self, plain: DecoderConfig) -> RopeScaling:
        original = self._original(plain)
        natural = longrope_attention_factor(
            self.number("factor", plain.max_positions / original), original
        )
        return RopeScaling(
            "longrope",
            original_max_positions=original,
            short_factors=self._factors("short_factor", plain.head_dim // 2),
            long_factors=self._factors("long_factor", plain.head_dim // 2),
            attention_factor=self.number("attention_factor", natural),
        )

    def _original(self, plain: DecoderConfig) -> int:
        key = "original_max_position_embeddings"
        found = self.file.values.get(key, self.values.get(key, plain.max_positions))
        return positive_int(found, f"{self.file.path}: {key}", 1 << 30)

    def _factors(self, key: str, count: int) -> tuple[float, ...]:
        found = self.values.get(key)
        if not isinstance(found, list) or len(found) != count:
            raise self._wrong(key, f"a list of {count} numbers")
        return tuple(positive_float(f, f"{self.file.path}: RoPE {key}") for f in found)

    def _wrong(self, key: str, allowed: str) -> ConfigError:
        return ConfigError(
            f"{self.file.path}: RoPE {key} is {shown(self.values.get(key))}, must be {allowed}"
        )


def longrope_attention_factor(factor: float, original: int) -> float:
    """What LongRoPE multiplies sine and cosine by, for rows `factor` times as long as `original`.

    As in arXiv 2402.13753; 1 where nothing is extended.
    """
    if factor <= 1.0 or original <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))
