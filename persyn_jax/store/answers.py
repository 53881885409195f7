"""The answer store: one SQLite file, shared by runs and students: no answer is ever paid for twice,
and none is measured twice by one model.

It lives on the local disk of the driver machine: SQLite's locks fail on network file systems.
"""

import contextlib
import dataclasses
import hashlib
import json
import sqlite3
import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tenacity

from persyn_jax.config import ConfigError
from persyn_jax.records import Answer, Message

BUSY_TIMEOUT_SECONDS = 60.0

_APPLICATION_ID = 0x50657253  # "PerS": tells our files from any other SQLite file
_VERSION = 1
_TABLE = """
CREATE TABLE answers (
    key TEXT PRIMARY KEY,
    teacher TEXT NOT NULL,
    teacher_fingerprint TEXT NOT NULL,
    sample_index INTEGER NOT NULL,
    text TEXT NOT NULL,
    token_ids TEXT,
    finish_reason TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    usd REAL,
    licence TEXT NOT NULL,
    error TEXT,
    server TEXT NOT NULL,
    latency_seconds REAL NOT NULL,
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
)
"""


# What models say of answers. A store made before there was this table gets it when it is opened,
# and a program that does not know it passes it over: the version stays.
_MEASUREMENTS = """
CREATE TABLE IF NOT EXISTS measurements (
    key TEXT NOT NULL,
    model TEXT NOT NULL,
    name TEXT NOT NULL,
    tokens BLOB NOT NULL,
    PRIMARY KEY (key, model, name)
)
"""
_NUMBER = np.dtype("<f4")


@dataclass(frozen=True)
class StoredAnswer:
    """A row: an answer, how it was made, and no prompt id, because equal prompts share it."""

    key: str
    teacher: str
    """The teacher's name in the run that asked; another run may call it something else."""
    teacher_fingerprint: str
    sample_index: int
    text: str
    token_ids: list[int] | None
    """The answer's tokens; null where the endpoint does not return them."""
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    licence: str
    error: str | None
    server: str
    latency_seconds: float

    def for_prompt(self, prompt_id: str, teacher: str) -> Answer:
        """The record of this answer to one prompt, under this run's name of the teacher."""
        return Answer(
            key=self.key,
            prompt_id=prompt_id,
            teacher=teacher,
            sample_index=self.sample_index,
            text=self.text,
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            usd=self.usd,
            licence=self.licence,
            error=self.error,
        )


_COLUMNS = [field.name for field in dataclasses.fields(StoredAnswer)]
_SELECT = f"""
SELECT {", ".join(_COLUMNS)} FROM answers WHERE key IN (SELECT value FROM json_each(?))
"""
# A committed answer stays as it is. A committed failure is no answer: the next attempt replaces it.
_PUT = f"""
INSERT INTO answers ({", ".join(_COLUMNS)})
VALUES ({", ".join(f":{column}" for column in _COLUMNS)})
ON CONFLICT (key) DO UPDATE SET {", ".join(f"{column} = excluded.{column}" for column in _COLUMNS)}
WHERE answers.finish_reason = 'error'
"""

_MEASURED = """
SELECT key, name FROM measurements WHERE model = ? AND key IN (SELECT value FROM json_each(?))
"""
_SELECT_MEASUREMENTS = """
SELECT key, name, tokens FROM measurements
WHERE model = ? AND key IN (SELECT value FROM json_each(?))
AND name IN (SELECT value FROM json_each(?))
"""
_PUT_MEASUREMENT = """
INSERT INTO measurements (key, model, name, tokens) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING
"""

# SQLite's own waiting does not cover the change to WAL, where two openers of a new file may meet.
_while_busy = tenacity.Retrying(
    retry=tenacity.retry_if_exception(
        lambda error: getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
    ),
    stop=tenacity.stop_after_delay(BUSY_TIMEOUT_SECONDS),
    wait=tenacity.wait_fixed(0.01),
    reraise=True,
)


