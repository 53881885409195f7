"""Where a model comes from: as a config says it, on the disk, and its fingerprint. Light: imports no JAX."""

import hashlib
import importlib.util
import json
from pathlib import Path

from persyn_jax.config import ConfigError, config_class


@config_class
class ModelConfig:
    """Where a model comes from."""

    weights: str
    """`package:NAME` (a GGUF file inside an installed Python package), the path of a *.gguf file or
    of a Hugging Face folder, a hub id (`owner/name`), or `random:tiny` (random weights, for tests)."""
    revision: str | None = None
    """Commit or tag of a hub id; null is the hub's default branch."""
    sha256: str | None = None
    """Expected SHA-256 of the weight file (of a folder: of its only *.safetensors); null takes what
    is there."""


def locate(model: ModelConfig) -> Path | None:
    """The file or folder that holds the weights; None for random ones. Downloads a hub id on first use.

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
        f"model {spec!r}: no such file or folder (allowed: package:NAME, a *.gguf file, a Hugging Face folder, "
        "a hub id owner/name, random:tiny)"
    )


def _package_file(package: str) -> Path:
    # The package is found, never imported: only its data is wanted.
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"model 'package:{package}': the Python package is not installed")
    files = sorted(Path(found.submodule_search_locations[0]).rglob("*.gguf"))
    if len(files) != 1:
        raise ConfigError(f"model 'package:{package}': holds {len(files)} GGUF files, must be 1")
    return files[0]


def _hub_folder(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
    except Exception as error:  # many kinds: no network, no such repository, gated, bad revision
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model {hub_id!r}: not to be had from the hub: {reason}") from None


def fingerprint(model: ModelConfig) -> str:
    """SHA-256 of the weight files, so that a stage knows when its model has changed. Checks `model.sha256`."""
    path = locate(model)
    if path is None:
        return model.weights
    files = weight_files(path) if path.is_dir() else [path]
    digests = {file.name: _file_sha256(file) for file in files}
    if model.sha256 is not None and [model.sha256] != list(digests.values()):
        raise ConfigError(
            f"{path}: SHA-256 is {', '.join(digests.values())}, expected {model.sha256}: damaged or another model"
        )
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder. Raises ConfigError if it has none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder}: holds no *.safetensors file")
    return files
