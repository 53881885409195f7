"""Checkpoints of all workers: orbax writes and reads the arrays, a hash manifest says if they are
intact.

Orbax is atomic but restores flipped bits in silence, so a checkpoint that its manifest does not
vouch for is not used. The manifest is written last: a checkpoint without one never counts.
"""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from persyn_jax.training.batches import Segment
from persyn_jax.training.step import TrainState

logger = logging.getLogger(__name__)

_KEPT = 2  # the newest, and one to fall back to


class Saver(NamedTuple):
    """Writes checkpoints; see `saver`."""

    save: Callable[[int, TrainState, Sequence[Segment]], None]
    """(steps taken, state, who took them): returns when the state may be donated again."""
    finish: Callable[[], None]
    """Waits until what was saved is on the disk. Raises what went wrong with it."""


@contextlib.contextmanager
def saver(folder: Path, in_background: bool = True) -> Iterator[Saver]:
    """Saves in the background: the state is copied, and written while training goes on.

    A failed write is raised at the next `save`, at `finish`, or on the way out. All processes of a
    run save together, into a folder that they share; the first one vouches and tidies up.
    """
    import orbax.checkpoint as ocp

    if _is_first():
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
    _wait_for_all("checkpoints tidied up")
    # A gigabyte of copies at a time; by default orbax may hold a second copy of the whole state.
    handler = ocp.StandardCheckpointHandler(save_concurrent_gb=1)
    pending: list[Future] = []

    def finish() -> None:
        while pending:
            pending.pop().result()

    with ocp.AsyncCheckpointer(handler) as writer, ThreadPoolExecutor(1) as voucher:

        def save(step: int, state: TrainState, segments: Sequence[Segment]) -> None:
            finish()
            target = _path(folder, step)
            # A damaged one of this very step may lie there.
            if _is_first():
                _manifest(target).unlink(missing_ok=True)
                shutil.rmtree(target, ignore_errors=True)
            _wait_for_all(f"checkpoint {step} may be written")
            writer.save(target.resolve(), args=ocp.args.StandardSave(state))
            pending.append(voucher.submit(_vouch, writer, target, segments))
            if not in_background:
                finish()

        yield Saver(save, finish)
        finish()


def _vouch(writer: Any, target: Path, segments: Sequence[Segment]) -> None:
    writer.wait_until_finished()
    if not _is_first():
        return
    partial = _manifest(target).with_suffix(".partial")
    partial.write_text(json.dumps({"segments": segments, "sha256": _hashes(target)}))
    partial.rename(_manifest(target))
    for _, old in _finished(target.parent)[:-_KEPT]:
        _manifest(old).unlink()
        shutil.rmtree(old)


class Restored(NamedTuple):
    """A training as it was saved."""

    steps: int
    """Taken so far."""
    state: TrainState
    segments: tuple[Segment, ...]
    """Who took them."""


def restore_newest(folder: Path, like: Callable[[int], TrainState]) -> Restored | None:
    """The newest intact checkpoint; None if there is no checkpoint.

    like: number of workers -> the state's shapes, dtypes and shardings. A damaged checkpoint is
    passed over with a warning that names the file. Raises RuntimeError when there are checkpoints
    and none is intact, or one is of another model: training never starts afresh in silence.
    """
    import orbax.checkpoint as ocp

    step = _agreed(_newest_intact(folder) if _is_first() else _NO_CHECKPOINT)
    if step == _NONE_INTACT:
        raise RuntimeError(
            f"{folder}: holds checkpoints and none is intact; remove it to start afresh"
        )
    if step == _NO_CHECKPOINT:
        return None
    path = _path(folder, step)
    values = json.loads(_manifest(path).read_bytes())["segments"]
    segments = tuple(Segment(*value) for value in values)
    wanted = like(segments[-1].workers)
    with ocp.StandardCheckpointer() as checkpointer:
        _check_shapes(path, checkpointer.metadata(path.resolve()), wanted)
        return Restored(step, checkpointer.restore(path.resolve(), wanted), segments)


_NO_CHECKPOINT, _NONE_INTACT = -1, -2  # in place of a step


def _newest_intact(folder: Path) -> int:
    """Its number of steps, or one of the above."""
    checkpoints = _finished(folder)
    for step, path in reversed(checkpoints):
        if (damage := _damage(path)) is None:
            return step
        logger.warning("checkpoint passed over: %s", damage)
    return _NONE_INTACT if checkpoints else _NO_CHECKPOINT


def _check_shapes(path: Path, metadata: Any, wanted: TrainState) -> None:
    """Orbax would pad and cut in silence."""
    saved, expected = dict(_named(metadata.item_metadata.tree)), dict(_named(wanted))
    for name in sorted(saved.keys() | expected.keys()):
        found, asked = saved.get(name), expected.get(name)
        if found != asked:
            raise RuntimeError(
                f"{path}: {name} is {found or 'not there'}, and the training has "
                f"{asked or 'nothing there'}: a checkpoint of another model or optimiser"
            )


def _named(tree: Any) -> Iterator[tuple[str, str]]:
    """(place, what stands there) of every array of a tree, or of what orbax tells of one."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield "/".join(_name(key) for key in keys), f"{leaf.dtype}{list(leaf.shape)}"


def _name(key: Any) -> str:
    for kind in ("key", "name", "idx"):
        if hasattr(key, kind):
            return str(getattr(key, kind))
    return str(key)


def _finished(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint with a manifest, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.isdigit() and _manifest(path).exists()]
    return sorted((int(path.name), path) for path in found)


def _remove_unfinished(folder: Path) -> None:
    """What a killed process left behind."""
    finished = {path for _, path in _finished(folder)}
    for path in folder.iterdir():
        if path.name[:8].isdigit() and path.is_dir() and path not in finished:
            shutil.rmtree(path)


def _path(folder: Path, step: int) -> Path:
    return folder / f"{step:08d}"


def _manifest(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".manifest.json")


def _hashes(checkpoint: Path) -> dict[str, str]:
    """Hex SHA-256 of every file of the checkpoint, by its path inside."""
    hashes = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        hashes[file.relative_to(checkpoint).as_posix()] = digest
    return hashes


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads(_manifest(checkpoint).read_bytes())
        expected, segments = dict(manifest["sha256"]), [Segment(*v) for v in manifest["segments"]]
    except (ValueError, KeyError, TypeError):
        expected, segments = {}, []
    if not segments:
        return f"{_manifest(checkpoint)} is not readable"
    found = _hashes(checkpoint)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"{checkpoint / name} is not what was written"
    return None


def _is_first() -> bool:
    return jax.process_index() == 0


def _agreed(step: int) -> int:
    """What the first process says: it alone reads all the bytes."""
    if jax.process_count() == 1:
        return step
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(step)))


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)
