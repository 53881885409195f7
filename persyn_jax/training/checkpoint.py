"""Checkpoints of all workers: orbax writes and reads the arrays, a hash manifest of ours says whether they are intact.

Orbax gives atomicity but restores flipped bits silently, so a checkpoint without a matching manifest is not used.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import jax

from persyn_jax.training.step import TrainState

logger = logging.getLogger(__name__)

_KEPT = 2  # the newest and one to fall back to


def save(folder: Path, step: int, state: TrainState) -> None:
    """Writes `folder/step` (state after `step` steps), then its manifest, then removes all but the newest two."""
    import orbax.checkpoint as ocp

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{step:08d}"
    shutil.rmtree(target, ignore_errors=True)
    _manifest(target).unlink(missing_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target.resolve(), state)
    partial = _manifest(target).with_suffix(".partial")
    partial.write_text(json.dumps(_hashes(target)))
    partial.rename(_manifest(target))
    for _, old in _steps(folder)[:-_KEPT]:
        _manifest(old).unlink(missing_ok=True)
        shutil.rmtree(old)


def restore_newest(folder: Path, like: TrainState) -> tuple[int, TrainState] | None:
    """The newest intact checkpoint as (steps taken, state placed like `like`); None if there is no checkpoint.

    like: a state of the same shapes, whose shardings are taken over (its values are not read).
    A damaged checkpoint is passed over with a warning that names the file. Raises RuntimeError when checkpoints are there
    and none is intact: training never starts afresh in silence.
    """
    import orbax.checkpoint as ocp

    candidates = _steps(folder)
    for step, path in reversed(candidates):
        if damage := _damage(path):
            logger.warning("checkpoint passed over: %s", damage)
            continue
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        with ocp.StandardCheckpointer() as checkpointer:
            return step, checkpointer.restore(path.resolve(), abstract)
    if candidates:
        raise RuntimeError(f"{folder}: holds checkpoints and none is intact; remove it to start afresh")
    return None


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Finished checkpoints, oldest first. One that was cut off while being written has no manifest and is none."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.isdigit() and _manifest(path).exists()]
    return sorted((int(path.name), path) for path in found)


def _manifest(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".sha256.json")


def _hashes(checkpoint: Path) -> dict[str, str]:
    hashes = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        hashes[file.relative_to(checkpoint).as_posix()] = digest
    return hashes


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        expected = json.loads(_manifest(checkpoint).read_text())
    except ValueError:
        return f"{_manifest(checkpoint)} is not readable"
    found = _hashes(checkpoint)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"{checkpoint / name} is not what was written"
    return None
