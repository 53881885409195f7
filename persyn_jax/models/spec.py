"""Where a model comes from, by config and on the disk, and its fingerprint. Imports no JAX."""

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

from persyn_jax.config import ConfigError, config_class
from persyn_jax.models.file_checks import positive_float, positive_int, read_json, shown
from persyn_jax.models.safetensors_file import weight_files

# `weights` takes these from here.
__all__ = [
    "ModelConfig",
    "commit",
    "fingerprint",
    "locate",
    "positive_float",
    "positive_int",
    "read_chat_template",
    "weight_files",
]

_LONGEST_TEMPLATE = 1 << 20  # bytes
_COMMIT = re.compile("[0-9a-f]{40}")
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
    """Commit or tag of a hub id; null is the hub's default branch. Only a commit stays the same:
    `commit` tells which it was."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Expected SHA-256 of the weight file; null takes what is there. Of several *.safetensors files
    of a folder: that of the JSON object of their names and SHA-256, names sorted, as Python's
    `json.dumps(..., sort_keys=True)` writes it (a wrong one ends in a message with the right
    one)."""
    chat_template: Path | None = None
    """Jinja file that takes the place of the model's own chat template. Models without one, base
    models for the most part, need it; where the model wants BOS, the template must write it:
    `{{ bos_token }}`."""


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
        return _no_adapter(spec, path)
    if _is_hub_id(spec):
        return _no_adapter(spec, _hub_folder(spec, model.revision))
    raise ConfigError(
        f"model {spec!r}: no such file or folder (allowed: package:NAME, a *.gguf file, "
        "a Hugging Face folder, a hub id owner/name, random:tiny)"
    )


def _no_adapter(spec: str, path: Path) -> Path:
    adapter = path / "adapter_config.json"
    if adapter.exists() and not (path / "config.json").exists():
        base = read_json(adapter).get("base_model_name_or_path")
        raise ConfigError(
            f"model {spec!r}: a PEFT adapter of {shown(base)}, not a whole model: merge the "
            "two and name the folder that this makes"
        )
    return path


def _is_hub_id(spec: str) -> bool:
    path_like = spec.startswith((".", "~", "/")) or spec.endswith(".gguf") or Path(spec).exists()
    return spec.count("/") == 1 and not path_like and not spec.startswith("package:")


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


def commit(model: ModelConfig) -> str | None:
    """The commit that a hub id stands for, to be recorded; None for what is no hub id.

    The fingerprint does not hold it: two commits with the same files are the same model.
    """
    if not _is_hub_id(model.weights):
        return None
    # The hub's cache names the folder of a snapshot after its commit.
    folder = locate(model)
    return folder.name if folder is not None and _COMMIT.fullmatch(folder.name) else None


def read_chat_template(model: ModelConfig) -> str | None:
    """The text of `model.chat_template`; None when there is no such file to take.

    Raises ConfigError when it cannot be read.
    """
    if (path := model.chat_template) is None:
        return None
    try:
        with path.open("rb") as file:
            data = file.read(_LONGEST_TEMPLATE + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"chat_template {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"chat_template {path}: not UTF-8 text") from None
    if not text or len(data) > _LONGEST_TEMPLATE:
        raise ConfigError(
            f"chat_template {path}: has {len(data)} bytes or more, must be 1 to {_LONGEST_TEMPLATE}"
        )
    return text


def fingerprint(model: ModelConfig) -> str:
    """SHA-256 over all that decides the model's answers; `random:tiny` for random weights.

    That is the weights, config, tokenizer and chat template. A GGUF file may be renamed or moved
    without changing it. Raises ConfigError when the weights do not have `model.sha256`.
    """
    path = locate(model)
    if path is None:
        digest = model.weights
    elif path.is_file():
        digest = _file_sha256(path)
        _check_sha256(model, path, digest)
    else:
        digests = {file.name: _file_sha256(file) for file in _folder_files(path)}
        weights = {file.name: digests[file.name] for file in weight_files(path)}
        only = next(iter(weights.values())) if len(weights) == 1 else _json_sha256(weights)
        _check_sha256(model, path, only)
        digest = _json_sha256(digests)
    template = read_chat_template(model)
    return digest if template is None else _json_sha256({"model": digest, "template": template})


def _check_sha256(model: ModelConfig, path: Path, found: str) -> None:
    if model.sha256 is not None and found != model.sha256:
        raise ConfigError(
            f"{path}: SHA-256 of the weights is {found}, expected {model.sha256}: "
            "damaged, or another model"
        )


def _json_sha256(values: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _folder_files(folder: Path) -> list[Path]:
    return sorted(file for pattern in _FOLDER_FILES for file in folder.glob(pattern))
