"""The client of any OpenAI-compatible endpoint: asks many questions at once, retries what may succeed later."""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
import tenacity

from persyn_jax.config import ConfigError
from persyn_jax.records import Message
from persyn_jax.sampling.config import ClientConfig, TeacherConfig

_RETRIED_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}


class EndpointFailed(RuntimeError):
    """An endpoint kept failing after all retries. One line. Answers that were committed stay."""


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
    token_ids: list[int] | None
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    server: str
    latency_seconds: float


def ask_all(
    questions: Sequence[Question],
    config: ClientConfig,
    own_service: tuple[str, str] | None,
    on_reply: Callable[[Question, Reply], None],
) -> None:
    """Asks all questions; calls `on_reply` as each reply arrives, in any order.

    own_service: (base URL, model name) for teachers that name no endpoint.
    Raises ConfigError for a request that an endpoint refuses (4xx), EndpointFailed after the last retry.
    """
    asyncio.run(_ask_all(questions, config, own_service, on_reply))


async def _ask_all(questions, config, own_service, on_reply) -> None:
    limits = httpx.Limits(max_connections=config.concurrency)
    timeout = httpx.Timeout(config.timeout_seconds)
    places = asyncio.Semaphore(config.concurrency)
    async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as http:

        async def ask(question: Question) -> None:
            async with places:
                on_reply(question, await _ask(http, question, config, own_service))

        # Stops the others as soon as one fails; replies that have arrived are with `on_reply` already.
        try:
            async with asyncio.TaskGroup() as group:
                for question in questions:
                    group.create_task(ask(question))
        except* (ConfigError, EndpointFailed) as failures:
            raise failures.exceptions[0] from None


async def _ask(http: httpx.AsyncClient, question: Question, config: ClientConfig, own) -> Reply:
    teacher = question.teacher
    base_url, model = own if teacher.base_url is None else (teacher.base_url, teacher.model)
    where = f"teacher {teacher.name!r} at {base_url}"
    body = {
        "model": teacher.model or model,
        "messages": question.messages,
        "max_tokens": teacher.sampling.max_tokens,
        "temperature": teacher.sampling.temperature,
        "top_p": teacher.sampling.top_p,
        "seed": question.seed,
    }
    if teacher.sampling.stop:
        body["stop"] = teacher.sampling.stop
    if teacher.base_url is None:
        body["return_token_ids"] = True
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type((httpx.TransportError, _TryAgain)),
        stop=tenacity.stop_after_attempt(config.attempts),
        wait=tenacity.wait_exponential_jitter(initial=0.5, max=30),
        reraise=True,
    )
    started = time.monotonic()
    try:
        response = await retrying(_post, http, f"{base_url}/chat/completions", body, teacher)
    except (httpx.TransportError, _TryAgain) as error:
        reason = str(error) or type(error).__name__
        raise EndpointFailed(f"{where}: failed {config.attempts} times, last: {reason}") from None
    if response.status_code != 200:
        raise ConfigError(
            f"{where}: refused prompt {question.prompt_id!r} with status {response.status_code}: "
            f"{_error_message(response)}"
        )
    return _reply(response, where, base_url, time.monotonic() - started)


class _TryAgain(Exception):
    """A status that may be another one later."""


async def _post(http, url: str, body: dict, teacher: TeacherConfig) -> httpx.Response:
    headers = {}
    if teacher.api_key_env is not None:
        if (key := os.environ.get(teacher.api_key_env)) is None:
            raise ConfigError(
                f"teacher {teacher.name!r}: environment variable {teacher.api_key_env} is not set"
            )
        headers["Authorization"] = f"Bearer {key}"
    response = await http.post(url, json=body, headers=headers)
    if response.status_code in _RETRIED_STATUS:
        raise _TryAgain(f"status {response.status_code}: {_error_message(response)}")
    return response


def _error_message(response: httpx.Response) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(response.json()["error"]["message"])
    return " ".join(response.text[:200].split())


def _reply(response: httpx.Response, where: str, base_url: str, latency: float) -> Reply:
    try:
        body = response.json()
        choice, usage = body["choices"][0], body["usage"]
        return Reply(
            text=choice["message"]["content"] or "",
            token_ids=choice.get("token_ids"),
            finish_reason=choice["finish_reason"],
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            server=base_url,
            latency_seconds=latency,
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise EndpointFailed(f"{where}: not a chat completion ({error!r})") from None


def price(teacher: TeacherConfig, reply: Reply) -> float | None:
    """US dollars of one reply; None if the teacher's price is unknown."""
    prompt, completion = (
        teacher.usd_per_million_prompt_tokens,
        teacher.usd_per_million_completion_tokens,
    )
    if prompt is None or completion is None:
        return None
    return (prompt * reply.prompt_tokens + completion * reply.completion_tokens) / 1e6
