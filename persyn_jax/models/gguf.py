"""Reads a GGUF file of the `llama` architecture. Every count, length and offset is checked before it is used.

The metadata parser is ours because it must not trust the file (and the `gguf` package's takes seconds on a vocabulary);
the block formats are that package's.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.models.decoder import DecoderConfig

# GGUF value types 0-12 that have a fixed size, as struct formats.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_LAYER_NAMES = {
    "attn_norm": ("attention_norm", "scale"),
    "ffn_norm": ("mlp_norm", "scale"),
    "attn_q": ("q", "kernel"),
    "attn_k": ("k", "kernel"),
    "attn_v": ("v", "kernel"),
    "attn_output": ("o", "kernel"),
    "ffn_gate": ("gate", "kernel"),
    "ffn_up": ("up", "kernel"),
    "ffn_down": ("down", "kernel"),
}


@dataclass(frozen=True)
class GgufFile:
    """A parsed file: metadata, and for every tensor (GGML type, NumPy shape, offset in the file, bytes)."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, tuple[int, ...], int, int]]

    def tensor(self, name: str) -> np.ndarray:
        """The tensor as float32 in NumPy order (the last axis varies fastest)."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        if name not in self.tensors:
            raise ConfigError(f"{self.path}: tensor {name!r} is missing")
        ggml_type, shape, offset, size = self.tensors[name]
        raw = np.fromfile(self.path, np.uint8, size, offset=offset)
        kind = GGMLQuantizationType(ggml_type)
        if kind is GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(shape)
        rows = raw.reshape(*shape[:-1], -1)
        return dequantize(rows, kind).astype(np.float32, copy=False).reshape(shape)


class _Cursor:
    """A position in the file that never reads past its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.position = path, data, 0

    def take(self, size: int, what: str) -> bytes:
        if size > len(self.data) - self.position:
            left = len(self.data) - self.position
            raise ConfigError(f"{self.path}: {what} needs {size} bytes and {left} are left: damaged?")
        self.position += size
        return self.data[self.position - size : self.position]

    def scalar(self, fmt: str, what: str) -> Any:
        return struct.unpack("<" + fmt, self.take(struct.calcsize("<" + fmt), what))[0]

    def string(self, what: str) -> str:
        return self.take(self.scalar("Q", what), what).decode("utf-8", errors="replace")

    def value(self, value_type: int, what: str) -> Any:
        if value_type in _SCALARS:
            return self.scalar(_SCALARS[value_type], what)
        if value_type == _STRING:
            return self.string(what)
        if value_type != _ARRAY:
            raise ConfigError(f"{self.path}: {what} has unknown value type {value_type}: damaged?")
        item_type, count = self.scalar("I", what), self.scalar("Q", what)
        if item_type in _SCALARS:
            fmt = _SCALARS[item_type]
            raw = self.take(count * struct.calcsize("<" + fmt), what)
            return list(struct.unpack(f"<{count}{fmt}", raw))
        if count > len(self.data) - self.position:  # an item takes at least one byte
            raise ConfigError(f"{self.path}: {what} claims {count} items: damaged?")
        return [self.value(item_type, what) for _ in range(count)]


def read(path: Path) -> GgufFile:
    """Parses the header. Raises ConfigError naming the file and the field that is wrong."""
    with path.open("rb") as file:
        if path.stat().st_size < 24 or file.read(4) != b"GGUF":
            raise ConfigError(f"{path}: not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(path, data)
            cursor.take(4, "magic")
            version = cursor.scalar("I", "version")
            if version not in (2, 3):
                raise ConfigError(f"{path}: GGUF version {version}; 2 and 3 are supported")
            tensor_count, value_count = cursor.scalar("Q", "count"), cursor.scalar("Q", "count")
            metadata = {}
            for _ in range(value_count):
                key = cursor.string("metadata key")
                metadata[key] = cursor.value(cursor.scalar("I", key), f"metadata {key!r}")
            infos = [_tensor_info(cursor) for _ in range(tensor_count)]
            return GgufFile(path, metadata, _place_tensors(cursor, metadata, infos))


def _tensor_info(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.string("tensor name")
    dimensions = cursor.scalar("I", f"tensor {name!r}")
    if not 1 <= dimensions <= 4:
        raise ConfigError(f"{cursor.path}: tensor {name!r} has {dimensions} dimensions: damaged?")
    shape = tuple(cursor.scalar("Q", f"tensor {name!r}") for _ in range(dimensions))[::-1]
    return name, cursor.scalar("I", name), shape, cursor.scalar("Q", name)


def _place_tensors(cursor: _Cursor, metadata, infos) -> dict[str, tuple[int, tuple[int, ...], int, int]]:
    from gguf.constants import GGML_QUANT_SIZES

    path, alignment = cursor.path, metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ConfigError(f"{path}: general.alignment {alignment!r} is no power of two up to 2**20")
    start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, ggml_type, shape, offset in infos:
        if ggml_type not in GGML_QUANT_SIZES:
            raise ConfigError(f"{path}: tensor {name!r} has unknown GGML type {ggml_type}")
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        elements = 1
        for length in shape:
            elements *= length  # Python integers: cannot overflow
        size = elements // block * block_bytes
        if shape[-1] % block or start + offset + size > len(cursor.data):
            raise ConfigError(f"{path}: tensor {name!r} {shape} does not fit in the file: damaged?")
        tensors[name] = (ggml_type, shape, start + offset, size)
    return tensors


def decoder_config(file: GgufFile) -> DecoderConfig:
    """The decoder's shape from the metadata. Raises ConfigError for another architecture or a missing key."""
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(f"{file.path}: architecture {architecture!r}; supported from GGUF: 'llama'")

    def get(key: str) -> Any:
        if (full := f"llama.{key}") not in file.metadata:
            raise ConfigError(f"{file.path}: metadata {full!r} is missing")
        return file.metadata[full]

    heads, d_model = get("attention.head_count"), get("embedding_length")
    if "token_embd.weight" not in file.tensors:
        raise ConfigError(f"{file.path}: tensor 'token_embd.weight' is missing")
    return DecoderConfig(
        vocab_size=file.tensors["token_embd.weight"][1][0],
        layers=get("block_count"),
        d_model=d_model,
        d_ff=get("feed_forward_length"),
        heads=heads,
        kv_heads=get("attention.head_count_kv"),
        head_dim=d_model // heads,
        rope_theta=float(get("rope.freq_base")),
        norm_eps=float(get("attention.layer_norm_rms_epsilon")),
        tied_embeddings="output.weight" not in file.tensors,
        max_positions=get("context_length"),
    )


def decoder_params(file: GgufFile, config: DecoderConfig) -> dict[str, Any]:
    """All parameters as float32 NumPy arrays in the decoder's layout, layers stacked."""

    def layer_tensor(index: int, name: str) -> np.ndarray:
        array = file.tensor(f"blk.{index}.{name}.weight")
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name)
        if heads is None:
            return array
        # This architecture's q and k rows are stored for interleaved RoPE; ours is rotate-half.
        return array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)

    layers: dict[str, Any] = {}
    for name, (module, leaf) in _LAYER_NAMES.items():
        stack = np.stack([layer_tensor(index, name) for index in range(config.layers)])
        layers.setdefault(module, {})[leaf] = stack
    params = {
        "embed": {"embedding": file.tensor("token_embd.weight")},
        "layers": layers,
        "final_norm": {"scale": file.tensor("output_norm.weight")},
    }
    if not config.tied_embeddings:
        params["head"] = {"kernel": file.tensor("output.weight")}
    return params
