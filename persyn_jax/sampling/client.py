"""The client of any OpenAI-compatible endpoint: many questions at once, retries where it helps."""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import httpx
import tenacity
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from persyn_jax.config import ConfigError
from persyn_jax.records import Message
from persyn_jax.sampling.config import ClientConfig, TeacherConfig

_RETRIED_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
# 0.5, 1, 2, ... seconds and up to one more, so that requests that failed together come apart.
_WAIT_BETWEEN_TRIES = tenacity.wait_exponential(multiplier=0.5, max=30) + tenacity.wait_random()


class EndpointError(RuntimeError):
    """An endpoint kept failing after all retries. One line. Answers that were committed stay."""


class _PassingError(Exception):
    """A reply that may be another one later."""


@dataclass(frozen=True)
class Question:
    """One request: everything that is sent, and the name under which its reply comes back."""

    key: str
    prompt_id: str
    teacher: TeacherConfig
    messages: list[Message]
    seed: int


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered."""

    text: str
    """Valid Unicode: halves of surrogate pairs are replaced by U+FFFD."""
    token_ids: list[int] | None
    finish_reason: str
    """The endpoint's word: `stop` or `length`, or another one such as `content_filter`, which makes
    the answer unusable."""
    prompt_tokens: int
    completion_tokens: int
    server: str
    latency_seconds: float


class _Endpoint(NamedTuple):
    """Where a teacher is asked."""

    where: str
    """Names the teacher and the URL, for messages."""
    base_url: str
    model: str
    api_key: str | None


def ask_all(
    questions: Sequence[Question],
    config: ClientConfig,
    own_service: tuple[str, str] | None,
    on_reply: Callable[[Question, Reply], None],
) -> None:
    """Asks all questions; calls `on_reply` as each reply arrives, in any order.

    own_service: (base URL, model name) for teachers that name no endpoint.
    Raises ConfigError for a request that an endpoint refuses (4xx), a text that is not valid
    Unicode and an API key that is not in the environment; EndpointError after the last try. The
    other requests are given up then; replies that had arrived are with `on_reply` already.
    """
    teachers = {question.teacher.name: question.teacher for question in questions}
    endpoints = {name: _endpoint(teacher, own_service) for name, teacher in teachers.items()}
    asyncio.run(_ask_all(questions, endpoints, config, on_reply))


def _endpoint(teacher: TeacherConfig, own_service: tuple[str, str] | None) -> _Endpoint:
    if teacher.base_url is not None:
        base_url, model = teacher.base_url.rstrip("/"), teacher.model
    elif own_service is not None:
        base_url, model = own_service[0], teacher.model or own_service[1]
    else:
        raise ConfigError(f"teacher {teacher.name!r}: no base_url, and no service to ask instead")
    return _Endpoint(
        where=f"teacher {teacher.name!r} at {base_url}",
        base_url=base_url,
        model=str(model),
        api_key=_api_key(teacher),
    )


def _api_key(teacher: TeacherConfig) -> str | None:
    if teacher.api_key_env is None:
        return None
    variable = f"teacher {teacher.name!r}: environment variable {teacher.api_key_env}"
    key = os.environ.get(teacher.api_key_env, "").strip()
    if not key:
        raise ConfigError(f"{variable} is not set")
    if not (key.isascii() and key.isprintable()):  # the HTTP library's own message would show it
        raise ConfigError(f"{variable} holds characters that no API key has")
    return key


async def _ask_all(
    questions: Sequence[Question],
    endpoints: dict[str, _Endpoint],
    config: ClientConfig,
    on_reply: Callable[[Question, Reply], None],
) -> None:
    places = asyncio.Semaphore(config.concurrency)
    # No timeout here: a try is limited as a whole.
    limits = httpx.Limits(max_connections=config.concurrency)
    async with httpx.AsyncClient(limits=limits, timeout=None, trust_env=False) as http:

        async def ask(question: Question) -> None:
            async with places:
                endpoint = endpoints[question.teacher.name]
                on_reply(question, await _ask(http, question, endpoint, config))

        try:
            async with asyncio.TaskGroup() as group:
                for question in questions:
                    group.create_task(ask(question))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None


async def _ask(
    http: httpx.AsyncClient, question: Question, endpoint: _Endpoint, config: ClientConfig
) -> Reply:
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type((httpx.RequestError, TimeoutError, _PassingError)),
        stop=tenacity.stop_after_attempt(config.attempts),
        wait=_WAIT_BETWEEN_TRIES,
        reraise=True,
    )
    try:
        return await retrying(_try_once, http, question, endpoint, config.timeout_seconds)
    except TimeoutError:
        reason = f"no answer within {config.timeout_seconds:g} s"
    except (httpx.RequestError, _PassingError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    raise EndpointError(f"{endpoint.where}: failed {config.attempts} times, last: {reason}")


async def _try_once(
    http: httpx.AsyncClient, question: Question, endpoint: _Endpoint, timeout_seconds: float
) -> Reply:
    body = _body(question, endpoint)
    headers = {"Content-Type": "application/json"}
    if endpoint.api_key is not None:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    started = time.monotonic()
    async with asyncio.timeout(timeout_seconds):
        url = f"{endpoint.base_url}/chat/completions"
        response = await http.post(url, content=body, headers=headers)
    latency_seconds = time.monotonic() - started
    status = f"status {response.status_code}"
    if response.status_code in _RETRIED_STATUS:
        raise _PassingError(f"{status}: {_error_message(response, endpoint)}")
    if response.status_code != 200:
        raise ConfigError(
            f"{endpoint.where}: refused prompt {question.prompt_id!r} with {status}: "
            f"{_error_message(response, endpoint)}"
        )
    return _reply(response, endpoint.base_url, latency_seconds)


def _body(question: Question, endpoint: _Endpoint) -> bytes:
    sampling = question.teacher.sampling
    body: dict[str, Any] = {
        "model": endpoint.model,
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
            f"{endpoint.where}: prompt {question.prompt_id!r} is not valid Unicode: {error.reason}"
        ) from None


def _error_message(response: httpx.Response, endpoint: _Endpoint) -> str:
    """What the endpoint says is wrong, in one line, without the API key should it repeat that."""
    message = response.text
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        message = str(json.loads(response.content)["error"]["message"])
    if endpoint.api_key is not None:
        message = message.replace(endpoint.api_key, "***")
    return " ".join(message[:500].split())


def _valid_unicode(text: Any) -> Any:
    """Joins surrogate pairs and replaces lone halves, which cut-off JSON escapes leave behind."""
    if isinstance(text, str):
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return "" if text is None else text


class _ReplyMessage(BaseModel):
    content: Annotated[str, BeforeValidator(_valid_unicode)]


class _Choice(BaseModel):
    message: _ReplyMessage
    finish_reason: Annotated[str, Field(min_length=1)]
    token_ids: list[int] | None = None


class _Usage(BaseModel):
    prompt_tokens: Annotated[int, Field(ge=0)]
    completion_tokens: Annotated[int, Field(ge=0)]


class _ChatCompletion(BaseModel):
    """What is read of the reply's body; the rest is ignored."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage


def _reply(response: httpx.Response, server: str, latency_seconds: float) -> Reply:
    """Raises _PassingError for a body that is no chat completion."""
    try:
        body = _ChatCompletion.model_validate(json.loads(response.content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _PassingError(f"not a chat completion: {place}: {first['msg']}") from None
    except (ValueError, RecursionError):
        raise _PassingError("not a chat completion: not JSON") from None
    choice = body.choices[0]
    if choice.finish_reason in ("error", "abort"):  # the endpoint's own word for a failure
        raise _PassingError(f"finish_reason {choice.finish_reason!r}")
    return Reply(
        text=choice.message.content,
        token_ids=choice.token_ids,
        finish_reason=choice.finish_reason,
        prompt_tokens=body.usage.prompt_tokens,
        completion_tokens=body.usage.completion_tokens,
        server=server,
        latency_seconds=latency_seconds,
    )


def price(teacher: TeacherConfig, reply: Reply) -> float | None:
    """US dollars of one reply; None if the teacher's price is unknown."""
    prompt = teacher.usd_per_million_prompt_tokens
    completion = teacher.usd_per_million_completion_tokens
    if prompt is None or completion is None:
        return None
    return (prompt * reply.prompt_tokens + completion * reply.completion_tokens) / 1e6
