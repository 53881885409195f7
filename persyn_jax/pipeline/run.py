"""A run being worked on: its folder, its sampling service, and how a stage is run, skipped or
refused.

Heavy imports stay inside the functions: rerunning a finished run loads no JAX.
"""

import contextlib
import functools
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from persyn_jax import store
from persyn_jax.config import ConfigError, fingerprint, to_yaml
from persyn_jax.models import spec
from persyn_jax.models.spec import ModelConfig
from persyn_jax.pipeline.config import RunConfig
from persyn_jax.pipeline.progress import say
from persyn_jax.provenance import source_fingerprint

# Once a process, which runs what it has imported: a study looks at its stages hundreds of times.
_source = functools.cache(source_fingerprint)


@dataclass
class Run:
    """A run being worked on: its config, its folder, and the sampling service once it is needed."""

    config: RunConfig
    overwrite: bool = False
    processes: int = 1
    """How many run a stage together, 0 if only JAX knows; see `open_run`."""
    whole: bool = False
    """Whether all stages will be run, the evaluation too: prompts that cannot do for it are refused
    before anything is asked."""
    _service: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _endpoint: tuple[str, str] | None = None

    @property
    def folder(self) -> Path:
        return self.config.run_folder

    def read(self, name: str, record_type: type) -> list:
        return store.read_records(self.folder / name, record_type)

    def iterate(self, name: str, record_type: type, **equal: str) -> Iterator:
        return store.iterate_records(self.folder / name, record_type, **equal)

    def write(self, name: str, records: Iterable, record_type: type) -> None:
        store.write_records(self.folder / name, records, record_type)

    def own_weights(self) -> str | None:
        """Fingerprint of the own service's weights."""
        service = self.config.service
        return None if service is None else spec.fingerprint(service.model)

    def own_service(self) -> tuple[str, str]:
        """(base URL, model name) of the own service, which is started on first use."""
        from persyn_jax.sampling.process import running_service

        if self._endpoint is None:
            assert self.config.service is not None, "RunConfig lets no teacher go without one"
            say("sampling service: loading and compiling")
            service = running_service(self.config.service, self.config.run.platform)
            self._endpoint = (self._service.enter_context(service), self.config.service.name)
        return self._endpoint

    def service_counters(self) -> dict[str, float]:
        """What the own service's engine has done so far; empty if it is not running."""
        from persyn_jax.sampling.process import read_counters

        return {} if self._endpoint is None else read_counters(self._endpoint[0])

    def stop_service(self) -> None:
        self._service.close()
        self._endpoint = None

    def mesh(self, fsdp: int = 1, tensor: int = 1):
        """The mesh of the gossip workers, each spread over fsdp * tensor devices."""
        from persyn_jax import mesh

        c, workers = self.config, self.config.gossip.workers
        chips = workers * c.mesh.fsdp * c.mesh.tensor  # of the stage that needs most
        try:
            mesh.start_platform(c.run.platform, chips, self.processes)
            return mesh.make_mesh(workers, fsdp, tensor)
        except ValueError as error:
            raise ConfigError(f"gossip.workers x mesh.fsdp x mesh.tensor: {error}") from None

    def training_mesh(self):
        """The mesh of the student's training."""
        return self.mesh(self.config.mesh.fsdp, self.config.mesh.tensor)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        if self.processes == 1:
            return True
        import jax

        return jax.process_index() == 0


@contextlib.contextmanager
def open_run(
    config: RunConfig, overwrite: bool = False, processes: int = 1, whole: bool = False
) -> Iterator[Run]:
    """Prepares and holds the run folder; stops the sampling service on the way out.

    processes: of `jax.distributed`, which must be running unless this is the only one. They share
    the run folder; the first of them holds it and writes, and stages compute together.
    """
    run = Run(config, overwrite, processes, whole)
    if processes != 1:
        run.training_mesh()  # starts the platform, by which a process knows which one it is
    if run.is_first:
        store.prepare(config.run_folder)
    with store.hold(config.run_folder) if run.is_first else contextlib.nullcontext():
        try:
            yield run
        finally:
            run.stop_service()


@contextlib.contextmanager
def open_finished(config: RunConfig, stages: Sequence["Stage"]) -> Iterator[Run]:
    """`open_run` for work on what these stages wrote, none of which is run.

    Raises ConfigError when one is not finished, or as `run_stage` when it is with other
    fingerprints.
    """
    unfinished = f"is not finished, and {config.run_folder} needs it"
    if not config.run_folder.is_dir():
        raise ConfigError(f"stage {stages[0].name} {unfinished}")
    with open_run(config) as run:
        for stage in stages:
            if store.finished(run.folder, stage.name, _fingerprints(stage, run)) is None:
                raise ConfigError(f"stage {stage.name} {unfinished}")
        yield run


