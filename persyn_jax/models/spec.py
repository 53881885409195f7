"""Where a model comes from, by config and on the disk, and its fingerprint. Imports no JAX."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from persyn_jax.config import ConfigError, config_class

# What decides a model's answers, and so all that is taken from a Hugging Face folder: weights,
# config, tokenizer, chat template.
_FOLDER_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


@config_class
class ModelConfig:
    """Where a model comes from."""

    weights: str
    """`package:NAME` (a GGUF file inside an installed Python package), the path of a *.gguf file or
    of a Hugging Face folder, a hub id (`owner/name`), or `random:tiny` (random weights, for
    tests)."""
    revision: str | None = None
    """Commit or tag of a hub id; null is the hub's default branch."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Expected SHA-256 of the weight file (of a folder: of its only *.safetensors); null takes what
    is there."""


def locate(model: ModelConfig) -> Path | None:
    """The file or folder with the weights; None for random ones. Fetches a hub id on first use.

    Raises ConfigError when there is nothing there.
    """
    spec = model.weights
    if spec == "random:tiny":
        return None
    if spec.startswith("package:"):
        return _package_file(spec.removeprefix("package:"))
    if (path := Path(spec)).exists():
        return path
    if spec.count("/") == 1 and not spec.startswith((".", "~", "/")) and not spec.endswith(".gguf"):
        return _hub_folder(spec, model.revision)
    raise ConfigError(
        f"model {spec!r}: no such file or folder (allowed: package:NAME, a *.gguf file, "
        "a Hugging Face folder, a hub id owner/name, random:tiny)"
    )


def _package_file(package: str) -> Path:
    module = package.replace("-", "_")
    # The package is found, never imported: only its data is wanted.
    found = importlib.util.find_spec(module) if module.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"model 'package:{package}': the Python package is not installed")
    files = sorted(Path(found.submodule_search_locations[0]).rglob("*.gguf"))
    if len(files) != 1:
        raise ConfigError(f"model 'package:{package}': holds {len(files)} GGUF files, must be 1")
    return files[0]


def _hub_folder(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=list(_FOLDER_FILES))
    except Exception as error:  # many kinds: no network, no such repository, gated, bad revision
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"model {hub_id!r}: not to be had from the hub: {reason}") from None
    return Path(folder)


def fingerprint(model: ModelConfig) -> str:
    """SHA-256 over all files that decide the model's answers; `random:tiny` for random weights.

    A GGUF file may be renamed or moved without changing it. Raises ConfigError when the weights do
    not have `model.sha256`.
    """
    path = locate(model)
    if path is None:
        return model.weights
    if path.is_file():
        digest = _file_sha256(path)
        _check_sha256(model, path, [digest])
        return digest
    digests = {file: _file_sha256(file) for file in _folder_files(path)}
    _check_sha256(model, path, [digests[file] for file in weight_files(path)])
    named = {file.name: digest for file, digest in digests.items()}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _check_sha256(model: ModelConfig, path: Path, found: list[str]) -> None:
    if model.sha256 is not None and found != [model.sha256]:
        raise ConfigError(
            f"{path}: SHA-256 of the weights is {', '.join(found)}, expected {model.sha256}: "
            "damaged, or another model"
        )


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _folder_files(folder: Path) -> list[Path]:
    return sorted(file for pattern in _FOLDER_FILES for file in folder.glob(pattern))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder. Raises ConfigError if it has none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder}: holds no *.safetensors file")
    return files


def positive_int(value: object, where: str, most: int = 1 << 20) -> int:
    """`value`, read from a model file, if it is an integer from 1 to `most`; else ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{where} is {value!r}, must be an integer from 1 to {most}")
    return value


def positive_float(value: object, where: str) -> float:
    """`value`, read from a model file, if it is a finite number above 0; else ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ConfigError(f"{where} is {value!r}, must be a finite number above 0")
    return float(value)
