"""Model weights in (package, GGUF file, Hugging Face folder or hub id, random) and out (folder)."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from persyn_jax import streams
from persyn_jax.config import ConfigError
from persyn_jax.models import decoder, gguf, tokenizer
from persyn_jax.models.decoder import DecoderConfig, Params
from persyn_jax.models.spec import (
    ModelConfig,
    locate,
    positive_float,
    positive_int,
    weight_files,
)

RANDOM_TINY = DecoderConfig(
    vocab_size=259,
    layers=2,
    d_model=32,
    d_ff=64,
    heads=4,
    kv_heads=2,
    head_dim=8,
    rope_theta=10000.0,
    norm_eps=1e-5,
    tied_embeddings=True,
    max_positions=2048,
)

# Where each parameter stands in a Hugging Face folder; {} is the number of the layer.
_FOLDER_NAMES = {
    "embed": {"embedding": "model.embed_tokens.weight"},
    "layers": {
        "attention_norm": {"scale": "model.layers.{}.input_layernorm.weight"},
        "mlp_norm": {"scale": "model.layers.{}.post_attention_layernorm.weight"},
        "q": {"kernel": "model.layers.{}.self_attn.q_proj.weight"},
        "k": {"kernel": "model.layers.{}.self_attn.k_proj.weight"},
        "v": {"kernel": "model.layers.{}.self_attn.v_proj.weight"},
        "o": {"kernel": "model.layers.{}.self_attn.o_proj.weight"},
        "gate": {"kernel": "model.layers.{}.mlp.gate_proj.weight"},
        "up": {"kernel": "model.layers.{}.mlp.up_proj.weight"},
        "down": {"kernel": "model.layers.{}.mlp.down_proj.weight"},
    },
    "final_norm": {"scale": "model.norm.weight"},
    "head": {"kernel": "lm_head.weight"},
}
_CONFIG = "config.json"

_init = jax.jit(decoder.init, static_argnums=0)


@dataclass(frozen=True)
class Model:
    """A loaded model: its shape, its parameters (NumPy float32, layers stacked), its tokenizer."""

    config: DecoderConfig
    params: Params
    tokenizer: tokenizer.Tokenizer


def load(model: ModelConfig, seed: int = 0) -> Model:
    """Loads the model. seed: of random weights.

    Raises ConfigError naming the file and what is wrong with it.
    """
    path = locate(model)
    if path is None:
        key = streams.jax_stream(seed, "random weights")
        params = jax.tree.map(np.asarray, _init(RANDOM_TINY, key))
        return Model(RANDOM_TINY, params, tokenizer.byte_level())
    if path.is_dir():
        config, tok = _checked(path, _folder_config(path)), tokenizer.load_folder(path)
        params = _folder_params(path, config)
    else:
        file = gguf.read(path)
        config, tok = _checked(path, gguf.decoder_config(file)), tokenizer.from_gguf(file)
        params = _gguf_params(file, config)
    if (last := max(tok.get_vocab().values())) >= config.vocab_size:
        raise ConfigError(
            f"{path}: token id {last} of the tokenizer is not in the model's vocabulary of "
            f"{config.vocab_size}"
        )
    return Model(config, params, tok)


def load_tokenizer(model: ModelConfig) -> tokenizer.Tokenizer:
    """The model's tokenizer alone. Raises ConfigError as `load`."""
    path = locate(model)
    if path is None:
        return tokenizer.byte_level()
    return tokenizer.load_folder(path) if path.is_dir() else tokenizer.from_gguf(gguf.read(path))


def load_config(model: ModelConfig) -> DecoderConfig:
    """The model's shape alone. Raises ConfigError as `load`."""
    path = locate(model)
    if path is None:
        return RANDOM_TINY
    config = _folder_config(path) if path.is_dir() else gguf.decoder_config(gguf.read(path))
    return _checked(path, config)


def _checked(path: Path, config: DecoderConfig) -> DecoderConfig:
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise ConfigError(
            f"{path}: {config.heads} query heads must be a multiple of {config.kv_heads} "
            f"key-value heads, and their width {config.head_dim} even"
        )
    return config


def _gguf_params(file: gguf.GgufFile, config: DecoderConfig) -> Params:
    read = functools.partial(gguf.read_parameter, file, config)
    return _assemble(file.path, config, gguf.PARAMETER_NAMES, set(file.tensors), read)