@dataclass(frozen=True)
class Stage:
    """One stage: a pure function in a module of its own, and how the run folder meets it."""

    name: str
    modules: tuple[str, ...]
    """Modules of this package whose source, with all that they import, decides the result."""
    reads: tuple[str, ...]
    """Files and folders of the run folder, written by earlier stages."""
    writes: tuple[str, ...]
    section: Callable[[RunConfig], dict[str, Any]]
    """The part of the config that it depends on, as plain values."""
    models: Callable[[RunConfig], tuple[ModelConfig, ...]]
    """The models that it depends on."""
    files: Callable[[RunConfig], tuple[Path, ...]]
    """The user's files that it reads."""
    work: Callable[[Run, Path], dict[str, Any]]
    """(run, folder for checkpoints of this very work) -> summary.

    What depends on time stands in the summary under `measured`."""
    may_read: tuple[str, ...] = ()
    """Inputs where they are there: files that scripts beside the stages left."""
    elastic: tuple[str, ...] = ()
    """Keys of the config that may change between a checkpoint and the work that goes on from it."""


def run_stage(stage: Stage, run: Run) -> store.Manifest:
    """Runs a stage unless it is finished already.

    Raises ConfigError when an input is missing, and when the stage is finished with other
    fingerprints (see `store.finished`) and `run.overwrite` is not set.
    """
    now = _fingerprints(stage, run)
    if manifest := _finished_before(stage, run, now):
        say(f"{stage.name}: finished before")
        return manifest
    if run.is_first:
        say(f"{stage.name}: started")
        store.write_text(run.folder / "config.yaml", to_yaml(run.config))
    checkpoints = run.folder / "checkpoints" / f"{stage.name}-{_checkpoint_key(stage, now)}"
    started = time.monotonic()
    summary = stage.work(run, checkpoints)
    seconds = time.monotonic() - started
    summary["measured"] = summary.get("measured", {}) | {"peak_memory_gb": _peak_memory_gb()}
    commits = {model.weights: spec.commit(model) for model in stage.models(run.config)}
    if known := {weights: commit for weights, commit in commits.items() if commit}:
        summary["hub_commits"] = known
    if not run.is_first:
        return store.Manifest(stage.name, now.inputs, now.config, now.source, {}, summary, seconds)
    manifest = store.finish(run.folder, stage.name, now, list(stage.writes), summary, seconds)
    shutil.rmtree(checkpoints, ignore_errors=True)  # after the manifest: a kill between loses none
    say(f"{stage.name}: done in {seconds:.0f} s")
    return manifest


def _finished_before(stage: Stage, run: Run, now: store.Fingerprints) -> store.Manifest | None:
    try:
        return store.finished(run.folder, stage.name, now)
    except ConfigError:
        if not run.overwrite:
            raise
        if run.is_first:
            store.discard(run.folder, stage.name)
        return None


def _checkpoint_key(stage: Stage, now: store.Fingerprints) -> str:
    config = {key: value for key, value in now.config.items() if key not in stage.elastic}
    return fingerprint(replace(now, config=config))


def _peak_memory_gb() -> float:
    """Largest resident set of this process so far; the sampling service is another process."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def _fingerprints(stage: Stage, run: Run) -> store.Fingerprints:
    inputs = {}
    for name in stage.reads:
        if not (run.folder / name).exists():
            raise ConfigError(
                f"{run.folder}: stage {stage.name} needs {name}; run the stage before it first"
            )
        inputs[name] = path_fingerprint(run.folder / name)
    for name in stage.may_read:
        if (run.folder / name).exists():
            inputs[name] = path_fingerprint(run.folder / name)
    for path in stage.files(run.config):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        inputs[str(path)] = path_fingerprint(path)
    for model in stage.models(run.config):
        inputs[f"model {model.weights}"] = spec.fingerprint(model)
    return store.Fingerprints(
        inputs=inputs,
        config=dict(_flat(stage.section(run.config))),
        source=fingerprint([_source(module) for module in stage.modules]),
    )


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, JSON) of every value inside; keys as an override names them."""
    if isinstance(value, (dict, list)) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in items:
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, json.dumps(value)


def path_fingerprint(path: Path) -> str:
    """Of a file's bytes, or of the names and bytes of the files in a folder."""
    if path.is_file():
        return store.sha256_of(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return fingerprint([[str(file.relative_to(path)), store.sha256_of(file)] for file in files])
