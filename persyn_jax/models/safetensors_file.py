"""Reads safetensors files, single and sharded. The header is checked before anything is allocated.

The format: eight bytes with the header's length N, N bytes of JSON (`dtype`, `shape` and
`data_offsets` of each tensor), then the tensors without gaps.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.models.file_checks import LONGEST_JSON, parse_json, read_json, shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Tensor(NamedTuple):
    """Where a tensor stands."""

    file: Path
    dtype: str
    """The format's name."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder, read one at a time when asked for."""

    folder: Path
    tensors: dict[str, Tensor]

    def read(
        self, name: str, shape: tuple[int, ...], dtype: type | np.dtype | None = np.float32
    ) -> np.ndarray:
        """Tensor `name` as `dtype`; None is its own.

        Raises ConfigError unless it is there and has this shape.
        """
        if name not in self.tensors:
            raise ConfigError(f"{self.folder}: tensor {name!r} is missing")
        tensor = self.tensors[name]
        if tensor.shape != shape:
            raise ConfigError(
                f"{tensor.file}: tensor {name!r} has shape {tensor.shape}, expected {shape}"
            )
        stored = _dtypes()[tensor.dtype]
        raw = np.fromfile(tensor.file, np.uint8, tensor.size, offset=tensor.offset)
        if raw.size != tensor.size:
            raise ConfigError(
                f"{tensor.file}: tensor {name!r} has {raw.size} of {tensor.size} bytes: cut off?"
            )
        return raw.view(stored).reshape(shape).astype(dtype or stored, copy=False)


@functools.cache
def _dtypes() -> dict[str, np.dtype]:
    import ml_dtypes

    return {
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
    }


def open_folder(folder: Path) -> Weights:
    """All tensors of a Hugging Face folder, none read yet.

    Raises ConfigError naming the file and the field that is wrong, a tensor that two files have,
    and whatever an index and its files do not agree on.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise ConfigError(f"{file}: tensor {name!r} is in {tensors[name].file.name} too")
            tensors[name] = tensor
    if not (folder / SINGLE).exists() and (folder / INDEX).exists():
        _check_index(folder, tensors)
    return Weights(folder, tensors)


def weight_files(folder: Path) -> list[Path]:
    """A folder's safetensors files: `model.safetensors`, those of its index, or all there are.

    The order of preference is that of `transformers`. Raises ConfigError if there is none, and if
    one of the index is missing.
    """
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        names = sorted(set(_weight_map(folder).values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ConfigError(f"{folder / INDEX}: names {missing[0]!r}, which is not there")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder}: holds no *.safetensors file")
    return files


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor names and the names of their files, each in this very folder."""
    path = folder / INDEX
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{path}: weight_map is {shown(found)}, must map tensors to files")
    for name, file in found.items():
        plain = isinstance(file, str) and Path(file).name == file and "\\" not in file
        if not plain or "\0" in file or not file.endswith(".safetensors"):
            raise ConfigError(
                f"{path}: tensor {shown(name)} is in {shown(file)}, must be the name of a "
                "*.safetensors file beside the index"
            )
    return found


def _check_index(folder: Path, tensors: dict[str, Tensor]) -> None:
    named = _weight_map(folder)
    for name in sorted(named.keys() | tensors.keys()):
        found = tensors[name].file.name if name in tensors else "no file"
        expected = named.get(name, "no file")
        if found != expected:
            raise ConfigError(
                f"{folder / INDEX}: tensor {shown(name)} should be in {expected}, is in {found}"
            )


def read_header(file: Path) -> dict[str, Tensor]:
    """Where each tensor of `file` stands.

    Raises ConfigError naming the tensor and what is wrong with it: the sizes agree, the dtypes are
    known, and the tensors fill the file without gaps and without overlap.
    """
    try:
        with file.open("rb") as opened:
            size = file.stat().st_size
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or not 2 <= length <= min(LONGEST_JSON, size - 8):
                raise ConfigError(
                    f"{file}: not a safetensors file: a header of {length} bytes in a file of "
                    f"{size}, must be 2 to {max(min(LONGEST_JSON, size - 8), 0)}"
                )
            data = opened.read(length)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    entries = parse_json(data, f"{file}: not a safetensors file: header")
    _check_metadata(file, entries.pop("__metadata__", {}))
    start = 8 + length
    tensors = {name: _tensor(file, name, entry, start) for name, entry in entries.items()}
    _check_filled(file, tensors, start, size)
    return tensors


def _check_metadata(file: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ConfigError(f"{file}: __metadata__ is {shown(metadata)}, must map names to text")


def _tensor(file: Path, name: str, entry: Any, start: int) -> Tensor:
    where = f"{file}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ConfigError(f"{where} is {shown(entry)}, must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _dtypes():
        found = dtype if isinstance(dtype, str) and len(dtype) < 20 else shown(dtype)
        raise ConfigError(f"{where} is {found}; F32, F16 and BF16 are supported")
    if not _whole(shape) or len(shape) > 8:
        raise ConfigError(f"{where} has shape {shown(shape)}, must be at most 8 whole numbers")
    if not _whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ConfigError(f"{where} has data_offsets {shown(offsets)}, must be begin and end")
    begin, end = offsets
    if (size := math.prod(shape) * _dtypes()[dtype].itemsize) != end - begin:
        raise ConfigError(
            f"{where} has {shown(end - begin)} bytes, expected {shown(size)} for {dtype} "
            f"{shown(shape)}"
        )
    return Tensor(file, dtype, tuple(shape), start + begin, size)


def _whole(values: Any) -> bool:
    """Whether they are a list of integers from 0 on, none longer than a file can be."""
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
        for value in values
    )


def _check_filled(file: Path, tensors: dict[str, Tensor], start: int, size: int) -> None:
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if tensor.offset != at:
            raise ConfigError(
                f"{file}: tensor {shown(name)} begins at byte {tensor.offset}, expected {at}: "
                f"tensors must neither overlap nor leave gaps"
            )
        at += tensor.size
    if at != size:
        raise ConfigError(
            f"{file}: not a safetensors file: the tensors end at byte {at}, the file at {size}"
        )
