"""Hugging Face folders as parameters, and parameters as folders that others open.

A folder holds `config.json`, the weights (`*.safetensors`) and the tokenizer's files.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.models import families
from persyn_jax.models.decoder import DecoderConfig, Params, RopeScaling
from persyn_jax.models.families import ACTIVATIONS, FULL, SLIDING, longrope_attention_factor
from persyn_jax.models.fast_tokenizer import Tokenizer
from persyn_jax.models.file_checks import read_json
from persyn_jax.models.safetensors_file import Weights

_CONFIG = "config.json"
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
_LAYER = "model.layers.{}."
KERNEL_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""What files call the parts of a layer that have a kernel."""
FUSED_MODULES = {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}
"""What Phi-3's files have in their place: the kernels of these parts, one after the other."""
_FUSED = {
    f"{module}.weight": tuple(f"{KERNEL_MODULES[part]}.weight" for part in parts)
    for module, parts in FUSED_MODULES.items()
}


def read_config(folder: Path) -> DecoderConfig:
    """The decoder in a folder. Raises ConfigError as `families.decoder_config`."""
    path = folder / _CONFIG
    return families.decoder_config(path, read_json(path))


def parameter_names(config: DecoderConfig) -> dict[str, Any]:
    """The parameters' tree with tensor names for arrays; {} is the number of the layer."""

    def weight(name: str) -> str:
        return f"{_LAYER}{name}.weight"

    layers = {
        "attention_norm": {"scale": weight("input_layernorm")},
        "mlp_norm": {"scale": weight("post_attention_layernorm")},
        **{part: {"kernel": weight(module)} for part, module in KERNEL_MODULES.items()},
    }
    if config.attention_bias:
        for part in "qkv":
            layers[part]["bias"] = f"{_LAYER}self_attn.{part}_proj.bias"
    if config.qk_norm:
        layers |= {f"{part}_norm": {"scale": weight(f"self_attn.{part}_norm")} for part in "qk"}
    if config.post_norms:
        layers |= {
            "post_attention_norm": {"scale": weight("post_attention_layernorm")},
            "mlp_norm": {"scale": weight("pre_feedforward_layernorm")},
            "post_mlp_norm": {"scale": weight("post_feedforward_layernorm")},
        }
    names = {
        "embed": {"embedding": "model.embed_tokens.weight"},
        "layers": layers,
        "final_norm": {"scale": "model.norm.weight"},
    }
    return names if config.tied_embeddings else names | {"head": {"kernel": "lm_head.weight"}}


def parameters_only(weights: Weights, config: DecoderConfig) -> Weights:
    """The tensors that are parameters, under the names of `parameter_names`.

    Some tied models store their embeddings a second time, older ones their RoPE frequencies.
    Phi-3's fused tensors stand there as their parts. Raises ConfigError for a wrong shape of those.
    """
    tensors = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if not name.endswith("rotary_emb.inv_freq")
        and not (config.tied_embeddings and name == "lm_head.weight")
    }
    if config.family == "phi3":
        for i in range(config.layers):
            for fused, parts in _FUSED.items():
                name = _LAYER.format(i) + fused
                tensors |= {
                    _LAYER.format(i) + part: rows
                    for part, rows in _parts(weights, config, name, parts).items()
                }
                del tensors[name]
    return dataclasses.replace(weights, tensors=tensors)


def _parts(
    weights: Weights, config: DecoderConfig, name: str, parts: tuple[str, ...]
) -> dict[str, Any]:
    """Where each part of a fused tensor stands: rows follow each other in a file."""
    if (whole := weights.tensors.get(name)) is None:
        raise ConfigError(f"{weights.folder}: tensor {name!r} is missing")
    counts = [_rows(config, part) for part in parts]
    if (shape := (sum(counts), config.d_model)) != whole.shape:
        raise ConfigError(
            f"{whole.file}: tensor {name!r} has shape {whole.shape}, expected {shape}"
        )
    found, offset = {}, whole.offset
    for part, count in zip(parts, counts, strict=True):
        size = whole.size // shape[0] * count
        found[part] = whole._replace(shape=(count, shape[1]), offset=offset, size=size)
        offset += size
    return found


def _rows(config: DecoderConfig, part: str) -> int:
    if part.startswith("mlp."):
        return config.d_ff
    return config.head_dim * (config.heads if ".q_" in part else config.kv_heads)


