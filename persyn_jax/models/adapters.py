"""LoRA adapters: made, put beside the kernels they adapt, merged into them, and PEFT folders.

Adapters are a tree of their own, float32, layers stacked::

    {"layers": {"q": {"lora_a": [L, r, in], "lora_b": [L, out, r]}, ...}}

with a part for each target. With scale = alpha / r, a kernel W is used as W + scale lora_b lora_a
(LoRA, arXiv 2106.09685). A PEFT folder holds `adapter_config.json` and `adapter_model.safetensors`,
as PEFT 0.21 writes and reads them (`tuners/lora/config.py`, `utils/save_and_load.py`).

Where a family's files have the kernels of n parts as one, W = [W_1; ...; W_n], the adapter there is
that of the parts side by side: rank n r and alpha n alpha, with lora_a = [A_1; ...; A_n] and lora_b
block-diagonal, so that lora_b lora_a = [B_1 A_1; ...; B_n A_n].
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.models import decoder, safetensors_file
from persyn_jax.models.decoder import DecoderConfig, Params
from persyn_jax.models.file_checks import positive_float, positive_int, read_json, shown
from persyn_jax.models.folder import FUSED_MODULES, KERNEL_MODULES
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

    Raises ConfigError for targets that are only some of those whose kernels are one in the family's
    files.
    """
    for parts in _modules(config, targets).values():
        if missing := [part for part in parts if part not in targets]:
            raise ConfigError(
                f"lora.targets: {', '.join(parts)} are one tensor in a {config.family} model's "
                f"files, so all or none of them; {missing[0]!r} is missing"
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


def write_adapters(
    folder: Path, adapters: Adapters, config: DecoderConfig, base: str, revision: str | None
) -> None:
    """Writes a folder that PEFT loads over its base. adapters: NumPy, of a model of this shape.

    base, revision: what the folder calls the model that it adapts. PEFT fetches it by that name if
    it is a hub id or a folder.
    """
    from safetensors.numpy import save_file

    layers = adapters.params["layers"]
    modules, rank = _modules(config, layers), next(iter(layers.values()))["lora_a"].shape[1]
    tensors = {}
    for module, parts in modules.items():
        pair = {
            "lora_a": np.concatenate([layers[part]["lora_a"] for part in parts], axis=1),
            "lora_b": _block_diagonal([layers[part]["lora_b"] for part in parts]),
        }
        for leaf, stack in pair.items():
            for i, array in enumerate(stack):
                tensors[_tensor_name(module, leaf, i)] = np.ascontiguousarray(array)
    described = _PLAIN | _patterns(modules, rank, adapters.alpha)
    described |= {
        "base_model_name_or_path": base,
        "revision": revision,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "target_modules": sorted(module.rpartition(".")[2] for module in modules),
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
    _check_described(path, described, _PLAIN)
    rank = positive_int(described.get("r"), f"{path}: r")
    alpha = positive_float(described.get("lora_alpha"), f"{path}: lora_alpha")
    weights = safetensors_file.open_folder(folder)
    modules = {
        module: parts
        for module, parts in _modules(config, KERNEL_MODULES).items()
        if _tensor_name(module, "lora_a", 0) in weights.tensors
    }
    if not modules:
        raise ConfigError(f"{folder}: holds no adapter of a {config.family} decoder")
    patterns = _patterns(modules, rank, alpha)
    _check_described(path, {key: {} for key in patterns} | described, patterns)
    layers = range(config.layers)
    used = {_tensor_name(module, leaf, i) for module in modules for leaf in _THEIRS for i in layers}
    if unused := sorted(set(weights.tensors) - used):
        raise ConfigError(
            f"{folder}: tensor {unused[0]!r} has no place in an adapter of a {config.family} "
            f"decoder with {config.layers} layers"
        )

    def stack(module: str, leaf: str, *shape: int) -> np.ndarray:
        return np.stack([weights.read(_tensor_name(module, leaf, i), shape) for i in layers])

    targets = [part for parts in modules.values() for part in parts]
    shapes, found = adapter_shapes(config, rank, targets)["layers"], {}
    for module, parts in sorted(modules.items()):
        ranks, into = len(parts) * rank, shapes[parts[0]]["lora_a"].shape[2]
        outs = [shapes[part]["lora_b"].shape[1] for part in parts]
        lora_a = np.split(stack(module, "lora_a", ranks, into), len(parts), axis=1)
        whole_b = stack(module, "lora_b", sum(outs), ranks)
        rows = np.split(whole_b, np.cumsum(outs)[:-1], axis=1)
        lora_b = [np.split(own, len(parts), axis=2)[place] for place, own in enumerate(rows)]
        if np.count_nonzero(whole_b) > sum(map(np.count_nonzero, lora_b)):
            raise ConfigError(
                f"{folder}: lora_B of {module} is not block-diagonal, so its parts "
                f"{', '.join(parts)} have no adapters of their own"
            )
        for part, a, b in zip(parts, lora_a, lora_b, strict=True):
            found[part] = {"lora_a": a, "lora_b": b}
    return Adapters({"layers": found}, alpha)


def _modules(config: DecoderConfig, targets: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The modules of the family's files that hold kernels of `targets`, each with all its parts."""
    fused = FUSED_MODULES if config.family == "phi3" else {}
    module_of = {part: module for module, parts in fused.items() for part in parts}
    names = [module_of.get(part, KERNEL_MODULES[part]) for part in targets]
    own = {module: (part,) for part, module in KERNEL_MODULES.items()} | fused
    return {name: own[name] for name in names}


def _patterns(
    modules: Mapping[str, Sequence[str]], rank: int, alpha: float
) -> dict[str, dict[str, Any]]:
    """Of `adapter_config.json`: rank and alpha where they are not those of the others."""
    several = {
        module.rpartition(".")[2]: len(parts) for module, parts in modules.items() if parts[1:]
    }
    return {
        "rank_pattern": {name: count * rank for name, count in several.items()},
        "alpha_pattern": {name: count * alpha for name, count in several.items()},
    }


def _check_described(path: Path, described: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, plain in wanted.items():
        if (value := described.get(key, plain)) not in (plain, plain or None):
            raise ConfigError(f"{path}: {key} is {shown(value)}, must be {plain!r}")


def _block_diagonal(blocks_LOR: Sequence[np.ndarray]) -> np.ndarray:
    """[L, sum of O, n R]: block k in the columns from k R on, 0 elsewhere."""
    last, R = len(blocks_LOR) - 1, blocks_LOR[0].shape[2]
    padded = [
        np.pad(block, ((0, 0), (0, 0), (place * R, (last - place) * R)))
        for place, block in enumerate(blocks_LOR)
    ]
    return np.concatenate(padded, axis=1)


def _tensor_name(module: str, leaf: str, layer: int) -> str:
    return f"base_model.model.model.layers.{layer}.{module}.{_THEIRS[leaf]}.weight"
