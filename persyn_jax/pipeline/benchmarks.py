"""The student on published benchmarks, before and after training: lm-eval, in an environment of its
own, asks the run's own sampling service.

Each benchmark of each model is finished on its own, with a manifest in the run folder, and is not
run again. Its folder `benchmarks/MODEL/TASK` keeps what lm-eval writes: results, every item with
question and answer, and its log.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from persyn_jax import store
from persyn_jax.config import ConfigError, fingerprint, to_values
from persyn_jax.evaluation import tasks
from persyn_jax.models import spec
from persyn_jax.models.spec import ModelConfig
from persyn_jax.pipeline.config import GENERATED, BenchmarkTask
from persyn_jax.pipeline.progress import say
from persyn_jax.pipeline.prompts import examined
from persyn_jax.pipeline.run import Run
from persyn_jax.pipeline.run_files import PROMPTS, STUDENT
from persyn_jax.provenance import source_fingerprint
from persyn_jax.records import Prompt
from persyn_jax.sampling.config import ServiceConfig
from persyn_jax.sampling.process import running_service

FOLDER = "benchmarks"
BEFORE, AFTER = "before", "after"
LOG = "lm_eval.log"
_SERVED = "student"  # the model's name at the service
_UNREACHED = re.compile(r"Couldn't reach '([^']+)' on the Hub \((\w+)\)")
_ABSENT = re.compile(r"Dataset '([^']+)' doesn't exist on the Hub or cannot be accessed")
_NO_PACKAGE = re.compile(r"^ModuleNotFoundError: (.+)$", re.MULTILINE)


class Ran(NamedTuple):
    """How it went."""

    finished: list[tuple[str, str]]
    """(model, task), now or before."""
    impossible: dict[str, str]
    """A line each, by task, on what it needs and does not find here: data, a package of lm-eval's
    environment."""
    failed: list[str]
    """A line each on what went wrong otherwise."""


class _ImpossibleError(Exception):
    """A task needs what is not there. One line."""


class _LmEvalError(Exception):
    """lm-eval ended otherwise than well. One line."""


def models_to_examine(run: Run, names: Sequence[str]) -> dict[str, ModelConfig]:
    """The models by the name that their results go by: `before`, `after`, or that of a folder.

    Raises ConfigError: the student is not trained yet, no such folder, a name given twice.
    """
    models = {}
    for name in names:
        if name == BEFORE:
            key, model = name, run.config.student
        elif name == AFTER:
            if store.read_manifest(run.folder, "train_student") is None:
                raise ConfigError(
                    f"{run.folder}: no student after training: stage train_student is not finished"
                )
            key, model = name, ModelConfig(weights=str(run.folder / STUDENT))
        else:
            if not Path(name).exists():
                raise ConfigError(f"--model {name}: must be before, after, or a path that exists")
            key, model = Path(name).resolve().name, ModelConfig(weights=name)
            if key in (BEFORE, AFTER):
                raise ConfigError(f"--model {name}: a folder of this name needs another one")
        if key in models:
            raise ConfigError(f"--model {name}: results named {key!r} are asked for twice")
        models[key] = model
    return models


def run_benchmarks(
    run: Run,
    command: Path,
    models: Mapping[str, ModelConfig],
    limit: int | None,
) -> Ran:
    """Runs the config's benchmarks on each model, but for those that are finished.

    command: the `lm_eval` executable. limit: items of each task, at most; null is all of them.
    Raises ConfigError where a benchmark is finished with other fingerprints and `run.overwrite` is
    not set, for a task's data that is not there, and as `running_service`.
    """
    if not os.access(command, os.X_OK) or command.is_dir():
        raise ConfigError(f"--lm-eval {command}: no such command")
    ran = Ran([], {}, [])
    data = {}
    for task in run.config.benchmarks.tasks:
        try:
            data[task.name] = _task_data(run, task)
        except _ImpossibleError as error:
            ran.impossible[task.name] = f"{task.name}: {error}"
    for name, model in models.items():
        _examine(run, command, (name, model), data, limit, ran)
    return ran


def _examine(
    run: Run,
    command: Path,
    named: tuple[str, ModelConfig],
    data: Mapping[str, bytes | None],
    limit: int | None,
    ran: Ran,
) -> None:
    """All tasks on one model; adds to `ran` how it goes."""
    name, model = named
    config = run.config.benchmarks
    waiting = []
    for task in config.tasks:
        if task.name in ran.impossible:
            continue
        now = _fingerprints(run, task, model, data[task.name], limit)
        if _finished_before(run, manifest_name(name, task), now):
            say(f"{task.name}, {name}: finished before")
            ran.finished.append((name, task.name))
        else:
            waiting.append((task, now))
    if not waiting:
        return
    say(f"sampling service: loading and compiling {model.weights}")
    service = ServiceConfig(model=model, name=_SERVED, engine=config.engine)
    with running_service(service, run.config.run.platform) as base_url:
        for task, now in waiting:
            folder = run.folder / FOLDER / name / task.name
            started = time.monotonic()
            say(f"{task.name}, {name}: started; lm-eval's own progress is in {folder / LOG}")
            try:
                _fresh(folder, task, data[task.name])
                _call(
                    _words(run, command, task, base_url, limit), folder, data[task.name] is not None
                )
            except _ImpossibleError as error:
                ran.impossible[task.name] = f"{task.name}: {error}"
                say(f"{task.name}: cannot be run here: {error}")
                continue
            except _LmEvalError as error:
                ran.failed.append(f"{task.name}, {name}: {error}")
                say(f"{task.name}, {name}: failed: {error}")
                continue
            seconds = time.monotonic() - started
            summary = {"lm_eval": _version(folder)}
            outputs = [folder.relative_to(run.folder).as_posix()]
            store.finish(
                run.folder, manifest_name(name, task), now, outputs, summary, round(seconds, 1)
            )
            say(f"{task.name}, {name}: done in {seconds:.0f} s")
            ran.finished.append((name, task.name))


def _task_data(run: Run, task: BenchmarkTask) -> bytes | None:
    """What the task reads as NAME.jsonl; null for tasks that have data of their own.

    Raises ConfigError for a file that is not there, _ImpossibleError for a run without such
    prompts.
    """
    if task.name == GENERATED:
        try:
            return _generated_rows(examined(run.read(PROMPTS, Prompt)))
        except ConfigError as error:
            raise _ImpossibleError(str(error)) from None
    if task.data is None:
        return None
    if task.data.suffix != ".jsonl":
        raise ConfigError(f"{task.data}: the data of benchmark {task.name!r} must be .jsonl")
    try:
        return task.data.read_bytes()
    except OSError as error:
        raise ConfigError(f"{task.data}: cannot be read: {error.strerror}") from None


def _generated_rows(prompts: Sequence[Prompt]) -> bytes:
    rows = []
    for prompt in prompts:
        if [message["role"] for message in prompt.messages] != ["user"]:
            raise ConfigError(
                f"prompt {prompt.id!r} is not a single user message, which is all that lm-eval asks"
            )
        rows.append(
            {
                "id": prompt.id,
                "question": prompt.messages[0]["content"],
                "answer": prompt.answer,
                "verifier": prompt.verifier,
            }
        )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def manifest_name(model: str, task: BenchmarkTask) -> str:
    return f"benchmark-{model}-{task.name}"


def _fingerprints(
    run: Run, task: BenchmarkTask, model: ModelConfig, data: bytes | None, limit: int | None
) -> store.Fingerprints:
    inputs = {"model": spec.fingerprint(model), "tasks": _tasks_fingerprint()}
    if data is not None:
        inputs[f"{task.name}.jsonl"] = fingerprint(data.decode(errors="replace"))
    return store.Fingerprints(
        inputs=inputs,
        config=asked(run, task, limit),
        source=source_fingerprint("persyn_jax.sampling.service"),
    )


def asked(run: Run, task: BenchmarkTask, limit: int | None) -> dict[str, str]:
    """The part of the config that decides the answers: not how they are scored."""
    values = {
        "asks": task.asks,
        "num_fewshot": task.num_fewshot,
        "max_tokens": _max_tokens(run, task),
        "limit": limit,
    } | {f"engine.{key}": v for key, v in to_values(run.config.benchmarks.engine).items()}
    return {key: json.dumps(value) for key, value in values.items()}


def _max_tokens(run: Run, task: BenchmarkTask) -> int | None:
    if task.max_tokens is None and task.name == GENERATED:
        return run.config.evaluation.max_tokens
    return task.max_tokens


def _tasks_fingerprint() -> str:
    files = sorted(path for path in tasks.FOLDER.iterdir() if path.suffix in (".yaml", ".py"))
    return fingerprint([[path.name, store.sha256_of(path)] for path in files])


def _finished_before(run: Run, name: str, now: store.Fingerprints) -> bool:
    try:
        return store.finished(run.folder, name, now) is not None
    except ConfigError:
        if not run.overwrite:
            raise
        store.discard(run.folder, name)
        return False


def _fresh(folder: Path, task: BenchmarkTask, data: bytes | None) -> None:
    """Empties what a stopped call left behind, and lays the task's data there."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from None
    if data is not None:
        store.write_bytes(folder / f"{task.name}.jsonl", data)


