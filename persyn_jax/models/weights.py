"""Model weights in (embedded package, GGUF file, Hugging Face folder or hub id, random) and out (Hugging Face folder)."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from persyn_jax import streams
from persyn_jax.config import ConfigError
from persyn_jax.models import decoder, gguf, tokenizer
from persyn_jax.models.decoder import DecoderConfig, Params
from persyn_jax.models.spec import ModelConfig, locate, weight_files

_LAYER_NAMES = {
    ("attention_norm", "scale"): "input_layernorm",
    ("mlp_norm", "scale"): "post_attention_layernorm",
    ("q", "kernel"): "self_attn.q_proj",
    ("k", "kernel"): "self_attn.k_proj",
    ("v", "kernel"): "self_attn.v_proj",
    ("o", "kernel"): "self_attn.o_proj",
    ("gate", "kernel"): "mlp.gate_proj",
    ("up", "kernel"): "mlp.up_proj",
    ("down", "kernel"): "mlp.down_proj",
}

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


@dataclass(frozen=True)
class Model:
    """A loaded model: its shape, its parameters (NumPy float32, layers stacked) and its tokenizer."""

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
        params = jax.jit(functools.partial(decoder.init, RANDOM_TINY))(key)
        return Model(RANDOM_TINY, jax.tree.map(np.asarray, params), tokenizer.byte_level())
    if path.is_dir():
        return _load_folder(path)
    file = gguf.read(path)
    config = gguf.decoder_config(file)
    params = gguf.decoder_params(file, config)
    _check_shapes(path, config, params)
    return Model(config, params, tokenizer.from_gguf(file))


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
    return _read_config(path / "config.json") if path.is_dir() else gguf.decoder_config(gguf.read(path))


def _check_shapes(path: Path, config: DecoderConfig, params: Params) -> None:
    expected = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    wanted = {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(expected)}
    found = {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(params)}
    for name, shape in wanted.items():
        if found.get(name) != shape:
            raise ConfigError(f"{path}: parameter {name} has shape {found.get(name)}, expected {shape}")


def _load_folder(folder: Path) -> Model:
    from safetensors import SafetensorError, safe_open

    config = _read_config(folder / "config.json")
    tensors: dict[str, np.ndarray] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():
                    tensors[name] = opened.get_tensor(name).astype(np.float32, copy=False)
        except SafetensorError as error:
            raise ConfigError(f"{file}: not a safetensors file: {error}") from None

    def get(name: str) -> np.ndarray:
        if name not in tensors:
            raise ConfigError(f"{folder}: tensor {name!r} is missing")
        return tensors.pop(name)

    layers: dict[str, Any] = {}
    for (module, leaf), name in _LAYER_NAMES.items():
        stack = [get(f"model.layers.{i}.{name}.weight") for i in range(config.layers)]
        if len({a.shape for a in stack}) != 1:
            raise ConfigError(f"{folder}: tensors 'model.layers.*.{name}.weight' differ in shape")
        layers.setdefault(module, {})[leaf] = np.stack(stack)
    params: Params = {
        "embed": {"embedding": get("model.embed_tokens.weight")},
        "layers": layers,
        "final_norm": {"scale": get("model.norm.weight")},
    }
    if not config.tied_embeddings:
        params["head"] = {"kernel": get("lm_head.weight")}
    _check_shapes(folder, config, params)
    return Model(config, params, tokenizer.load_folder(folder))


def _read_config(path: Path) -> DecoderConfig:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if values.get("model_type") != "llama":
        raise ConfigError(f"{path}: model_type {values.get('model_type')!r}; supported: 'llama'")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ConfigError(f"{path}: rope scaling {rope!r} is not supported")
    try:
        heads = values["num_attention_heads"]
        return DecoderConfig(
            vocab_size=values["vocab_size"],
            layers=values["num_hidden_layers"],
            d_model=values["hidden_size"],
            d_ff=values["intermediate_size"],
            heads=heads,
            kv_heads=values.get("num_key_value_heads", heads),
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            rope_theta=float(rope.get("rope_theta") or values["rope_theta"]),
            norm_eps=float(values["rms_norm_eps"]),
            tied_embeddings=bool(values.get("tie_word_embeddings", False)),
            max_positions=values["max_position_embeddings"],
        )
    except KeyError as error:
        raise ConfigError(f"{path}: key {error} is missing") from None


def save_folder(folder: Path, model: Model) -> None:
    """Writes a Hugging Face folder that `transformers` and vLLM open: safetensors, config, tokenizer, chat template."""
    from safetensors.numpy import save_file

    c = model.config
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "model.embed_tokens.weight": model.params["embed"]["embedding"],
        "model.norm.weight": model.params["final_norm"]["scale"],
    }
    if not c.tied_embeddings:
        tensors["lm_head.weight"] = model.params["head"]["kernel"]
    for (module, leaf), name in _LAYER_NAMES.items():
        for i, array in enumerate(model.params["layers"][module][leaf]):
            tensors[f"model.layers.{i}.{name}.weight"] = array
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the writer makes it private
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.layers,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied_embeddings,
        "max_position_embeddings": c.max_positions,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": model.tokenizer.eos_token_id,
        "bos_token_id": model.tokenizer.bos_token_id,
        "pad_token_id": model.tokenizer.pad_token_id,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"eos_token_id": model.tokenizer.eos_token_id, "pad_token_id": model.tokenizer.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    model.tokenizer.save_pretrained(folder)
