"""vLLM's batch file format: what a line of the input asks, what a file of outputs holds.

    in   {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    out  {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}

Both files are JSON Lines. The newest line of a `custom_id` counts.
"""

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from persyn_jax.config import ConfigError

URLS = ("/v1/chat/completions", "/v1/completions")
MAX_LINE_BYTES = 1 << 20
_OUT_BEGINS = b'{"id":'

Outcome = Literal["answered", "refused", "failed"]
"""Of an entry: 2xx; another final response, which would be the same again; none so far."""


class Entry(NamedTuple):
    """One request of the input."""

    line: int
    """From 1 on."""
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass
class Held:
    """What an output file holds."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """By custom_id."""
    whole_bytes: int = 0
    """Length of the file without a last line that a kill cut short."""
    ends_line: bool = True
    """False where only the last line's end is missing."""


def passing(status: int) -> bool:
    """Whether a response of this status may be another one a moment later."""
    return status in (408, 409, 425, 429) or status >= 500


def outcome_of(status: int | None) -> Outcome:
    """What a response of this status makes of its entry; None is no response.

    Missing rights, a wrong address and an unknown model are mended outside the entry (401, 403,
    404, and redirections): another try may help.
    """
    if status is None or passing(status) or status < 200 or 300 <= status < 400:
        return "failed"
    if status < 300:
        return "answered"
    return "failed" if status in (401, 403, 404) else "refused"


def read_entries(path: Path) -> Iterator[Entry]:
    """The entries of the input file, one in memory at a time; blank lines are left out.

    Raises ConfigError naming file and line: no such file, longer than MAX_LINE_BYTES, not a JSON
    object, a field that is missing or not as the format has it.
    """
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 2):
                number += 1
                if line.strip():
                    yield parse_entry(line, path, number)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def parse_entry(line: bytes, path: Path, number: int) -> Entry:
    """The entry on line `number` of the input. Raises ConfigError as `read_entries` does."""
    where = f"{path}:{number}"
    if len(line.rstrip(b"\r\n")) > MAX_LINE_BYTES:
        raise ConfigError(f"{where}: longer than {MAX_LINE_BYTES} bytes, which is the most allowed")
    values = _object(line, where)
    custom_id, method, url, body = (
        values.get(name) for name in ("custom_id", "method", "url", "body")
    )
    if not isinstance(custom_id, str) or not custom_id:
        raise ConfigError(f"{where}: custom_id: must be a non-empty string, got {custom_id!r:.100}")
    if method != "POST":
        raise ConfigError(f"{where}: method: must be 'POST', got {method!r:.100}")
    if url not in URLS:
        raise ConfigError(f"{where}: url: must be one of {', '.join(URLS)}, got {url!r:.100}")
    if not isinstance(body, dict):
        raise ConfigError(f"{where}: body: must be an object, got {type(body).__name__}")
    if body.get("stream"):
        raise ConfigError(f"{where}: body.stream: must be false: a row holds a whole response")
    return Entry(number, custom_id, url, body)


def check_input(path: Path) -> set[str]:
    """Reads the whole input file. Returns the custom_ids.

    Raises ConfigError as `read_entries` does, and for a custom_id that two lines have.
    """
    seen: dict[str, int] = {}
    for entry in read_entries(path):
        if entry.custom_id in seen:
            raise ConfigError(
                f"{path}:{entry.line}: custom_id {entry.custom_id!r:.100} is that of "
                f"line {seen[entry.custom_id]} too"
            )
        seen[entry.custom_id] = entry.line
    return set(seen)


def read_output(file: BinaryIO, path: Path) -> Held:
    """What the output file holds, read from its start; one row in memory at a time.

    Raises ConfigError naming file and line for a line that is not a row of a batch's output. Only
    the last line may be cut short, as a kill in the middle of a write leaves it.
    """
    held = Held()
    file.seek(0)
    for number, line in enumerate(file, start=1):
        where = f"{path}:{number}"
        ends_line = line.endswith(b"\n")
        try:
            custom_id, outcome = _parse_row(line, where)
        except ConfigError:
            if ends_line or line[: len(_OUT_BEGINS)] != _OUT_BEGINS[: len(line)]:
                raise
            return held
        held.outcomes[custom_id] = outcome
        held.whole_bytes += len(line)
        held.ends_line = ends_line
    return held


def _parse_row(line: bytes, where: str) -> tuple[str, Outcome]:
    values = _object(line, where)
    custom_id, response = values.get("custom_id"), values.get("response")
    if not isinstance(custom_id, str):
        raise ConfigError(f"{where}: not a row of a batch's output: it has no custom_id")
    if response is None:
        return custom_id, "failed"
    status = response.get("status_code") if isinstance(response, dict) else None
    if type(status) is not int:
        raise ConfigError(f"{where}: not a row of a batch's output: it has no status_code")
    return custom_id, outcome_of(status)


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = parse_json(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must be a JSON object, got {type(values).__name__}")
    return values


def parse_json(data: bytes) -> Any:
    """The JSON value in `data`. Raises ValueError, also for NaN and what is nested too deep."""
    try:
        return json.loads(data, parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a number")


def _finite(text: str) -> float:
    if abs(value := float(text)) == float("inf"):
        raise ValueError(f"{text:.40} is too large a number")
    return value


def answer_row(custom_id: str, status: int, request_id: str | None, body: Any) -> bytes:
    """The output line of an entry that got a final response."""
    return _row(custom_id, status, request_id, body, None)


def error_row(
    custom_id: str, code: str, message: str, status: int | None = None, body: Any = None
) -> bytes:
    """The output line of an entry that got none: the last failure."""
    return _row(custom_id, status, None, body, {"code": code, "message": message})


def _row(
    custom_id: str, status: int | None, request_id: str | None, body: Any, error: Any
) -> bytes:
    name = uuid.uuid4().hex
    response = None
    if status is not None:
        response = {
            "status_code": status,
            "request_id": request_id or f"batch-{name}",
            "body": body,
        }
    row = {"id": f"batch_req_{name}", "custom_id": custom_id, "response": response, "error": error}
    # ASCII only: also half a surrogate pair, which an endpoint may answer, can be written so.
    return json.dumps(row, separators=(",", ":"), allow_nan=False).encode() + b"\n"
