"""Model weights in (package, GGUF file, Hugging Face folder or hub id, random) and out (folder)."""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from persyn_jax import streams
from persyn_jax.config import ConfigError
from persyn_jax.models import decoder, folder, gguf, safetensors_file, tokenizer
from persyn_jax.models.decoder import DecoderConfig, Params
from persyn_jax.models.spec import ModelConfig, locate, read_chat_template

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
    path, template = locate(model), read_chat_template(model)
    if path is None:
        key = streams.jax_stream(seed, "random weights")
        params = jax.tree.map(np.asarray, _init(RANDOM_TINY, key))
        return Model(RANDOM_TINY, params, tokenizer.byte_level(template))
    if path.is_dir():
        config, tok = (
            _checked(path, folder.read_config(path)),
            tokenizer.load_folder(path, template),
        )
        params = folder_params(path, config)
    else:
        file = gguf.read(path)
        config, tok = _checked(path, gguf.decoder_config(file)), tokenizer.from_gguf(file, template)
        params = _gguf_params(file, config)
    check_vocabulary(path, config, tok)
    return Model(config, params, tok)


def check_vocabulary(path: Path, config: DecoderConfig, tok: tokenizer.Tokenizer) -> None:
    """Raises ConfigError for a tokenizer with ids that the model has no embedding of."""
    if (last := max(tok.get_vocab().values())) >= config.vocab_size:
        raise ConfigError(
            f"{path}: token id {last} of the tokenizer is not in the model's vocabulary of "
            f"{config.vocab_size}"
        )


def load_tokenizer(model: ModelConfig) -> tokenizer.Tokenizer:
    """The model's tokenizer alone. Raises ConfigError as `load`."""
    path, template = locate(model), read_chat_template(model)
    if path is None:
        return tokenizer.byte_level(template)
    if path.is_dir():
        return tokenizer.load_folder(path, template)
    return tokenizer.from_gguf(gguf.read(path), template)


def load_config(model: ModelConfig) -> DecoderConfig:
    """The model's shape alone. Raises ConfigError as `load`."""
    path = locate(model)
    if path is None:
        return RANDOM_TINY
    config = folder.read_config(path) if path.is_dir() else gguf.decoder_config(gguf.read(path))
    return _checked(path, config)


def save_folder(path: Path, model: Model) -> None:
    """Writes a folder that `transformers` and vLLM open: weights, config, tokenizer, template.

    Raises ConfigError as `folder.write`.
    """
    folder.write(path, model.config, model.params, model.tokenizer)


def _checked(path: Path, config: DecoderConfig) -> DecoderConfig:
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise ConfigError(
            f"{path}: {config.heads} query heads must be a multiple of {config.kv_heads} "
            f"key-value heads, and their width {config.head_dim} even"
        )
    return config


def _gguf_params(file: gguf.GgufFile, config: DecoderConfig) -> Params:
    file = gguf.parameters_only(file, config)
    read = functools.partial(gguf.read_parameter, file, config)
    return _assemble(file.path, config, gguf.parameter_names(config), set(file.tensors), read)


def folder_params(path: Path, config: DecoderConfig, without: Collection[str] = ()) -> Params:
    """The parameters in a Hugging Face folder, as in `Model`. Raises ConfigError as `load`.

    without: names of tensors that are none of the decoder's.
    """
    stored = safetensors_file.open_folder(path)
    others = {name: tensor for name, tensor in stored.tensors.items() if name not in without}
    tensors = folder.parameters_only(replace(stored, tensors=others), config)
    return _assemble(
        path, config, folder.parameter_names(config), set(tensors.tensors), tensors.read
    )


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
    used = {name.format(i) for name in jax.tree.leaves(names) for i in range(config.layers)}
    if unused := sorted(available - used):
        raise ConfigError(
            f"{path}: tensor {unused[0]!r} has no place in a {config.family} decoder: "
            "another architecture?"
        )

    def parameter(name: str, wanted: jax.ShapeDtypeStruct) -> np.ndarray:
        if "{}" not in name:
            return read(name, wanted.shape)
        return np.stack([read(name.format(i), wanted.shape[1:]) for i in range(config.layers)])

    return jax.tree.map(parameter, names, shapes)
