"""Pooled states of the prompts to be routed, kept beside the routes: another strategy or another
limit reads no prompt again."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from persyn_jax import store
from persyn_jax.config import ConfigError, fingerprint
from persyn_jax.models import spec
from persyn_jax.models.router import load_backbone
from persyn_jax.models.safetensors_file import read_header
from persyn_jax.models.spec import ModelConfig
from persyn_jax.models.weights import Model
from persyn_jax.pipeline.tokens import prompt_tokens
from persyn_jax.provenance import source_fingerprint
from persyn_jax.records import Prompt
from persyn_jax.sampling.scoring import on_mesh, pooled_states

_CHUNK = 10_000  # prompts read at once, so that no more of them need be in memory
_HEADER_BYTES = 256


def kept_states(
    path: Path,
    router: Path,
    backbone: ModelConfig,
    seed: int,
    prompts: Callable[[], Iterable[Prompt]],
    mesh: Mesh,
) -> np.ndarray:
    """The backbone's pooled state of each prompt, float32[N, D], at least one: those in the file at
    `path` if they were made of the same, else made now and written there. They stay in the file
    and are read where the array is.

    router: the router's folder, which holds what its backbone learned. backbone, seed: before it
    did, as `weights.load` takes them. prompts: the same at every call.
    """
    of = _made_of(router, backbone, seed, prompts())
    if (kept_ND := _read(path, of)) is None:
        _write(path, of, _states(load_backbone(router, backbone, seed), prompts(), mesh))
        kept_ND = _read(path, of)
        assert kept_ND is not None, "it was written a moment ago"
    return kept_ND


def _states(model: Model, prompts: Iterable[Prompt], mesh: Mesh) -> Iterator[np.ndarray]:
    rest, model = iter(prompts), on_mesh(model, mesh)
    while chunk := list(islice(rest, _CHUNK)):
        yield pooled_states(model, prompt_tokens(model.tokenizer, chunk), mesh)


def keep_states(
    path: Path,
    router: Path,
    backbone: ModelConfig,
    seed: int,
    prompts: Iterable[Prompt],
    states: Iterable[np.ndarray],
) -> None:
    """Writes the states for `kept_states`: those of some prompts, those of the next, ..."""
    _write(path, _made_of(router, backbone, seed, prompts), states)


def _made_of(router: Path, backbone: ModelConfig, seed: int, prompts: Iterable[Prompt]) -> str:
    source = source_fingerprint("persyn_jax.sampling.scoring")
    learned = {path.name: _digest(path) for path in sorted(router.glob("*/*.safetensors"))}
    messages = hashlib.sha256()
    for prompt in prompts:
        messages.update(fingerprint(prompt.messages).encode())
    of = [spec.fingerprint(backbone), learned, seed, source, messages.hexdigest()]
    return fingerprint(of)


def _write(path: Path, of: str, states: Iterable[np.ndarray]) -> None:
    """A safetensors file. Its header says how many there are, so it is written last."""
    with store.writing(path) as file:
        file.write(bytes(_HEADER_BYTES))
        shape = [0, 0]
        for state_ND in states:
            file.write(np.ascontiguousarray(state_ND, "<f4").data)
            shape = [shape[0] + len(state_ND), state_ND.shape[1]]
        size = file.tell() - _HEADER_BYTES
        tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
        header = json.dumps({"__metadata__": {"of": of}, "states": tensor}).encode()
        file.seek(0)
        file.write((_HEADER_BYTES - 8).to_bytes(8, "little") + header.ljust(_HEADER_BYTES - 8))


def in_blocks(seen_ND: np.ndarray, rest_ND: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """The states of both, one after the other, so many at a time: (their rows, states)."""
    first = len(seen_ND)
    for start in range(0, first + len(rest_ND), _CHUNK):
        stop = start + _CHUNK
        rest = slice(max(start - first, 0), max(stop - first, 0))
        yield slice(start, stop), np.concatenate([seen_ND[start:stop], rest_ND[rest]])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, of: str) -> np.ndarray | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            if file.metadata() != {"of": of}:
                return None
        tensor = read_header(path)["states"]
    except (OSError, SafetensorError, ConfigError, KeyError):
        return None  # none yet, or damaged: it is made again
    return np.memmap(path, "<f4", "r", tensor.offset, tensor.shape)
