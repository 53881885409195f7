"""Reads a GGUF file of the `llama` architecture. Every count, length and offset is checked first.

The metadata parser is ours because it must not trust the file (and the `gguf` package's takes
seconds on a vocabulary); the block formats are that package's.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.models.decoder import DecoderConfig
from persyn_jax.models.spec import positive_float, positive_int

# Value types of a fixed size, as struct and NumPy know them.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
# More tensors or metadata entries than any model has; damaged counts stop here.
_MOST_ENTRIES = 1 << 16

# Where each parameter of the decoder stands; {} is the number of the layer.
PARAMETER_NAMES = {
    "embed": {"embedding": "token_embd.weight"},
    "layers": {
        "attention_norm": {"scale": "blk.{}.attn_norm.weight"},
        "mlp_norm": {"scale": "blk.{}.ffn_norm.weight"},
        "q": {"kernel": "blk.{}.attn_q.weight"},
        "k": {"kernel": "blk.{}.attn_k.weight"},
        "v": {"kernel": "blk.{}.attn_v.weight"},
        "o": {"kernel": "blk.{}.attn_output.weight"},
        "gate": {"kernel": "blk.{}.ffn_gate.weight"},
        "up": {"kernel": "blk.{}.ffn_up.weight"},
        "down": {"kernel": "blk.{}.ffn_down.weight"},
    },
    "final_norm": {"scale": "output_norm.weight"},
    "head": {"kernel": "output.weight"},
}


class Tensor(NamedTuple):
    """Where a tensor stands in the file. `shape` is NumPy's: the last axis varies fastest."""

    ggml_type: int
    shape: tuple[int, ...]
    offset: int
    size: int
    """Bytes."""


@dataclass(frozen=True)
class GgufFile:
    """A parsed file. Metadata arrays are lists of strings or NumPy arrays."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def get(self, key: str) -> Any:
        """A metadata value. Raises ConfigError when there is none."""
        if key not in self.metadata:
            raise ConfigError(f"{self.path}: metadata {key!r} is missing")
        return self.metadata[key]

    def find(self, name: str) -> Tensor:
        """Where tensor `name` stands. Raises ConfigError when there is none."""
        if name not in self.tensors:
            raise ConfigError(f"{self.path}: tensor {name!r} is missing")
        return self.tensors[name]

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Tensor `name` as float32. Raises ConfigError unless it is there and has this shape."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.find(name)
        if tensor.shape != shape:
            raise ConfigError(
                f"{self.path}: tensor {name!r} has shape {tensor.shape}, expected {shape}"
            )
        raw = np.fromfile(self.path, np.uint8, tensor.size, offset=tensor.offset)
        kind = GGMLQuantizationType(tensor.ggml_type)
        if kind is GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(shape)
        try:
            values = dequantize(raw.reshape(*shape[:-1], -1), kind)
        except NotImplementedError:
            raise ConfigError(
                f"{self.path}: tensor {name!r} has type {kind.name}, which cannot be read"
            ) from None
        return values.astype(np.float32, copy=False).reshape(shape)


class _Cursor:
    """A position in the file that never moves past its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.position = path, data, 0

    def take(self, size: int, what: str) -> bytes:
        left = len(self.data) - self.position
        if size > left:
            raise ConfigError(
                f"{self.path}: {what} needs {size} bytes and {left} are left: damaged?"
            )
        self.position += size
        return self.data[self.position - size : self.position]

    def scalar(self, format: str, what: str) -> Any:
        return struct.unpack("<" + format, self.take(struct.calcsize("<" + format), what))[0]

    def string(self, what: str) -> str:
        return self.take(self.scalar("Q", what), what).decode("utf-8", errors="replace")

    def value(self, what: str) -> Any:
        value_type = self.scalar("I", what)
        if value_type in _SCALARS:
            return self.scalar(_SCALARS[value_type], what)
        if value_type == _STRING:
            return self.string(what)
        if value_type == _ARRAY:
            return self.array(what)
        raise ConfigError(f"{self.path}: {what} has unknown value type {value_type}: damaged?")

    def array(self, what: str) -> Any:
        item_type, count = self.scalar("I", what), self.scalar("Q", what)
        if item_type in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[item_type])
            return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        if item_type == _STRING:
            # Ends with the file at the latest: an item takes eight bytes or more.
            return [self.string(what) for _ in range(count)]
        raise ConfigError(f"{self.path}: {what} is an array of type {item_type}: damaged?")


