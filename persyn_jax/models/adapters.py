"""LoRA adapters: made, put beside the kernels they adapt, merged into them, and PEFT folders.

Adapters are a tree of their own, float32, layers stacked::

    {"layers": {"q": {"lora_a": [L, r, in], "lora_b": [L, out, r]}, ...}}

with a part for each target. With scale = alpha / r, a kernel W is used as W + scale lora_b lora_a
(LoRA, arXiv 2106.09685). A PEFT folder holds `adapter_config.json` and `adapter_model.safetensors`,
as PEFT 0.21 writes and reads them (`tuners/lora/config.py`, `utils/save_and_load.py`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.models import decoder, safetensors_file
from persyn_jax.models.decoder import DecoderConfig, Params
from persyn_jax.models.file_checks import positive_float, positive_int, read_json, shown
from persyn_jax.models.folder import FUSED_PARTS, KERNEL_MODULES
from persyn_jax.streams import numpy_stream

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_THEIRS = {"lora_a": "lora_A", "lora_b": "lora_B"}
# Of `adapter_config.json`: what an adapter that is more than two factors beside a kernel would say.
_PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
}


class Adapters(NamedTuple):
    """Adapters and what they are multiplied by."""

    params: Params
    alpha: float

    @property
    def scale(self) -> float:
        """`lora_scale` of a `DecoderConfig`."""
        return self.alpha / jax.tree.leaves(self.params)[0].shape[1]  # lora_a: [L, r, in]


def adapter_shapes(config: DecoderConfig, rank: int, targets: Sequence[str]) -> Params:
    """The shapes of adapters. targets: parts of a layer with a kernel.

    Raises ConfigError for a target that the family's files have no kernel of its own for.
    """
    if config.family == "phi3" and (fused := [part for part in targets if part in FUSED_PARTS]):
        raise ConfigError(
            f"lora.targets: {fused[0]!r} is part of a larger tensor in a phi3 model's files, "
            "which has no place for its adapter; allowed: o, down"
        )
    layers = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))["layers"]

    def pair(part: str) -> Params:
        L, out, into = layers[part]["kernel"].shape
        shapes = {"lora_a": (L, rank, into), "lora_b": (L, out, rank)}
        return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}

    return {"layers": {part: pair(part) for part in targets}}


def init_adapters(
    config: DecoderConfig, rank: int, targets: Sequence[str], seed: int, purpose: str
) -> Params:
    """Adapters that change nothing yet, as NumPy: lora_b is 0, lora_a uniform within 1 / sqrt(in).

    So does PEFT (`init_lora_weights`). purpose: names the random stream. Raises ConfigError as
    `adapter_shapes`.
    """

    def start(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        part, name = (key.key for key in path[1:])
        if name == "lora_b":
            return np.zeros(shape.shape, np.float32)
        most, draw = shape.shape[-1] ** -0.5, numpy_stream(seed, f"{purpose} {part}")
        return draw.uniform(-most, most, shape.shape).astype(np.float32)

    return jax.tree.map_with_path(start, adapter_shapes(config, rank, targets))


def with_adapters(params: Params, adapters: Params) -> Params:
    """The parameters with `adapters` beside their kernels; or the like of trees of shardings."""
    added = adapters["layers"]
    layers = {part: leaves | added.get(part, {}) for part, leaves in params["layers"].items()}
    return params | {"layers": layers}


def merge(params: Params, adapters: Adapters) -> Params:
    """Parameters that do without adapters what `params` does with them. All are NumPy."""
    layers = dict(params["layers"])
    for part, pair in adapters.params["layers"].items():
        product = adapters.scale * (pair["lora_b"] @ pair["lora_a"])
        kernel = layers[part]["kernel"]
        layers[part] = layers[part] | {"kernel": (kernel + product).astype(kernel.dtype)}
    return params | {"layers": layers}


def write_adapters(folder: Path, adapters: Adapters, base: str, revision: str | None) -> None:
    """Writes a folder that PEFT loads over its base. adapters: NumPy.

    base, revision: what the folder calls the model that it adapts. PEFT fetches it by that name if
    it is a hub id or a folder.
    """
    from safetensors.numpy import save_file

    parts = adapters.params["layers"]
    tensors = {
        _tensor_name(part, leaf, i): np.ascontiguousarray(array)
        for part, pair in parts.items()
        for leaf, stack in pair.items()
        for i, array in enumerate(stack)
    }
    described = _PLAIN | {
        "base_model_name_or_path": base,
        "revision": revision,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": next(iter(parts.values()))["lora_a"].shape[1],
        "lora_alpha": adapters.alpha,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "target_modules": sorted(KERNEL_MODULES[part].rpartition(".")[2] for part in parts),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _WEIGHTS).chmod(0o644)  # the writer makes it private
    (folder / _CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", "utf-8")


def read_adapters(folder: Path, config: DecoderConfig) -> Adapters:
    """The adapters in a PEFT folder, for a model of this shape, as NumPy.

    Raises ConfigError naming the file that is missing, damaged, of another model, or of a kind that
    is more than two factors beside a kernel.
    """
    path = folder / _CONFIG
    described = read_json(path)
    for key, plain in _PLAIN.items():
        if (value := described.get(key, plain)) not in (plain, plain or None):
            raise ConfigError(f"{path}: {key} is {shown(value)}, must be {plain!r}")
    rank = positive_int(described.get("r"), f"{path}: r")
    alpha = positive_float(described.get("lora_alpha"), f"{path}: lora_alpha")
    weights = safetensors_file.open_folder(folder)
    targets = [
        part for part in KERNEL_MODULES if _tensor_name(part, "lora_a", 0) in weights.tensors
    ]
    if not targets:
        raise ConfigError(f"{folder}: holds no adapter of a {config.family} decoder")
    layers = range(config.layers)
    used = {_tensor_name(part, leaf, i) for part in targets for leaf in _THEIRS for i in layers}
    if unused := sorted(set(weights.tensors) - used):
        raise ConfigError(
            f"{folder}: tensor {unused[0]!r} has no place in an adapter of a {config.family} "
            f"decoder with {config.layers} layers"
        )

    def stack(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        part, leaf = (key.key for key in path[1:])
        wanted = shape.shape[1:]
        return np.stack([weights.read(_tensor_name(part, leaf, i), wanted) for i in layers])

    return Adapters(jax.tree.map_with_path(stack, adapter_shapes(config, rank, targets)), alpha)


def _tensor_name(part: str, leaf: str, layer: int) -> str:
    module = f"model.layers.{layer}.{KERNEL_MODULES[part]}"
    return f"base_model.model.{module}.{_THEIRS[leaf]}.weight"
