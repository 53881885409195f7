"""One file, whole or not at all: every result file goes through `write_bytes`, a long one through
`writing` or `writing_jsonl`."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from persyn_jax.config import ConfigError


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` so that `path` holds the old bytes or the new ones, also after a power loss.

    Raises ConfigError naming `path` when the disk refuses (full, read-only, no such folder); the
    old file stays.
    """
    with writing(path) as file:
        file.write(data)


@contextlib.contextmanager
def writing(path: Path) -> Generator[BinaryIO]:
    """Yields a file to write into; `path` is there when the block ends, and stays as it was if the
    block fails. Raises ConfigError as `write_bytes`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. Raises ValueError for NaN, which JSON lacks."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def writing_jsonl(path: Path) -> Generator[Callable[[Mapping[str, Any]], None]]:
    """Yields a function that writes a row as a line of JSON; `path` is there when the block ends,
    and stays as it was if the block fails.

    Raises ConfigError naming `path` when the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    with writing(path) as file:

        def write(row: Mapping[str, Any]) -> None:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
            file.write(line.encode())

        yield write


def read_json(path: Path) -> Any:
    """The value in the JSON file at `path`. Raises ConfigError: no such file, damaged file."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of the file at `path`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
