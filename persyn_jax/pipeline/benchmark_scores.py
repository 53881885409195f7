"""What lm-eval found out about the models: the score of every item, and the comparison."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from persyn_jax import store
from persyn_jax.config import ConfigError
from persyn_jax.evaluation.rows import read_file
from persyn_jax.evaluation.verifiers import Case, verify
from persyn_jax.intervals import Interval, mean_ci95, paired_difference_ci95
from persyn_jax.pipeline.benchmarks import AFTER, BEFORE, FOLDER, asked, manifest_name
from persyn_jax.pipeline.config import BenchmarkTask
from persyn_jax.pipeline.progress import say
from persyn_jax.pipeline.run import Run, path_fingerprint
from persyn_jax.pipeline.run_files import BENCHMARK_SUMMARY, PROMPTS, STUDENT
from persyn_jax.records import BenchmarkScore

BENCHMARKS = "benchmarks.parquet"
_SAMPLES = re.compile(r"samples_(.+)_\d{4}-\d\d-\d\dT[\d.-]+\.jsonl")


def read_scores(folder: Path, task: BenchmarkTask, model: str) -> list[BenchmarkScore]:
    """The scores of the items in the folder of a finished benchmark, tasks of a group in order.

    Raises ConfigError when lm-eval has no such metric of that filter, or its files are damaged.
    """
    files = sorted(folder.rglob("samples_*.jsonl"))
    if task.metric == "verifier":
        samples = [row.values for path in files for row in read_file(path, "samples")]
        return _verified(folder, task, model, samples)
    scores, seen = [], set()
    for path in files:
        name = _SAMPLES.fullmatch(path.name)
        for row in read_file(path, "samples"):
            sample = row.values
            seen |= {f"{metric} of filter {sample['filter']}" for metric in sample["metrics"]}
            if sample["filter"] != task.filter or task.metric not in sample["metrics"]:
                continue
            value = sample[task.metric]
            if not (isinstance(value, (bool, int, float)) and math.isfinite(value)):
                raise ConfigError(
                    f"{row.where}: metric {task.metric!r} of benchmark {task.name!r} is "
                    "no finite number"
                )
            item = f"{name[1] if name else path.stem}/{sample['doc_id']}-{sample['doc_hash'][:8]}"
            scores.append(BenchmarkScore(task.name, item, model, float(value)))
    if not scores:
        raise ConfigError(
            f"benchmarks.tasks: {task.name!r} has no metric {task.metric!r} of filter "
            f"{task.filter!r}, only {', '.join(sorted(seen))}"
        )
    return scores


def _verified(
    folder: Path, task: BenchmarkTask, model: str, samples: list[dict[str, Any]]
) -> list[BenchmarkScore]:
    """By the prompts' verifiers. The rows are read from the file that we wrote: what lm-eval kept
    of them has gone through a guess at the columns' types."""
    rows = [row.values for row in read_file(folder / f"{task.name}.jsonl", "prompts")]
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    of_sample = [rows[sample["doc_id"]] for sample in samples]
    verified = verify(
        [
            Case(row["verifier"], sample["resps"][0][0], row["answer"])
            for row, sample in zip(of_sample, samples, strict=True)
        ]
    )
    return [
        BenchmarkScore(task.name, row["id"], model, score)
        for row, score in zip(of_sample, verified.scores, strict=True)
    ]


def collect(run: Run, limit: int | None) -> tuple[list[BenchmarkScore], dict[str, Any]]:
    """(the scores of all benchmarks of the config that are finished, on whatever model, as this
    config asks; the summary that the script prints). Writes both into the run folder, the summary
    with the fingerprints of what it was made from, for the report.

    Raises ConfigError as `read_scores`.
    """
    folders = sorted(path for path in (run.folder / FOLDER).glob("*") if path.is_dir())
    names = sorted((folder.name for folder in folders), key=_place)
    scores, summary = [], {}
    for task in run.config.benchmarks.tasks:
        of_model, versions = {}, {}
        for name in names:
            manifest = store.read_manifest(run.folder, manifest_name(name, task))
            if manifest is None:
                continue
            if manifest.config != asked(run, task, limit):
                say(f"{task.name}, {name}: left out: it was asked otherwise (see its manifest)")
                continue
            of_model[name] = read_scores(run.folder / FOLDER / name / task.name, task, name)
            versions[name] = manifest.summary["lm_eval"]
        if of_model:
            scores += [score for found in of_model.values() for score in found]
            summary[task.name] = _task_summary(task, of_model, versions)
    run.write(BENCHMARKS, scores, BenchmarkScore)
    inputs = {
        name: path_fingerprint(run.folder / name)
        for name in (PROMPTS, STUDENT)
        if (run.folder / name).exists()
    }
    store.write_json(run.folder / BENCHMARK_SUMMARY, {"inputs": inputs, "tasks": summary})
    return scores, summary


def _place(name: str) -> tuple[int, str]:
    """Before, after, then the others by name."""
    return ((BEFORE, AFTER).index(name) if name in (BEFORE, AFTER) else 2, name)


def _task_summary(
    task: BenchmarkTask, of_model: Mapping[str, list[BenchmarkScore]], versions: Mapping[str, str]
) -> dict[str, Any]:
    models = {
        name: _interval([score.score for score in found])
        | {"items": len(found), "lm_eval": versions[name]}
        for name, found in of_model.items()
    }
    difference = None
    if BEFORE in of_model and AFTER in of_model:
        why_not = _incomparable(of_model[BEFORE], of_model[AFTER], versions)
        if why_not is None:
            difference = paired_difference(of_model[AFTER], of_model[BEFORE])
        else:
            say(f"{task.name}: before and after are not compared: {why_not}")
    return {
        "metric": task.metric,
        "models": models,
        "after_minus_before": None if difference is None else _values(difference),
    }


def _incomparable(
    one: Sequence[BenchmarkScore], other: Sequence[BenchmarkScore], versions: Mapping[str, str]
) -> str | None:
    if versions[BEFORE] != versions[AFTER]:
        return f"lm-eval was {versions[BEFORE]}, then {versions[AFTER]}"
    if {score.item for score in one} != {score.item for score in other}:
        return "their items differ, so the data has changed in between"
    return None


def paired_difference(one: Sequence[BenchmarkScore], other: Sequence[BenchmarkScore]) -> Interval:
    """The mean of one - other over the items, which must be the same, with its 95 % interval."""
    of_item = {score.item: score.score for score in other}
    return paired_difference_ci95(
        [score.score for score in one], [of_item[score.item] for score in one]
    )


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """The table for a person."""
    lines = []
    for name, task in summary.items():
        lines.append(f"{name} ({task['metric']})")
        for model, values in task["models"].items():
            lines.append(f"  {model:<16}{_shown(values)}, {values['items']} items")
        if task["after_minus_before"] is not None:
            lines.append(f"  {'after - before':<16}{_shown(task['after_minus_before'], '+')}")
    return lines


def _shown(values: Mapping[str, float], sign: str = "") -> str:
    mean, low, high = (format(values[key], f"{sign}.3f") for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _interval(scores: Sequence[float]) -> dict[str, Any]:
    return _values(mean_ci95(scores))


def _values(interval: Interval) -> dict[str, Any]:
    return interval._asdict()
