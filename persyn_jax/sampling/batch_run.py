"""Asks the entries of a batch file, many at once, and appends each response as it comes."""

import asyncio
import contextlib
import datetime
import email.utils
import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import httpx
import tenacity

from persyn_jax.config import ConfigError
from persyn_jax.sampling.batch_file import (
    Entry,
    Held,
    answer_row,
    check_input,
    error_row,
    outcome_of,
    parse_json,
    passing,
    read_entries,
    read_output,
)

ATTEMPTS = 6
"""Tries of one entry before it is written as failed."""
MAX_RETRY_AFTER_SECONDS = 300.0
# 0.5, 1, 2, ... seconds and up to one more, so that requests that failed together come apart.
_BACKOFF = tenacity.wait_exponential(multiplier=0.5, max=30) + tenacity.wait_random()
_SECONDS_BETWEEN_SYNCS = 1.0


@dataclass(frozen=True)
class Endpoint:
    """Where a batch is asked, and how."""

    base_url: str
    """For example `http://host:8000/v1`."""
    api_key: str | None
    concurrency: int
    """Requests under way at once."""
    timeout_seconds: float
    """For one try, from sending to the whole response."""


class _Response(NamedTuple):
    status: int
    request_id: str | None
    body: Any


class _PassingError(Exception):
    """A failure that may be over a moment later."""

    def __init__(self, message: str, response: _Response | None = None, wait: float = 0.0):
        super().__init__(message)
        self.response = response
        self.wait_seconds = wait


def run_batch(
    source: Path,
    target: Path,
    endpoint: Endpoint,
    on_start: Callable[[int, int], Callable[[], None]],
) -> dict[str, Any]:
    """Asks all entries of `source` that have no final response in `target`, and appends to it.

    on_start: gets the number of entries that have a final response and of those to ask; returns
    what to call after each row.
    Returns the counts: `entries`, of which `answered`, `refused` (a final 4xx) and `failed`;
    `asked` now; `prompt_tokens` and `completion_tokens` of these.
    Raises ConfigError: a bad line in either file (nothing has been sent then), another run that
    writes to `target`, an API key that the endpoint does not take.
    """
    custom_ids = check_input(source)
    with _open_output(source, target) as (file, held):
        outcomes = {name: held.outcomes.get(name, "failed") for name in custom_ids}
        to_ask = {name for name, outcome in outcomes.items() if outcome == "failed"}
        on_row = on_start(len(custom_ids) - len(to_ask), len(to_ask))
        tokens: Counter[str] = Counter()

        def write(custom_id: str, status: int | None, row: bytes, usage: Any) -> None:
            _write(file, row, target)
            outcomes[custom_id] = outcome_of(status)
            for name in ("prompt_tokens", "completion_tokens"):
                count = usage.get(name) if isinstance(usage, dict) else None
                tokens[name] += count if isinstance(count, int) else 0
            on_row()

        entries = (entry for entry in read_entries(source) if entry.custom_id in to_ask)
        asyncio.run(_ask_all(entries, endpoint, file, write))
    counts = Counter(outcomes.values())
    return {
        "entries": len(outcomes),
        **{name: counts[name] for name in ("answered", "refused", "failed")},
        "asked": len(to_ask),
        **{name: tokens[name] for name in ("prompt_tokens", "completion_tokens")},
    }