def _words(
    run: Run, command: Path, task: BenchmarkTask, base_url: str, limit: int | None
) -> list[str]:
    """The command line of one call of lm-eval."""
    engine = run.config.benchmarks.engine
    arguments = f"model={_SERVED},num_concurrent={engine.slots},timeout=3600"
    if task.asks == "chat":
        how = ["--model", "local-chat-completions", "--apply_chat_template"]
        arguments += f",base_url={base_url}/chat/completions"
    else:
        how = ["--model", "local-completions", "--batch_size", "4"]
        arguments += (
            f",base_url={base_url}/completions,tokenizer_backend=remote,tokenized_requests=True"
            f",max_length={engine.cache_length - 1}"  # a token is generated, and thrown away
        )
    words = [str(command.absolute()), *how, "--model_args", arguments, "--tasks", task.name]
    words += ["--include_path", str(tasks.FOLDER), "--log_samples", "--output_path", "."]
    if task.num_fewshot is not None:
        words += ["--num_fewshot", str(task.num_fewshot)]
    if (max_tokens := _max_tokens(run, task)) is not None:
        words += ["--gen_kwargs", f"max_gen_toks={max_tokens}"]
    if limit is not None:
        words += ["--limit", str(limit)]
    return words


def _call(words: list[str], folder: Path, own_data: bool) -> None:
    """Runs lm-eval in `folder`. Raises _ImpossibleError, _LmEvalError.

    own_data: a file of ours is read, which then leaves no copy in the user's cache of data sets.
    """
    log = folder / LOG
    with log.open("wb") as sink, tempfile.TemporaryDirectory() as cache:
        loopback = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        try:
            ended = subprocess.run(
                words,
                cwd=folder,
                env=os.environ | loopback | ({"HF_DATASETS_CACHE": cache} if own_data else {}),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                check=False,
            )
        except OSError as error:
            raise _LmEvalError(f"{words[0]} cannot be started: {error.strerror}") from None
    written = all(any(folder.rglob(name)) for name in ("samples_*.jsonl", "results_*.json"))
    if ended.returncode == 0 and written:  # it also ends well where it cannot write
        return
    text = log.read_text("utf-8", errors="replace")
    if line := what_is_missing(text):
        raise _ImpossibleError(line)
    said = [line.strip() for line in text.splitlines() if line.strip()]
    last = said[-1] if said else "it says nothing"
    raise _LmEvalError(f"lm_eval ended with {ended.returncode}: {last} ({log})")


def what_is_missing(log: str) -> str | None:
    """One line on what lm-eval, with this log, lacked: a data set of the hub or a package; null if
    something else stopped it."""
    if found := _UNREACHED.search(log):
        data_set, reason = found.groups()
        offline = reason == "OfflineModeIsEnabled"
        why = "HF_HUB_OFFLINE is set" if offline else f"that is not reachable ({reason})"
        return f"its data set {data_set} comes from the Hugging Face hub, and {why}"
    if found := _ABSENT.search(log):
        return f"its data set {found[1]} comes from the Hugging Face hub, which does not give it"
    if found := _NO_PACKAGE.search(log):
        return f"the environment of lm_eval lacks a package: {found[1]}"
    return None


def _version(folder: Path) -> str:
    """Of lm-eval, as it wrote it."""
    (results,) = folder.rglob("results_*.json")
    return str(store.read_json(results).get("lm_eval_version"))
