"""The router: a language model whose LM head is replaced by a coefficient head (PerSyn, section 3; as in
Prompt-to-Leaderboard, arXiv 2502.14855).

The backbone reads the prompt through the chat template; the final hidden state of its last token, through one linear
layer, gives one Bradley-Terry coefficient per teacher.
"""

import json
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.models.decoder import Params


class CoefficientHead(nn.Module):
    """pooled [B, D] -> Bradley-Terry coefficients [B, M]."""

    teachers: int

    @nn.compact
    def __call__(self, pooled_BD: jax.Array) -> jax.Array:
        # Zeros: before training no teacher is preferred.
        kernel_MD = self.param("kernel", nn.initializers.zeros, (self.teachers, pooled_BD.shape[-1]))
        bias_M = self.param("bias", nn.initializers.zeros, (self.teachers,))
        return pooled_BD @ kernel_MD.T + bias_M[None]


def init_head(teachers: int, d_model: int) -> Params:
    """The parameters of an untrained head: {"kernel": [M, D], "bias": [M]}, float32 zeros."""
    return CoefficientHead(teachers).init(jax.random.key(0), jnp.zeros((1, d_model)))["params"]


def coefficients(params: Params, pooled_BD: jax.Array) -> jax.Array:
    """One coefficient per teacher and prompt, float32 [B, M]. Only differences within a row mean something."""
    chex.assert_rank(pooled_BD, 2)
    return CoefficientHead(params["bias"].shape[0]).apply({"params": params}, pooled_BD)


def save_router(
    folder: Path, head: Params, teachers: list[str], backbone: str, state_ND: np.ndarray
) -> None:
    """Writes the head with the teachers it knows, and the pooled states of the calibration prompts.

    state_ND: so that the calibration prompts need not be read again to be routed.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in head.items()}
    save_file(arrays, folder / "head.safetensors")
    save_file({"states": np.ascontiguousarray(state_ND)}, folder / "calibration_states.safetensors")
    described = {"teachers": teachers, "backbone": backbone, "pooling": "last token"}
    (folder / "router.json").write_text(json.dumps(described, indent=2) + "\n")


def load_router(folder: Path) -> tuple[Params, list[str], np.ndarray]:
    """(head, teachers, pooled states of the calibration prompts). Raises ConfigError naming the file that is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        teachers = json.loads((folder / "router.json").read_text())["teachers"]
        head = load_file(folder / "head.safetensors")
        states = load_file(folder / "calibration_states.safetensors")["states"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{folder}: not a router: {error}") from None
    if head["bias"].shape != (len(teachers),):
        raise ConfigError(f"{folder}: the head has {head['bias'].shape[0]} outputs for {len(teachers)} teachers")
    return head, teachers, states