def _folder_params(folder: Path, config: DecoderConfig) -> Params:
    tensors: dict[str, np.ndarray] = {}
    for file in weight_files(folder):
        tensors |= _read_safetensors(file)

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise ConfigError(f"{folder}: tensor {name!r} is missing")
        array = tensors.pop(name)
        if array.shape != shape:
            raise ConfigError(
                f"{folder}: tensor {name!r} has shape {array.shape}, expected {shape}"
            )
        return array.astype(np.float32, copy=False)

    # Some tied models store their embeddings a second time, older ones their RoPE frequencies.
    repeated = {"lm_head.weight"} if config.tied_embeddings else set()
    needed = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")} - repeated
    return _assemble(folder, config, _FOLDER_NAMES, needed, read)


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with safe_open(file, framework="np") as opened:
            names = opened.keys()
            for name in names:
                if (dtype := opened.get_slice(name).get_dtype()) not in ("F32", "F16", "BF16"):
                    raise ConfigError(
                        f"{file}: tensor {name!r} is {dtype}; F32, F16 and BF16 are supported"
                    )
                tensors[name] = opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: not a safetensors file: {error}") from None
    return tensors


def _assemble(
    path: Path,
    config: DecoderConfig,
    names: dict[str, Any],
    available: set[str],
    read: Callable[[str, tuple[int, ...]], np.ndarray],
) -> Params:
    """The parameters from `read(tensor name, shape)`, layers stacked.

    Raises ConfigError for a tensor without a place here: the file is of some other architecture.
    """
    shapes = jax.eval_shape(functools.partial(decoder.init, config), jax.random.key(0))
    names = {part: names[part] for part in shapes}

    def parameter(name: str, wanted: jax.ShapeDtypeStruct) -> np.ndarray:
        if "{}" not in name:
            return read(name, wanted.shape)
        return np.stack([read(name.format(i), wanted.shape[1:]) for i in range(config.layers)])

    params = jax.tree.map(parameter, names, shapes)
    used = {name.format(i) for name in jax.tree.leaves(names) for i in range(config.layers)}
    if unused := sorted(available - used):
        raise ConfigError(
            f"{path}: tensor {unused[0]!r} has no place in a Llama decoder: another architecture?"
        )
    return params


def _folder_config(folder: Path) -> DecoderConfig:
    path = folder / _CONFIG
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(values, dict) or values.get("model_type") != "llama":
        found = values.get("model_type") if isinstance(values, dict) else values
        raise ConfigError(f"{path}: model_type {found!r}; supported: 'llama'")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in (
        None,
        "default",
    ):
        raise ConfigError(f"{path}: rope scaling {rope!r} is not supported")
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"{path}: hidden_act {activation!r}; supported: 'silu'")

    def whole(key: str, default: int | None = None, most: int = 1 << 20) -> int:
        value = values.get(key)
        return positive_int(default if value is None else value, f"{path}: {key}", most)

    heads, d_model = whole("num_attention_heads"), whole("hidden_size")
    return DecoderConfig(
        vocab_size=whole("vocab_size"),
        layers=whole("num_hidden_layers"),
        d_model=d_model,
        d_ff=whole("intermediate_size"),
        heads=heads,
        kv_heads=whole("num_key_value_heads", default=heads),
        head_dim=whole("head_dim", default=d_model // heads),
        rope_theta=positive_float(
            rope.get("rope_theta", values.get("rope_theta")), f"{path}: rope_theta"
        ),
        norm_eps=positive_float(values.get("rms_norm_eps"), f"{path}: rms_norm_eps"),
        tied_embeddings=values.get("tie_word_embeddings", False) is True,
        max_positions=whole("max_position_embeddings", most=1 << 30),
    )


def save_folder(folder: Path, model: Model) -> None:
    """Writes a folder that `transformers` and vLLM open: weights, config, tokenizer, template."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    names = {part: _FOLDER_NAMES[part] for part in model.params}
    tensors: dict[str, np.ndarray] = {}
    for name, array in zip(jax.tree.leaves(names), jax.tree.leaves(model.params), strict=True):
        layers = enumerate(array) if "{}" in name else [(0, array)]
        tensors |= {name.format(i): np.ascontiguousarray(leaf) for i, leaf in layers}
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # the writer makes it private
    special = {
        "eos_token_id": model.tokenizer.eos_token_id,
        "bos_token_id": model.tokenizer.bos_token_id,
        "pad_token_id": model.tokenizer.pad_token_id,
    }
    _write_json(folder / _CONFIG, _folder_values(model.config) | special)
    _write_json(folder / "generation_config.json", special)
    model.tokenizer.save_pretrained(folder)
    # The class name that transformers 4 knows too; 5 would write one of its own.
    tokenizer_config = folder / "tokenizer_config.json"
    values = json.loads(tokenizer_config.read_text("utf-8"))
    _write_json(tokenizer_config, values | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _folder_values(c: DecoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.layers,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        # transformers 4 reads the first, transformers 5 the second.
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied_embeddings,
        "max_position_embeddings": c.max_positions,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