def read(path: Path) -> GgufFile:
    """Parses the header. Raises ConfigError naming the file and the field that is wrong."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24 or file.read(4) != b"GGUF":
                raise ConfigError(f"{path}: not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(path, data))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _parse(cursor: _Cursor) -> GgufFile:
    cursor.take(4, "magic")
    version = cursor.scalar("I", "version")
    if version not in (2, 3):
        raise ConfigError(f"{cursor.path}: GGUF version {version}; 2 and 3 are supported")
    tensor_count, entry_count = cursor.scalar("Q", "count"), cursor.scalar("Q", "count")
    if max(tensor_count, entry_count) > _MOST_ENTRIES:
        raise ConfigError(
            f"{cursor.path}: {tensor_count} tensors and {entry_count} metadata entries: damaged?"
        )
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.string("metadata key")
        metadata[key] = cursor.value(f"metadata {key!r}")
    found = dict(_tensor(cursor) for _ in range(tensor_count))
    return GgufFile(cursor.path, metadata, _placed(cursor, metadata, found))


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, tuple[int, ...], int]]:
    """(name, (GGML type, shape, offset in the data section))."""
    name = cursor.string("tensor name")
    what = f"tensor {name!r}"
    dimensions = cursor.scalar("I", what)
    if not 1 <= dimensions <= 4:
        raise ConfigError(f"{cursor.path}: {what} has {dimensions} dimensions: damaged?")
    shape = tuple(cursor.scalar("Q", what) for _ in range(dimensions))[::-1]
    if 0 in shape:
        raise ConfigError(f"{cursor.path}: {what} has shape {shape}: damaged?")
    return name, (cursor.scalar("I", what), shape, cursor.scalar("Q", what))


def _placed(cursor: _Cursor, metadata: dict[str, Any], found: dict) -> dict[str, Tensor]:
    """Where the tensors stand in the file, each checked to lie inside it."""
    from gguf.constants import GGML_QUANT_SIZES

    path, alignment = cursor.path, metadata.get("general.alignment", 32)
    # A power of two up to 1 MiB: then start is near where the header ends.
    if not isinstance(alignment, int) or alignment not in {1 << bit for bit in range(21)}:
        raise ConfigError(f"{path}: general.alignment {alignment!r} is no power of two to 2**20")
    start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, (ggml_type, shape, offset) in found.items():
        if ggml_type not in GGML_QUANT_SIZES:
            raise ConfigError(f"{path}: tensor {name!r} has unknown GGML type {ggml_type}")
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        elements = 1
        for length in shape:
            elements *= length  # Python integers: cannot overflow
        size = elements // block * block_bytes
        if shape[-1] % block or start + offset + size > len(cursor.data):
            raise ConfigError(f"{path}: tensor {name!r} {shape} is not all in the file: damaged?")
        tensors[name] = Tensor(ggml_type, shape, start + offset, size)
    return tensors


def decoder_config(file: GgufFile) -> DecoderConfig:
    """The decoder's shape. Raises ConfigError for what is missing, impossible or not supported."""
    if (architecture := file.get("general.architecture")) != "llama":
        raise ConfigError(
            f"{file.path}: architecture {architecture!r}; supported from GGUF: 'llama'"
        )
    scaling = file.metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise ConfigError(f"{file.path}: RoPE scaling is not supported from GGUF")

    def whole(key: str, most: int = 1 << 20) -> int:
        return positive_int(file.get(key), f"{file.path}: metadata {key!r}", most)

    def number(key: str) -> float:
        return positive_float(file.get(key), f"{file.path}: metadata {key!r}")

    d_model, heads = whole("llama.embedding_length"), whole("llama.attention.head_count")
    if "llama.attention.key_length" in file.metadata:
        head_dim = whole("llama.attention.key_length")
    else:
        head_dim = max(d_model // heads, 1)
    rotated = file.metadata.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ConfigError(f"{file.path}: RoPE over {rotated} of {head_dim} dimensions")
    return DecoderConfig(
        vocab_size=file.find("token_embd.weight").shape[0],
        layers=whole("llama.block_count"),
        d_model=d_model,
        d_ff=whole("llama.feed_forward_length"),
        heads=heads,
        kv_heads=whole("llama.attention.head_count_kv"),
        head_dim=head_dim,
        rope_theta=number("llama.rope.freq_base"),
        norm_eps=number("llama.attention.layer_norm_rms_epsilon"),
        tied_embeddings="output.weight" not in file.tensors,
        max_positions=whole("llama.context_length", most=1 << 30),
    )


def read_parameter(
    file: GgufFile, config: DecoderConfig, name: str, shape: tuple[int, ...]
) -> np.ndarray:
    """Tensor `name` as float32 in the decoder's layout. Raises ConfigError as `GgufFile.read`."""
    array = file.read(name, shape)
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return array
    # This architecture's q and k rows are stored for interleaved RoPE; ours is rotate-half.
    return array.reshape(heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
