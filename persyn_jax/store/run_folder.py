"""runs/NAME: its folders, the lock of the process that works in it, and metrics.jsonl."""

import contextlib
import fcntl
import json
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from persyn_jax.config import ConfigError
from persyn_jax.store.files import write_bytes


def prepare(folder: Path, holds: Sequence[str] = ("checkpoints", "stages")) -> None:
    """Makes the run folder and what it holds. Raises ConfigError where that is impossible."""
    try:
        for path in (folder, *(folder / name for name in holds)):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be a run folder: {error.strerror}") from None


@contextlib.contextmanager
def hold(folder: Path) -> Generator[None]:
    """Holds the prepared run folder for this process; a kill of the process frees it too.

    Raises ConfigError naming the holder's process id when another run has it.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode()
            raise ConfigError(f"{folder}: in use by process {holder or '(starting)'}") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Appends `row` as a line of JSON and waits for the disk. Raises ConfigError if it cannot."""
    line = json.dumps(row, allow_nan=False) + "\n"
    try:
        with open(path, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows in order, none if there is no file yet; a torn last line (a kill) is left out.

    Raises ConfigError with file and line for damage anywhere else.
    """
    if not path.exists():
        return []
    rows = []
    *lines, tail = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise ConfigError(f"{path}:{number}: damaged: not a line of JSON") from None
    with contextlib.suppress(ValueError):
        rows.append(json.loads(tail))  # only its newline is missing
    return rows


def truncate_metrics(path: Path, stage: str, step: int) -> None:
    """Drops the rows of `stage` at or after `step`, where it resumes, and a torn last line."""
    kept = [row for row in read_metrics(path) if row["stage"] != stage or row["step"] < step]
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
