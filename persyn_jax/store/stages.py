"""Stage manifests: stages/NAME.json is written last, so where it is, the stage is finished."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from persyn_jax.config import ConfigError
from persyn_jax.store.files import read_json, sha256_of, write_bytes, write_json


@dataclass(frozen=True)
class Fingerprints:
    """What decides a stage's outputs."""

    inputs: dict[str, str]
    """Fingerprint of each input, by name."""
    config: dict[str, str]
    """The part of the config that the stage reads: value, as JSON, by dotted key."""
    source: str
    """`provenance.source_fingerprint` of the module that the stage runs."""


@dataclass(frozen=True)
class Manifest:
    """What a finished stage was made from and what it wrote."""

    stage: str
    inputs: dict[str, str]
    config: dict[str, str]
    source: str
    outputs: dict[str, str]
    """Hex SHA-256 of each output file, by its path inside the run folder."""
    summary: dict[str, Any]
    seconds: float


def finished(folder: Path, stage: str, fingerprints: Fingerprints) -> Manifest | None:
    """The manifest of `stage` if it finished with these fingerprints; None if it did not finish.

    Raises ConfigError saying what differs: a fingerprint (old and new), or an output that is
    missing or changed.
    """
    manifest = read_manifest(folder, stage)
    if manifest is None:
        return None
    differences = _changed_fingerprints(manifest, fingerprints) + _changed_outputs(folder, manifest)
    if differences:
        raise ConfigError(
            f"{folder}: stage {stage} is finished, but {'; '.join(differences)}."
            " --overwrite redoes the stage and keeps all answers"
        )
    return manifest


def finish(
    folder: Path,
    stage: str,
    fingerprints: Fingerprints,
    outputs: list[str],
    summary: dict[str, Any],
    seconds: float,
) -> Manifest:
    """Declares `stage` finished: hashes its outputs and writes its manifest.

    outputs: files or folders, as paths inside the run folder; not the shared metrics.jsonl.
    """
    hashes = {file: sha256_of(folder / file) for file in _files(folder, outputs)}
    manifest = Manifest(
        stage=stage,
        inputs=fingerprints.inputs,
        config=fingerprints.config,
        source=fingerprints.source,
        outputs=hashes,
        summary=summary,
        seconds=seconds,
    )
    write_json(_manifest_path(folder, stage), dataclasses.asdict(manifest))
    return manifest


def adopt(source: Path, target: Path, stage: str) -> None:
    """Makes `stage`, finished in the run folder `source`, finished in `target` too: its outputs are
    copied, then its manifest. What `target` had of another such stage is discarded.

    Raises ConfigError where `source` has not finished it.
    """
    manifest = read_manifest(source, stage)
    if manifest is None:
        raise ConfigError(f"{source}: stage {stage} is not finished")
    if read_manifest(target, stage) == manifest:
        return
    discard(target, stage)
    for name in manifest.outputs:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target / name, (source / name).read_bytes())
    write_json(_manifest_path(target, stage), dataclasses.asdict(manifest))


def discard(folder: Path, stage: str) -> None:
    """Makes `stage` unfinished: removes its manifest and the outputs listed there, nothing else."""
    manifest = read_manifest(folder, stage)
    if manifest is None:
        return
    _manifest_path(folder, stage).unlink()
    for name in manifest.outputs:
        output = folder / name
        output.unlink(missing_ok=True)
        _remove_empty_folders(output.parent, inside=folder)


def read_manifest(folder: Path, stage: str) -> Manifest | None:
    """The manifest of `stage`, None if there is none.

    Raises ConfigError if it is damaged or lists an output outside the run folder.
    """
    path = _manifest_path(folder, stage)
    if not path.exists():
        return None
    try:
        manifest = Manifest(**read_json(path))
    except TypeError:
        raise ConfigError(f"{path}: not a stage manifest") from None
    for name in manifest.outputs:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ConfigError(f"{path}: output {name!r} is not inside the run folder")
    return manifest


def _manifest_path(folder: Path, stage: str) -> Path:
    return folder / "stages" / f"{stage}.json"


def _files(folder: Path, outputs: list[str]) -> list[str]:
    """`outputs` with every folder replaced by the files in it, sorted."""
    files = []
    for output in outputs:
        path = folder / output
        inside = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        files += [file.relative_to(folder).as_posix() for file in inside]
    return sorted(files)


def _changed_fingerprints(manifest: Manifest, now: Fingerprints) -> list[str]:
    before, after = _by_name(manifest), _by_name(now)
    return [
        f"{name} changed ({before.get(name, 'none')} -> {after.get(name, 'none')})"
        for name in before | after
        if before.get(name) != after.get(name)
    ]


def _by_name(of: Manifest | Fingerprints) -> dict[str, str]:
    inputs = {f"input {name}": value for name, value in of.inputs.items()}
    config = {f"config {key}": value for key, value in of.config.items()}
    return inputs | config | {"source": of.source}


def _changed_outputs(folder: Path, manifest: Manifest) -> list[str]:
    changes = []
    for name, sha256 in manifest.outputs.items():
        if not (folder / name).is_file():
            changes.append(f"output {name} is missing")
        elif sha256_of(folder / name) != sha256:
            changes.append(f"output {name} has changed")
    return changes


def _remove_empty_folders(start: Path, inside: Path) -> None:
    for path in (start, *start.parents):
        if path == inside or any(path.iterdir()):
            return
        path.rmdir()
