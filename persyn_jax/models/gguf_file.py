"""Parses a GGUF file. Every count, length and offset is checked before anything is allocated.

The parser is ours because it must not trust the file (and the `gguf` package's takes seconds on a
vocabulary); the block formats are that package's. What the metadata and tensors mean is in `gguf`.
"""

import itertools
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.models.file_checks import shown

# Value types of a fixed size, as struct and NumPy know them.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
# More tensors or metadata entries than any model has; damaged counts stop here.
_MOST_ENTRIES = 1 << 16
# More strings than any vocabulary or list of merges has: as Python objects they take several times
# their room in the file.
_MOST_STRINGS = 1 << 20
# GGUF's own limits, in bytes.
_LONGEST_KEY, _LONGEST_TENSOR_NAME = (1 << 16) - 1, 64


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
        return self.read_tensor(name, self.find(name), shape)

    def read_tensor(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> np.ndarray:
        """`tensor`, called `name` in messages, as float32. Raises ConfigError for another shape."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        if tensor.shape != shape:
            raise ConfigError(
                f"{self.path}: tensor {name!r} has shape {tensor.shape}, expected {shape}"
            )
        raw = np.fromfile(self.path, np.uint8, tensor.size, offset=tensor.offset)
        if raw.size != tensor.size:
            raise ConfigError(
                f"{self.path}: tensor {name!r} has {raw.size} of {tensor.size} bytes: cut off?"
            )
        kind = GGMLQuantizationType(tensor.ggml_type)
        if kind is GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(shape)
        try:
            with np.errstate(all="ignore"):  # a damaged scale becomes inf or NaN, as it is stored
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

    def name(self, what: str, longest: int) -> str:
        length = self.scalar("Q", what)
        if not 0 < length <= longest:
            raise ConfigError(
                f"{self.path}: a {what} has {length} bytes, must be 1 to {longest}: damaged?"
            )
        return self.take(length, what).decode("utf-8", errors="replace")

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
        if item_type != _STRING:
            raise ConfigError(f"{self.path}: {what} is an array of type {item_type}: damaged?")
        # An item takes eight bytes or more.
        if count > min(_MOST_STRINGS, (len(self.data) - self.position) // 8):
            raise ConfigError(f"{self.path}: {what} is an array of {count} strings: damaged?")
        return [self.string(what) for _ in range(count)]


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
        key = cursor.name("metadata key", _LONGEST_KEY)
        if key in metadata:
            raise ConfigError(f"{cursor.path}: metadata {shown(key)} is there twice")
        metadata[key] = cursor.value(f"metadata {shown(key)}")
    parts = metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise ConfigError(f"{cursor.path}: one of {parts} parts of a split file; merge them first")
    found: dict[str, _Entry] = {}
    for _ in range(tensor_count):
        name, entry = _entry(cursor)
        if name in found:
            raise ConfigError(f"{cursor.path}: tensor {name!r} is there twice")
        found[name] = entry
    tensors = _placed(cursor, metadata, found)
    _check_apart(cursor.path, tensors)
    return GgufFile(cursor.path, metadata, tensors)


class _Entry(NamedTuple):
    ggml_type: int
    shape: tuple[int, ...]
    offset: int
    """In the data section."""


def _entry(cursor: _Cursor) -> tuple[str, _Entry]:
    name = cursor.name("tensor name", _LONGEST_TENSOR_NAME)
    what = f"tensor {name!r}"
    dimensions = cursor.scalar("I", what)
    if not 1 <= dimensions <= 4:
        raise ConfigError(f"{cursor.path}: {what} has {dimensions} dimensions: damaged?")
    shape = tuple(cursor.scalar("Q", what) for _ in range(dimensions))[::-1]
    if 0 in shape:
        raise ConfigError(f"{cursor.path}: {what} has shape {shape}: damaged?")
    return name, _Entry(cursor.scalar("I", what), shape, cursor.scalar("Q", what))


def _placed(
    cursor: _Cursor, metadata: dict[str, Any], found: dict[str, _Entry]
) -> dict[str, Tensor]:
    """Where the tensors stand in the file, each checked to lie inside it."""
    from gguf.constants import GGML_QUANT_SIZES

    path, alignment = cursor.path, metadata.get("general.alignment", 32)
    # A power of two up to 1 MiB: then start is near where the header ends.
    if not isinstance(alignment, int) or alignment not in {1 << bit for bit in range(21)}:
        raise ConfigError(
            f"{path}: general.alignment {shown(alignment)} is no power of two to 2**20"
        )
    start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, (ggml_type, shape, offset) in found.items():
        if ggml_type not in GGML_QUANT_SIZES:
            raise ConfigError(f"{path}: tensor {name!r} has unknown GGML type {ggml_type}")
        if offset % alignment:
            raise ConfigError(
                f"{path}: tensor {name!r} has offset {offset}, must be a multiple of {alignment}"
            )
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        elements = 1
        for length in shape:
            elements *= length  # Python integers: cannot overflow
        size = elements // block * block_bytes
        if shape[-1] % block:
            raise ConfigError(
                f"{path}: tensor {name!r} has rows of {shape[-1]} values, must be whole blocks of "
                f"{block}"
            )
        if (end := start + offset + size) > len(cursor.data):
            raise ConfigError(
                f"{path}: tensor {name!r} {shape} ends at byte {end}, the file at "
                f"{len(cursor.data)}: cut off?"
            )
        tensors[name] = Tensor(ggml_type, shape, start + offset, size)
    return tensors


def _check_apart(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises ConfigError when two tensors share bytes: together they could exceed the file."""
    by_offset = sorted(tensors.items(), key=lambda item: item[1].offset)
    for (name, tensor), (later, at) in itertools.pairwise(by_offset):
        if tensor.offset + tensor.size > at.offset:
            raise ConfigError(f"{path}: tensors {name!r} and {later!r} overlap: damaged?")
