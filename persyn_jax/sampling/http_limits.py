"""What every request must get past before anybody reads it: pure ASGI middleware.

In this order: header size (431), API key (401), draining (503), overload (429), body size (413) and
time (408).
Whatever is answered carries an X-Request-Id, and no exception reaches the server.
"""

import asyncio
import hmac
import json
import logging
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from persyn_jax.sampling.address import api_key
from persyn_jax.sampling.config import ServiceConfig
from persyn_jax.sampling.protocol import RequestError, error_body

_BODY_SECONDS = 60.0
_DROPPED_BYTES = 64 << 20
_RETRY_SECONDS = 1
_OPEN_PATH = "/health"
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

logger = logging.getLogger("uvicorn.error")


def read_api_key(config: ServiceConfig) -> bytes | None:
    """The key that requests must bring, from the environment; None if they need none.

    Raises ConfigError if the variable is not set, or holds what no key does.
    """
    key = api_key(config.api_key_env, "service: ")
    return None if key is None else key.encode()


@dataclass
class Room:
    """Counts the answers that are waiting or on their way; lives on the event loop alone.

    So that a request is refused at once, however busy the engine is.
    """

    limit: int
    taken: int = 0
    requests: int = 0
    """HTTP requests that these answers belong to."""
    drains: bool = False
    """Whether the service is about to end and takes no new requests."""

    def refuse_if_full(self, answers: int = 1) -> None:
        """Raises RequestError (429) if there is no room for so many now."""
        if self.taken + answers > self.limit:
            raise RequestError(429, f"{self.taken} answers are waiting or on their way: try later")

    @contextmanager
    def take(self, answers: int) -> Iterator[None]:
        """Holds room for so many answers. Raises RequestError: 429, or 400 if they never fit."""
        if answers > self.limit:
            raise RequestError(400, f"{answers} answers are more than the {self.limit} allowed")
        self.refuse_if_full(answers)
        self.taken += answers
        self.requests += 1
        try:
            yield
        finally:
            self.taken -= answers
            self.requests -= 1


@dataclass(frozen=True)
class HttpLimits:
    """The middleware: an ASGI application around `app`."""

    app: Any
    config: ServiceConfig
    room: Room
    api_key: bytes | None = field(repr=False)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        response = _Response(send, _request_id(scope))
        try:
            self._check_head(scope)
            body = await self._read_body(scope, receive)
            await self.app(scope, _with_body(body, receive), response.send)
        except RequestError as error:
            if response.started:
                raise
            await response.refuse(error)
        except _Disconnected:
            return
        except Exception:
            logger.exception("request %s failed", response.request_id)
            if response.started:
                raise
            await response.refuse(RequestError(500, "internal error"))

    def _check_head(self, scope) -> None:
        """Raises RequestError."""
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self.config.max_header_bytes:
            limit = self.config.max_header_bytes
            raise RequestError(431, f"the headers have {size} bytes, {limit} are allowed")
        if scope["path"] == _OPEN_PATH:
            return
        if self.api_key is not None and not _has_key(scope, self.api_key):
            raise RequestError(401, "a valid API key is needed: Authorization: Bearer KEY")
        if scope["method"] == "POST":  # all others ask for information only
            if self.room.drains:
                raise RequestError(503, "the service is about to end")
            self.room.refuse_if_full()

    async def _read_body(self, scope, receive) -> bytes:
        """Raises RequestError; _Disconnected if the client leaves before its end.

        Of a body that is too long a good part is read and dropped all the same: many clients look
        for an answer only when they have sent all.
        """
        limit = self.config.max_body_bytes
        declared = _header(scope, b"content-length")
        too_long = declared.isdigit() and (len(declared) > 18 or int(declared) > limit)
        waits_for_leave = _header(scope, b"expect").lower() == b"100-continue"
        chunks, size, more = [], 0, not (too_long and waits_for_leave)
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while more and not (too_long and size > _DROPPED_BYTES):
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Disconnected
                    chunks.append(message.get("body", b""))
                    more = message.get("more_body", False)
                    size += len(chunks[-1])
                    too_long = too_long or size > limit
                    if too_long:
                        chunks.clear()
        except TimeoutError:
            reason = f"the body did not arrive within {_BODY_SECONDS:g} s"
            raise RequestError(408, reason) from None
        if too_long:
            raise RequestError(413, f"the body exceeds the {limit} bytes allowed")
        return b"".join(chunks)


class _Disconnected(Exception):  # noqa: N818
    """The client has left."""


class _Response:
    """Adds X-Request-Id to what is sent, and can say no where nothing has been sent yet."""

    def __init__(self, send, request_id: str):
        self.request_id = request_id
        self.started = False
        self._send = send

    async def send(self, message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            own = (b"x-request-id", self.request_id.encode())
            message = {**message, "headers": [*message.get("headers", []), own]}
        await self._send(message)

    async def refuse(self, error: RequestError) -> None:
        content = json.dumps(error_body(error.status, str(error), error.param)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
            *refusal_headers(error.status),
        ]
        start = {"type": "http.response.start", "status": error.status, "headers": headers}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": content})


def refusal_headers(status: int) -> list[tuple[bytes, bytes]]:
    """Headers that belong to a status: when to come back, how to log in, that nobody listens."""
    if status in (429, 503):
        return [(b"retry-after", b"%d" % _RETRY_SECONDS)]
    if status == 401:
        return [(b"www-authenticate", b"Bearer")]
    return [(b"connection", b"close")] if status in (408, 413, 431) else []


def _header(scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _has_key(scope, key: bytes) -> bool:
    scheme, _, given = _header(scope, b"authorization").partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), key)


def _request_id(scope) -> str:
    given = _header(scope, b"x-request-id").decode("latin-1")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def _with_body(body: bytes, receive):
    """A `receive` that brings the body in one piece, then what the server says."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay():
        return waiting.pop() if waiting else await receive()

    return replay