@contextlib.contextmanager
def _open_output(source: Path, target: Path) -> Iterator[tuple[BinaryIO, Held]]:
    """The output file, held by this process alone, without a line that was cut short."""
    if target.exists() and target.samefile(source):
        raise ConfigError(f"{target}: is the input; the output must be another file")
    try:
        # Unbuffered: a row is with the operating system as soon as it is written.
        file = open(target, "a+b", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{target}: another run is writing to it") from None
        with open(target, "rb") as reader:
            held = read_output(reader, target)
        file.truncate(held.whole_bytes)
        if not held.ends_line:
            _write(file, b"\n", target)
        try:
            yield file, held
        finally:
            os.fsync(file.fileno())


def _write(file: BinaryIO, data: bytes, path: Path) -> None:
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


async def _ask_all(
    entries: Iterator[Entry],
    endpoint: Endpoint,
    file: BinaryIO,
    write: Callable[[str, int | None, bytes, Any], None],
) -> None:
    limits = httpx.Limits(max_connections=endpoint.concurrency)
    # No timeout here: a try is limited as a whole.
    async with httpx.AsyncClient(limits=limits, timeout=None, trust_env=False) as http:

        async def ask_in_turn() -> None:
            for entry in entries:
                write(*await _ask(http, entry, endpoint))

        async def sync() -> None:
            while True:
                await asyncio.sleep(_SECONDS_BETWEEN_SYNCS)
                with contextlib.suppress(OSError):  # the sync at the end says it again
                    await asyncio.to_thread(os.fsync, file.fileno())

        syncing = asyncio.create_task(sync())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(endpoint.concurrency):
                    group.create_task(ask_in_turn())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            syncing.cancel()
            await asyncio.wait([syncing])


async def _ask(
    http: httpx.AsyncClient, entry: Entry, endpoint: Endpoint
) -> tuple[str, int | None, bytes, Any]:
    """(custom_id, status, output line, usage) of an entry, after as many tries as it takes."""
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(_PassingError),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=_wait,
        reraise=True,
    )
    try:
        response = await retrying(_try_once, http, entry, endpoint)
    except _PassingError as error:
        message = f"failed {ATTEMPTS} times, last: {error}"
        if error.response is None:
            return entry.custom_id, None, error_row(entry.custom_id, "no_response", message), None
        status, _, body = error.response
        row = error_row(entry.custom_id, f"status_{status}", message, status, body)
        return entry.custom_id, status, row, None
    status, request_id, body = response
    if outcome_of(status) == "failed":
        message = f"status {status}: {_message(body)}"
        row = error_row(entry.custom_id, f"status_{status}", message, status, body)
        return entry.custom_id, status, row, None
    usage = body.get("usage") if isinstance(body, dict) else None
    return entry.custom_id, status, answer_row(entry.custom_id, status, request_id, body), usage


def _wait(state: tenacity.RetryCallState) -> float:
    failure = state.outcome.exception() if state.outcome else None
    asked = failure.wait_seconds if isinstance(failure, _PassingError) else 0.0
    return max(_BACKOFF(state), min(asked, MAX_RETRY_AFTER_SECONDS))


async def _try_once(http: httpx.AsyncClient, entry: Entry, endpoint: Endpoint) -> _Response:
    headers = {"Content-Type": "application/json"}
    if endpoint.api_key:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    content = json.dumps(entry.body).encode()  # ASCII: halves of surrogate pairs go as they came
    url = endpoint.base_url.rstrip("/") + entry.url.removeprefix("/v1")
    try:
        async with asyncio.timeout(endpoint.timeout_seconds):
            reply = await http.post(url, content=content, headers=headers)
    except TimeoutError:
        raise _PassingError(f"no response within {endpoint.timeout_seconds:g} s") from None
    except httpx.RequestError as error:
        raise _PassingError(" ".join(str(error).split()) or type(error).__name__) from None
    return _read(reply, entry, endpoint)


def _read(reply: httpx.Response, entry: Entry, endpoint: Endpoint) -> _Response:
    status, content = reply.status_code, reply.content
    if endpoint.api_key and not reply.is_success:  # some repeat the key that they do not take
        content = content.replace(endpoint.api_key.encode(), b"***")
    try:
        body = parse_json(content)
    except ValueError:
        if reply.is_success:
            raise _PassingError(f"status {status} with a body that is not JSON") from None
        body = content.decode(errors="replace")[:2000]
    response = _Response(status, reply.headers.get("x-request-id"), body)
    if status in (401, 403):
        refused = f"{endpoint.base_url}: refused {entry.custom_id!r:.100} with status {status}"
        raise ConfigError(f"{refused}: {_message(body)}")
    if passing(status):
        wait = _retry_after_seconds(reply.headers.get("retry-after", ""))
        raise _PassingError(f"status {status}: {_message(body)}", response, wait)
    return response


def _message(body: Any) -> str:
    """What an error's body says, in one short line."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:300]


def _retry_after_seconds(value: str) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date. 0 if it says neither."""
    with contextlib.suppress(ValueError):
        seconds = float(value)
        return seconds if seconds > 0 else 0.0
    with contextlib.suppress(ValueError, TypeError):
        until = email.utils.parsedate_to_datetime(value)
        return max(0.0, (until - datetime.datetime.now(datetime.UTC)).total_seconds())
    return 0.0
