"""The router: a language model whose LM head is replaced by a coefficient head.

PerSyn, section 3; as in Prompt-to-Leaderboard, arXiv 2502.14855. The backbone reads the prompt
through the chat template; the final hidden state of its last token, through one linear layer, gives
one Bradley-Terry coefficient per teacher.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.models.adapters import Adapters, merge, read_adapters, write_adapters
from persyn_jax.models.decoder import Array, Params
from persyn_jax.models.file_checks import read_json, shown
from persyn_jax.models.spec import ModelConfig
from persyn_jax.models.weights import Model, load, load_config, save_folder

_DESCRIPTION, _HEAD, _STATES = "router.json", "head.safetensors", "calibration_states.safetensors"
_ADAPTER, _BACKBONE = "adapter", "backbone"


class CoefficientHead(nn.Module):
    """pooled [B, D] -> Bradley-Terry coefficients [B, M]."""

    teachers: int

    @nn.compact
    def __call__(self, pooled_BD: jax.Array) -> jax.Array:
        # Zeros: before training no teacher is preferred.
        shape_MD = (self.teachers, pooled_BD.shape[-1])
        kernel_MD = self.param("kernel", nn.initializers.zeros, shape_MD)
        bias_M = self.param("bias", nn.initializers.zeros, (self.teachers,))
        return pooled_BD @ kernel_MD.T + bias_M[None]


def init_head(teachers: int, d_model: int) -> Params:
    """The parameters of an untrained head: {"kernel": [M, D], "bias": [M]}, float32 zeros."""
    head: Any = CoefficientHead(teachers)
    return head.init(jax.random.key(0), jnp.zeros((1, d_model)))["params"]


def coefficients(params: Params, pooled_BD: Array) -> jax.Array:
    """One coefficient per teacher, float32 [B, M]. Only differences within a row mean something."""
    chex.assert_rank(pooled_BD, 2)
    head: Any = CoefficientHead(params["bias"].shape[0])
    return head.apply({"params": params}, pooled_BD)


class Router(NamedTuple):
    """A trained router."""

    head: Params
    """For pooled states as they come."""
    state_ND: np.ndarray
    """float32, pooled states of the calibration prompts: they need not be read again to be
    routed."""
    backbone: Model | Adapters | None = None
    """All of it if all of it learned, or the adapters that did; None: it is as it was."""


def save_router(folder: Path, router: Router, teachers: list[str], source: ModelConfig) -> None:
    """Writes the router with the names of its teachers. source: of its backbone.

    Adapters become a PEFT folder `adapter`, a backbone that is all new a Hugging Face folder
    `backbone`. Raises ConfigError as `folder.write` and `load_config`.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    head = {name: np.ascontiguousarray(array) for name, array in router.head.items()}
    save_file(head, folder / _HEAD)
    save_file({"states": np.ascontiguousarray(router.state_ND)}, folder / _STATES)
    trained = "frozen"
    if isinstance(router.backbone, Adapters):
        trained = "lora"
        config = load_config(source)
        write_adapters(folder / _ADAPTER, router.backbone, config, source.weights, source.revision)
    elif router.backbone is not None:
        trained = "full"
        save_folder(folder / _BACKBONE, router.backbone)
    described = {
        "teachers": teachers,
        "backbone": source.weights,
        "train": trained,
        "pooling": "last token",
    }
    (folder / _DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")


def load_backbone(folder: Path, source: ModelConfig, seed: int) -> Model:
    """The backbone of the router in `folder`, with what it learned.

    source, seed: of the backbone before, as `weights.load` takes them. Raises ConfigError as that,
    and naming the file of the router that is missing or damaged.
    """
    path = folder / _DESCRIPTION
    trained = read_json(path).get("train")
    if trained == "full":
        own = ModelConfig(weights=str(folder / _BACKBONE), chat_template=source.chat_template)
        return load(own)
    model = load(source, seed)
    if trained == "lora":
        adapters = read_adapters(folder / _ADAPTER, model.config)
        return replace(model, params=merge(model.params, adapters))
    if trained != "frozen":
        raise ConfigError(f"{path}: train is {shown(trained)}, must be frozen, lora or full")
    return model


def load_router(folder: Path) -> tuple[Params, list[str], np.ndarray]:
    """(head, teachers, pooled states of the calibration prompts), as `save_router` wrote them.

    The backbone is read by `load_backbone`. Raises ConfigError naming the file that is missing or
    damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = folder / _DESCRIPTION
    try:
        teachers = list(json.loads(file.read_text())["teachers"])
        head = load_file(file := folder / _HEAD)
        kernel_MD, bias_M = head["kernel"], head["bias"]
        state_ND = load_file(file := folder / _STATES)["states"]
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{file}: not a router's: {error}") from None
    M = len(teachers)
    fits = kernel_MD.ndim == 2 and kernel_MD.shape == (M, *state_ND.shape[1:])
    if not fits or bias_M.shape != (M,):
        raise ConfigError(
            f"{folder}: kernel {kernel_MD.shape}, bias {bias_M.shape} and states {state_ND.shape} "
            f"do not fit together for {M} teachers"
        )
    return {"kernel": kernel_MD, "bias": bias_M}, teachers, state_ND
