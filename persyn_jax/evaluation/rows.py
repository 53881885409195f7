"""Prompts read from rows: a JSONL or Parquet file of the user's, or a `datasets` data set.

A row holds `prompt` (the text of a single user message) or `messages` (a conversation that ends
with the user's turn), and where there are such: `id`, `answer` (the reference answer), `split`
(calibration, train or eval). What else it holds is left aside.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from persyn_jax.config import ConfigError
from persyn_jax.records import Message, Split

SPLITS: tuple[Split, ...] = get_args(Split)
RowField = Literal["id", "prompt", "messages", "answer"]
"""What a column of a data set can be read as."""
_ROLES = ("system", "user", "assistant")


class Question(NamedTuple):
    """A prompt before it is dealt into a split."""

    where: str
    """Where it came from, for messages about it: `data.jsonl:3`."""
    id: str
    messages: list[Message]
    answer: str | None
    split: Split | None
    """The split that the row itself names; null where it names none."""


class Row(NamedTuple):
    """One row as it was found, and where: `data.jsonl:3`."""

    where: str
    values: dict[str, Any]


def read_file(path: Path, holds: str = "prompts") -> Iterator[Row]:
    """The rows of a .jsonl or .parquet file, a part of which is in memory at a time.

    holds: what they are, for messages about the file.
    Raises ConfigError: no such file, another kind of file; as it goes on, a line that is not a JSON
    object, not a Parquet file.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file of {holds}")
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    raise ConfigError(f"{path}: a file of {holds} must end in .jsonl or .parquet")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ConfigError(f"{where}: not valid JSON: {error}") from None
            if not isinstance(values, dict):
                raise ConfigError(f"{where}: must be a JSON object, got {type(values).__name__}")
            yield Row(where, values)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    yield Row(f"{path}: row {index}", values)
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a readable Parquet file: {_one_line(error)}") from None


def read_dataset(
    name: str, config: str | None, split: str, columns: Mapping[RowField, str]
) -> list[Row]:
    """The rows of `datasets.load_dataset(name, config, split=split)`, columns renamed to fields.

    columns: field -> column, of all that is to be read; if empty, the columns named like a field.
    Raises ConfigError: whatever keeps the data set from loading, a column that it does not have.
    """
    import datasets

    where = f"data set {name!r}"
    try:
        dataset: Any = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # files, network, hub and builder each raise their own
        raise ConfigError(f"{where}: cannot be loaded: {_one_line(error)}") from None
    present = dataset.column_names
    for column in columns.values():
        if column not in present:
            raise ConfigError(f"{where}: no column {column!r}, only {', '.join(present)}")
    columns = columns or {field: field for field in get_args(RowField) if field in present}
    return [
        Row(f"{where}: row {index}", {field: row[column] for field, column in columns.items()})
        for index, row in enumerate(dataset)
    ]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def to_questions(source: str, rows: Iterable[Row]) -> list[Question]:
    """The rows as questions; one without `id` is named after the source and its place, from 0.

    Raises ConfigError, naming the row: neither or both of `prompt` and `messages`, a conversation
    that is malformed or does not end with the user, an id given twice, an answer that is no text or
    whole number, an unknown split.
    """
    questions = []
    where_of_id: dict[str, str] = {}
    for index, (where, values) in enumerate(rows):
        given = values.get("id")
        question = Question(
            where=where,
            id=f"{source}-{index:04d}" if given is None else str(given),
            messages=_messages(where, values),
            answer=_answer(where, values.get("answer")),
            split=_split(where, values.get("split")),
        )
        claim_id(question, where_of_id)
        questions.append(question)
    return questions


def claim_id(question: Question, where_of_id: dict[str, str]) -> None:
    """Enters the question's id. Raises ConfigError where another has it."""
    other = where_of_id.setdefault(question.id, question.where)
    if other != question.where:
        raise ConfigError(f"{question.where}: id {question.id!r} is also that of {other}")


def _messages(where: str, values: dict[str, Any]) -> list[Message]:
    prompt: Any = values.get("prompt")
    messages: Any = values.get("messages")
    if (prompt is None) == (messages is None):
        found = "neither" if prompt is None else "both"
        raise ConfigError(f"{where}: must have either `messages` or `prompt`, has {found}")
    if messages is None:
        messages = [{"role": "user", "content": prompt}]
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{where}: messages must be a list of at least one message")
    for message in messages:
        _check_message(where, message)
    if messages[-1]["role"] != "user":
        raise ConfigError(f"{where}: the last message must be the user's")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise ConfigError(f"{where}: the role of a message must be one of {', '.join(_ROLES)}")
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise ConfigError(f"{where}: the content of a message must be text and not empty")


def _answer(where: str, answer: Any) -> str | None:
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, int):
        return str(answer)
    raise ConfigError(
        f"{where}: answer must be text, a whole number or null, got {type(answer).__name__}"
    )


def _split(where: str, split: Any) -> Split | None:
    if split is not None and split not in SPLITS:
        raise ConfigError(f"{where}: split must be one of {', '.join(SPLITS)}, got {split!r}")
    return split
