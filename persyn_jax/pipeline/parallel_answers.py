"""Answers of many teachers in one file, taken apart: prompts, and one file of answers a teacher.

A row holds a prompt and every teacher's answer to it, in one of three shapes:

    a struct a teacher   {"uuid", "instruction", "Qwen2-7B-Instruct": {"content": ..., SCORE: 1}}
    a text a teacher     {"id", "question", "answer", "Qwen2-7B-Instruct": "..."}
    a list, a mapping    {"id", "problem", "responses": [{"model": ..., "response": ...}]}

The first is Magpie-Align/Magpie-100K-Generator-Zoo: 19 structs, each with the answer as `content`
and scores of reward models beside it (seen in programs that read the data set). PerSyn-Math
(hengyuanya/PerSyn_dataset) is published as JSON; its fields could not be seen, so all three shapes
are taken.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from persyn_jax import store
from persyn_jax.config import ConfigError
from persyn_jax.evaluation.rows import Row, read_file

_ID_KEYS = ("uuid", "id", "prompt_id", "index", "idx")
_PROMPT_KEYS = ("instruction", "prompt", "problem", "question", "query")
_REFERENCE_KEYS = ("reference", "ground_truth", "gold", "answer", "solution")
_LIST_KEYS = ("responses", "answers", "outputs", "generations")
_MODEL_KEYS = ("model", "teacher", "teacher_id", "model_name", "generator")
_TEXT_KEYS = ("content", "response", "answer", "text", "output")
# Columns of text that say something about the prompt, where teachers have columns of text too.
_ABOUT_KEYS = ("source", "dataset", "subject", "category", "type", "level", "difficulty", "split")


class Parallel(NamedTuple):
    """One prompt with the answers of several teachers."""

    id: str
    prompt: str
    reference: str | None
    answers: dict[str, dict[str, Any]]
    """By teacher: `text`, and `scores` by name where the row has some."""


class Imported(NamedTuple):
    """What was written."""

    prompts: int
    prompts_file: Path
    answers: dict[str, int]
    """How many each teacher has."""
    files: dict[str, Path]
    """Each teacher's."""


def import_parallel(paths: Sequence[Path], out: Path) -> Imported:
    """Writes `out/prompts.jsonl` and `out/answers/TEACHER.jsonl`, one row at a time.

    Raises ConfigError, naming the row: no prompt, no answer of anybody, an id given twice; and for
    two teachers whose names make the same file name.
    """
    counts: dict[str, int] = {}
    files: dict[str, Path] = {}
    where_of_id: dict[str, str] = {}
    prompts_file = out / "prompts.jsonl"
    with contextlib.ExitStack() as stack:
        write_prompt = stack.enter_context(store.writing_jsonl(prompts_file))
        write_answer: dict[str, Callable[[Mapping[str, Any]], None]] = {}
        for row in read_rows(paths):
            parallel = read_parallel(row, default_id=f"{len(where_of_id):06d}")
            other = where_of_id.setdefault(parallel.id, row.where)
            if other != row.where:
                raise ConfigError(f"{row.where}: id {parallel.id!r} is also that of {other}")
            reference = {} if parallel.reference is None else {"answer": parallel.reference}
            write_prompt({"id": parallel.id, "prompt": parallel.prompt, **reference})
            for teacher, answer in parallel.answers.items():
                if teacher not in files:
                    files[teacher] = _file_of(teacher, out / "answers", files)
                    writing = store.writing_jsonl(files[teacher])
                    write_answer[teacher] = stack.enter_context(writing)
                write_answer[teacher]({"id": parallel.id, **answer})
                counts[teacher] = counts.get(teacher, 0) + 1
    return Imported(len(where_of_id), prompts_file, counts, files)


def _file_of(teacher: str, folder: Path, files: Mapping[str, Path]) -> Path:
    path = folder / (re.sub(r"[^\w.-]", "_", teacher) + ".jsonl")
    if path in files.values():
        other = next(name for name, file in files.items() if file == path)
        raise ConfigError(f"teachers {other!r} and {teacher!r}: both would be written to {path}")
    return path


def read_rows(paths: Iterable[Path]) -> Iterator[Row]:
    """The rows of .jsonl, .parquet and .json files; the last hold one list of objects.

    Raises ConfigError as `evaluation.rows.read_file`.
    """
    for path in paths:
        if path.suffix != ".json":
            yield from read_file(path, "rows")
            continue
        rows = store.read_json(path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ConfigError(f"{path}: must hold a list of objects")
        yield from (Row(f"{path}: row {index}", row) for index, row in enumerate(rows))


def read_parallel(row: Row, default_id: str) -> Parallel:
    """One row, in any of the three shapes. Raises ConfigError as `import_parallel`."""
    values = row.values
    prompt = values.get(_first(_PROMPT_KEYS, values))
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(
            f"{row.where}: has no prompt: none of {', '.join(_PROMPT_KEYS)} is a text"
        )
    answers = {teacher: found for teacher, found in _answers(row) if found["text"].strip()}
    if not answers:
        raise ConfigError(f"{row.where}: has no answer of any teacher")
    reference = values.get(_first(_REFERENCE_KEYS, values))
    given = values.get(_first(_ID_KEYS, values))
    return Parallel(
        id=default_id if given is None else str(given),
        prompt=prompt,
        reference=str(reference) if isinstance(reference, str | int | float) else None,
        answers=answers,
    )


def _first(keys: Sequence[str], values: Mapping[str, Any]) -> str:
    """The first of `keys` that is there; the first of all where none is."""
    return next((key for key in keys if values.get(key) is not None), keys[0])


def _answers(row: Row) -> Iterator[tuple[str, dict[str, Any]]]:
    """(teacher, answer) of every teacher that the row has something of."""
    listed = row.values.get(_first(_LIST_KEYS, row.values))
    if isinstance(listed, dict):
        yield from _of_columns(listed)
    elif isinstance(listed, list):
        for entry in listed:
            teacher = entry.get(_first(_MODEL_KEYS, entry)) if isinstance(entry, dict) else None
            if not isinstance(teacher, str):
                raise ConfigError(
                    f"{row.where}: an answer says not whose it is: none of {', '.join(_MODEL_KEYS)}"
                )
            yield from _of_columns({teacher: entry})
    else:
        about = {*_ID_KEYS, *_PROMPT_KEYS, *_REFERENCE_KEYS, *_ABOUT_KEYS}
        columns = {key: value for key, value in row.values.items() if key not in about}
        structs = {key: value for key, value in columns.items() if isinstance(value, dict)}
        yield from _of_columns(structs or columns)


def _of_columns(columns: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for teacher, value in columns.items():
        if isinstance(value, str):
            yield teacher, {"text": value}
        elif isinstance(value, dict):
            text = value.get(_first(_TEXT_KEYS, value))
            if isinstance(text, str):
                scores = {name: score for name, score in value.items() if _is_number(score)}
                yield teacher, {"text": text, **({"scores": scores} if scores else {})}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def config_lines(source: str, imported: Imported) -> list[str]:
    """What to put into a run's config, as YAML: `sources`, and `teachers` whose licences the user
    fills in (the config is refused until then)."""
    lines = [
        "sources:",
        f"  {source}:",
        "    kind: file",
        f"    path: {json.dumps(str(imported.prompts_file))}",
        "    counts: {calibration: , train: , eval: }",
        "    licence: unknown",
        "teachers:",
    ]
    for teacher, path in imported.files.items():
        name, file = json.dumps(teacher), json.dumps(str(path))
        lines.append(f"  - {{name: {name}, answers: {file}, licence: }}")
    return lines
