"""A question, and one try to have it answered over HTTP."""

import asyncio
import itertools
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from persyn_jax.config import ConfigError
from persyn_jax.records import Message
from persyn_jax.sampling.address import api_key
from persyn_jax.sampling.config import ClientConfig, TeacherConfig
from persyn_jax.sampling.replies import PassingError, Reply, read_reply

_CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Question:
    """One request: everything that is sent, and the name under which its reply comes back."""

    key: str
    prompt_id: str
    teacher: TeacherConfig
    messages: list[Message]
    seed: int


class Target(NamedTuple):
    """Where a teacher is asked, and as what."""

    base_url: str
    model: str
    api_key: str | None


def read_api_key(teacher: TeacherConfig) -> str | None:
    """The teacher's key from the environment. Raises ConfigError, which never shows it."""
    return api_key(teacher.api_key_env, f"teacher {teacher.name!r}: ")


@dataclass
class Connections:
    """Open connections that wait for their next request, by base URL.

    Each is an HTTP client of its own: httpx looks at all connections of a client for every request,
    which with 32 of them takes three times as long as the request itself.
    """

    config: ClientConfig
    tls: ssl.SSLContext = field(default_factory=lambda: httpx.create_ssl_context(trust_env=False))
    idle: dict[str, list[httpx.AsyncClient]] = field(default_factory=dict)

    async def post(self, base_url: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
        """Posts to the chat completions of `base_url`. Raises as httpx does."""
        idle = self.idle.setdefault(base_url, [])
        http = idle.pop() if idle else self._open()
        try:
            response = await http.post(
                f"{base_url}/chat/completions", content=body, headers=headers
            )
        except BaseException:
            await http.aclose()  # half a reply may still be on its way
            raise
        idle.append(http)
        return response

    def _open(self) -> httpx.AsyncClient:
        # Of silence, not of a whole try: that is limited outside.
        seconds = self.config.idle_seconds
        timeout = httpx.Timeout(seconds, connect=min(_CONNECT_SECONDS, seconds))
        return httpx.AsyncClient(verify=self.tls, timeout=timeout, trust_env=False)

    async def __aenter__(self) -> "Connections":
        return self

    async def __aexit__(self, *exception) -> None:
        for http in itertools.chain.from_iterable(self.idle.values()):
            await http.aclose()


async def ask_once(connections: Connections, question: Question, target: Target) -> Reply:
    """Raises as `read_reply`; PassingError too for whatever keeps the reply from coming, and
    ConfigError for a prompt that is not valid Unicode."""
    config = connections.config
    body = _body(question, target)
    headers = {"Content-Type": "application/json"}
    if target.api_key is not None:
        headers["Authorization"] = f"Bearer {target.api_key}"
    started = time.monotonic()
    try:
        async with asyncio.timeout(config.timeout_seconds):
            response = await connections.post(target.base_url, body, headers)
    except TimeoutError:
        reason = f"no answer within {config.timeout_seconds:g} s"
        raise PassingError(reason, overload=True) from None
    except httpx.ReadTimeout:
        reason = f"no byte for {config.idle_seconds:g} s"
        raise PassingError(reason, overload=True) from None
    except httpx.RequestError as error:
        absent = isinstance(error, (httpx.NetworkError, httpx.TimeoutException))
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PassingError(reason, overload=absent) from None
    latency_seconds = time.monotonic() - started
    return read_reply(response, target.api_key, target.base_url, latency_seconds)


def _body(question: Question, target: Target) -> bytes:
    sampling = question.teacher.sampling
    body: dict[str, Any] = {
        "model": target.model,
        "messages": question.messages,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": question.seed,
    }
    if sampling.stop:
        body["stop"] = sampling.stop
    if question.teacher.base_url is None:
        body["return_token_ids"] = True
    try:
        return json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"teacher {question.teacher.name!r} at {target.base_url}: prompt "
            f"{question.prompt_id!r} is not valid Unicode: {error.reason}"
        ) from None