def write(folder: Path, config: DecoderConfig, params: Params, tokenizer: Tokenizer) -> None:
    """Writes a folder that `transformers` 4 and 5 and vLLM open. params: NumPy, layers stacked.

    Raises ConfigError for a config that its family's `config.json` has no words for.
    """
    from safetensors.numpy import save_file

    special = {
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    values = config_values(config)
    read_again = families.decoder_config(folder / _CONFIG, values)
    if (written := dataclasses.replace(config, lora_scale=1.0)) != read_again:
        field = next(f for f in vars(written) if vars(written)[f] != vars(read_again)[f])
        raise ConfigError(
            f"{folder / _CONFIG}: {field} {vars(written)[field]!r} cannot be told of a "
            f"{config.family} model; it would be read as {vars(read_again)[field]!r}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    save_file(tensors(config, params), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # the writer makes it private
    _write_json(folder / _CONFIG, values | special)
    _write_json(folder / "generation_config.json", special)
    tokenizer.save_pretrained(folder)
    # The class name that transformers 4 knows too; 5 would write one of its own.
    tokenizer_config = folder / "tokenizer_config.json"
    values = json.loads(tokenizer_config.read_text("utf-8"))
    _write_json(tokenizer_config, values | {"tokenizer_class": "PreTrainedTokenizerFast"})


def tensors(config: DecoderConfig, params: Params) -> dict[str, np.ndarray]:
    """Parameters as the tensors of a folder, by name. params: NumPy, layers stacked."""
    found: dict[str, np.ndarray] = {}

    def add(name: str, array: np.ndarray) -> None:
        layers = enumerate(array) if "{}" in name else [(0, array)]
        found.update({name.format(i): np.ascontiguousarray(leaf) for i, leaf in layers})

    jax.tree.map(add, parameter_names(config), params)
    if config.family == "phi3":
        for i in range(config.layers):
            for fused, parts in _FUSED.items():
                arrays = [found.pop(_LAYER.format(i) + part) for part in parts]
                found[_LAYER.format(i) + fused] = np.concatenate(arrays)
    return found


def config_values(c: DecoderConfig) -> dict[str, Any]:
    """What `config.json` says of a decoder: what `families.decoder_config` reads back."""
    model_type = "gemma3_text" if c.family == "gemma3" else c.family
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == c.activation)
    values = {
        "architectures": [_ARCHITECTURES[c.family]],
        "model_type": model_type,
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.layers,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied_embeddings,
        "max_position_embeddings": c.max_positions,
        "hidden_act": activation,
        "dtype": "float32",
    }
    return values | _of_family(c, activation) | _rope_values(c)


def _of_family(c: DecoderConfig, activation: str) -> dict[str, Any]:
    if c.family == "llama":
        return {"attention_bias": False, "mlp_bias": False}
    if c.family == "phi3":
        return {"sliding_window": c.window}
    kinds = [SLIDING if c.is_local(i) else FULL for i in range(c.layers)]
    values = {"sliding_window": c.window, "layer_types": kinds}
    if c.family in ("qwen2", "qwen3"):
        return values | {"use_sliding_window": c.window is not None}
    scalar = (c.query_scale or c.head_dim**-0.5) ** -2
    values |= {
        "hidden_activation": activation,
        "query_pre_attn_scalar": round(scalar) if round(scalar) >= 1 else scalar,
        "attn_logit_softcapping": c.attention_softcap,
        "final_logit_softcapping": c.final_softcap,
    }
    if c.family == "gemma3":  # what transformers 4 had before `layer_types`
        every = next((n for n in range(1, c.layers + 1) if kinds[n - 1] == FULL), c.layers + 1)
        values["sliding_window_pattern"] = every
    return values


def _rope_values(c: DecoderConfig) -> dict[str, Any]:
    """transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`."""
    theta: dict[str, Any] = {"rope_theta": c.rope_theta}
    scaling = {} if c.rope_scaling is None else _scaling_values(c.rope_scaling)
    full = {"rope_type": "default"} | scaling | theta
    values = theta | {"rope_parameters": full}
    if scaling:
        values["rope_scaling"] = scaling
    if c.family == "gemma3":
        local = c.rope_theta if c.local_rope_theta is None else c.local_rope_theta
        sliding = {"rope_type": "default", "rope_theta": local}
        values["rope_parameters"] = {FULL: full, SLIDING: sliding}
        values["rope_local_base_freq"] = local
    if c.family == "phi3" and c.rope_scaling is not None and c.rope_scaling.kind == "longrope":
        values |= _phi3_values(c, c.rope_scaling)
    return values


def _scaling_values(s: RopeScaling) -> dict[str, Any]:
    if s.kind == "linear":
        return {"rope_type": "linear", "factor": s.factor}
    if s.kind == "llama3":
        return {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_frequency_factor,
            "high_freq_factor": s.high_frequency_factor,
            "original_max_position_embeddings": s.original_max_positions,
        }
    return {
        "rope_type": "longrope",
        "short_factor": list(s.short_factors),
        "long_factor": list(s.long_factors),
        "original_max_position_embeddings": s.original_max_positions,
        "attention_factor": s.attention_factor,
    }


def _phi3_values(c: DecoderConfig, s: RopeScaling) -> dict[str, Any]:
    """As Phi-3's own files say it, where the attention factor follows from how far they extend.

    transformers 4 knows no other way.
    """
    original = s.original_max_positions
    extended = max(round(original**s.attention_factor**2), original)
    values: dict[str, Any] = {"original_max_position_embeddings": original}
    if longrope_attention_factor(extended / original, original) != s.attention_factor:
        return values
    factors = {"short_factor": list(s.short_factors), "long_factor": list(s.long_factors)}
    return values | {
        "max_position_embeddings": extended,
        "rope_scaling": {"type": "longrope"} | factors,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": c.rope_theta} | factors,
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