def answer_key(messages: list[Message], teacher_fingerprint: str, sample_index: int) -> str:
    """Hex SHA-256 of (messages, teacher fingerprint, sample index) as canonical JSON."""
    canonical = json.dumps(
        [messages, teacher_fingerprint, sample_index], sort_keys=True, separators=(",", ":")
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


class AnswerStore:
    """An open answer store; threads may share one, processes open their own. A context manager.

    A call of `put`, `put_all` or `put_measurements` that returned is on the disk: neither a kill
    nor a power loss takes it away.
    All methods raise ConfigError naming the file: not a store, not writable, disk full, locked for
    a minute by others.
    """

    def __init__(self, path: Path):
        """Opens the store at `path`, or makes an empty one (and its folder)."""
        self._path = path
        self._lock = threading.Lock()
        with self._errors_named():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._set_up()
            except BaseException:
                self._connection.close()
                raise

    def get(self, keys: Iterable[str]) -> dict[str, StoredAnswer]:
        """The stored answers among `keys`, by key; failures (finish reason `error`) included."""
        with self._errors_named(), self._lock:
            rows = self._connection.execute(_SELECT, [json.dumps(list(keys))]).fetchall()
        return {answer.key: answer for answer in map(_from_row, rows)}

    def put(self, answer: StoredAnswer) -> None:
        """Commits `answer`, unless its key has one already."""
        self.put_all([answer])

    def put_all(self, answers: Iterable[StoredAnswer]) -> None:
        """Commits all of `answers` at once, or none: much faster than one by one."""
        self._commit(_PUT, [_to_row(answer) for answer in answers])

    def count(self) -> int:
        """Number of rows."""
        with self._errors_named(), self._lock:
            return self._connection.execute("SELECT count(*) FROM answers").fetchone()[0]

    def measured(self, keys: Iterable[str], model: str) -> dict[str, set[str]]:
        """Which columns `model` (a fingerprint) has measured of the answers `keys`: names by key.

        A key of which nothing was measured is left out.
        """
        with self._errors_named(), self._lock:
            rows = self._connection.execute(_MEASURED, [model, json.dumps(list(keys))]).fetchall()
        names: dict[str, set[str]] = {}
        for key, name in rows:
            names.setdefault(key, set()).add(name)
        return names

    def get_measurements(
        self, keys: Iterable[str], model: str, names: Iterable[str]
    ) -> dict[str, dict[str, np.ndarray]]:
        """The stored columns among `names` of the answers `keys`: float32 [T], by key and name."""
        arguments = [model, json.dumps(list(keys)), json.dumps(list(names))]
        with self._errors_named(), self._lock:
            rows = self._connection.execute(_SELECT_MEASUREMENTS, arguments).fetchall()
        columns: dict[str, dict[str, np.ndarray]] = {}
        for key, name, tokens in rows:
            columns.setdefault(key, {})[name] = np.frombuffer(tokens, _NUMBER)
        return columns

    def put_measurements(self, model: str, columns: dict[str, dict[str, np.ndarray]]) -> None:
        """Commits columns that `model` has measured, by answer key and name; all at once.

        They are kept as float32, in which counts are exact up to 2^24. A column that is there
        already stays as it is.
        """
        self._commit(
            _PUT_MEASUREMENT,
            [
                (key, model, name, np.asarray(tokens_T, _NUMBER).tobytes())
                for key, named in columns.items()
                for name, tokens_T in named.items()
            ],
        )

    def __enter__(self) -> "AnswerStore":
        return self

    def __exit__(self, *exception) -> None:
        self._connection.close()

    def _commit(self, statement: str, rows: list) -> None:
        """Runs the statement on all of the rows, or on none."""
        with self._errors_named(), self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany(statement, rows)
                self._connection.execute("COMMIT")
            except BaseException:
                # A full disk may have ended the transaction already.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _set_up(self) -> None:
        execute = self._connection.execute
        execute("PRAGMA synchronous = FULL")  # a commit returns after its fsync
        execute("BEGIN IMMEDIATE")  # two processes may be making the same new store
        (tables,) = execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables == 0:
            execute(_TABLE)
            execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            execute(f"PRAGMA user_version = {_VERSION}")
        (application_id,) = execute("PRAGMA application_id").fetchone()
        (version,) = execute("PRAGMA user_version").fetchone()
        if (application_id, version) == (_APPLICATION_ID, _VERSION):
            execute(_MEASUREMENTS)
        execute("COMMIT")
        if application_id != _APPLICATION_ID:
            raise ConfigError(f"{self._path}: a database of another program, not an answer store")
        if version != _VERSION:
            raise ConfigError(
                f"{self._path}: answer store of version {version}; this program reads {_VERSION}"
            )
        _while_busy(execute, "PRAGMA journal_mode = WAL")

    @contextlib.contextmanager
    def _errors_named(self) -> Generator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, UnicodeEncodeError) as error:
            raise ConfigError(f"{self._path}: answer store: {error}") from None


def _to_row(answer: StoredAnswer) -> dict[str, Any]:
    row = {name: getattr(answer, name) for name in _COLUMNS}
    row["token_ids"] = None if answer.token_ids is None else json.dumps(answer.token_ids)
    return row


def _from_row(row: tuple) -> StoredAnswer:
    values: dict[str, Any] = dict(zip(_COLUMNS, row, strict=True))
    if values["token_ids"] is not None:
        values["token_ids"] = json.loads(values["token_ids"])
    return StoredAnswer(**values)
