"""Pooled states of the prompts to be routed, kept beside the routes: another strategy or another
limit reads no prompt again."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from persyn_jax import store
from persyn_jax.config import fingerprint
from persyn_jax.models import spec
from persyn_jax.models.router import load_backbone
from persyn_jax.models.spec import ModelConfig
from persyn_jax.pipeline.tokens import prompt_tokens
from persyn_jax.provenance import source_fingerprint
from persyn_jax.records import Prompt
from persyn_jax.sampling.scoring import pooled_states


def kept_states(
    path: Path,
    router: Path,
    backbone: ModelConfig,
    seed: int,
    prompts: Sequence[Prompt],
    mesh: Mesh,
) -> np.ndarray:
    """The backbone's pooled state of each prompt, float32[N, D]: those in the file at `path` if
    they were made of the same, else made now and written there.

    router: the router's folder, which holds what its backbone learned. backbone, seed: before it
    did, as `weights.load` takes them.
    """
    of = _made_of(router, backbone, seed, prompts)
    if (kept_ND := _read(path, of)) is not None:
        return kept_ND
    model = load_backbone(router, backbone, seed)
    state_ND = pooled_states(model, prompt_tokens(model.tokenizer, prompts), mesh)
    keep_states(path, router, backbone, seed, prompts, state_ND)
    return state_ND


def keep_states(
    path: Path,
    router: Path,
    backbone: ModelConfig,
    seed: int,
    prompts: Sequence[Prompt],
    state_ND: np.ndarray,
) -> None:
    """Writes the states for `kept_states`."""
    from safetensors.numpy import save

    of = _made_of(router, backbone, seed, prompts)
    store.write_bytes(path, save({"states": np.ascontiguousarray(state_ND)}, {"of": of}))


def _made_of(router: Path, backbone: ModelConfig, seed: int, prompts: Sequence[Prompt]) -> str:
    source = source_fingerprint("persyn_jax.sampling.scoring")
    learned = {path.name: _digest(path) for path in sorted(router.glob("*/*.safetensors"))}
    messages = [prompt.messages for prompt in prompts]
    return fingerprint([spec.fingerprint(backbone), learned, seed, source, messages])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, of: str) -> np.ndarray | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return file.get_tensor("states") if file.metadata() == {"of": of} else None
    except (OSError, SafetensorError):  # none yet, or damaged: it is made again
        return None
