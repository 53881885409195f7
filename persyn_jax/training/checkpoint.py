"""Checkpoints of all workers: orbax writes and reads the arrays, a hash manifest says if they are
intact.

Orbax is atomic but restores flipped bits in silence, so a checkpoint that its manifest does not
vouch for is not used. The manifest is written last: a checkpoint without one never counts.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path

from persyn_jax.training.step import TrainState

logger = logging.getLogger(__name__)

_KEPT = 2  # the newest, and one to fall back to


def save(folder: Path, step: int, state: TrainState) -> None:
    """Writes `folder/step`, the state after `step` steps; then removes all but the newest two."""
    import orbax.checkpoint as ocp

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{step:08d}"
    _manifest(target).unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    # A gigabyte of copies at a time; by default orbax may hold a second copy of the whole state.
    handler = ocp.StandardCheckpointHandler(save_concurrent_gb=1)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(target.resolve(), args=ocp.args.StandardSave(state))
    partial = _manifest(target).with_suffix(".partial")
    partial.write_text(json.dumps(_hashes(target)))
    partial.rename(_manifest(target))
    for _, old in _finished(folder)[:-_KEPT]:
        _manifest(old).unlink()
        shutil.rmtree(old)


def restore_newest(folder: Path, like: TrainState) -> tuple[int, TrainState] | None:
    """The newest intact checkpoint as (steps taken, state); None if there is no checkpoint.

    like: the state's shapes, dtypes and shardings (`step.placed_shapes`). A damaged checkpoint is
    passed over with a warning that names the file. Raises RuntimeError when there are checkpoints
    and none is intact: training never starts afresh in silence.
    """
    import orbax.checkpoint as ocp

    checkpoints = _finished(folder)
    for step, path in reversed(checkpoints):
        if damage := _damage(path):
            logger.warning("checkpoint passed over: %s", damage)
            continue
        with ocp.StandardCheckpointer() as checkpointer:
            return step, checkpointer.restore(path.resolve(), like)
    if checkpoints:
        raise RuntimeError(
            f"{folder}: holds checkpoints and none is intact; remove it to start afresh"
        )
    return None


def _finished(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint with a manifest, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.isdigit() and _manifest(path).exists()]
    return sorted((int(path.name), path) for path in found)


def _manifest(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".sha256.json")


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
        expected = json.loads(_manifest(checkpoint).read_bytes())
    except ValueError:
        return f"{_manifest(checkpoint)} is not readable"
    found = _hashes(checkpoint)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"{checkpoint / name} is not what was written"
    return None
