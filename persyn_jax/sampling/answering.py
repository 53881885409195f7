"""From the body of a completion request to its reply, streamed or whole."""

import asyncio
import json
import secrets
import time
from collections.abc import Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi.responses import Response

from persyn_jax.models.weights import Model
from persyn_jax.sampling.config import ServiceConfig
from persyn_jax.sampling.engine import Engine
from persyn_jax.sampling.engine_thread import EngineThread
from persyn_jax.sampling.http_limits import Room
from persyn_jax.sampling.metrics import Metrics
from persyn_jax.sampling.openai_replies import Prompt, Replies, count_usage, event
from persyn_jax.sampling.prompt_reader import PromptReader
from persyn_jax.sampling.protocol import (
    ChatRequest,
    CompletionRequest,
    RequestError,
    ScoreTokensRequest,
    error_body,
)
from persyn_jax.sampling.requests import Piece, Request, ScoreRequest, Scores, join
from persyn_jax.sampling.token_text import TokenTexts, number

_COMPLETION_TOKENS = 16  # OpenAI's default
_LAST_WORD_SECONDS = 1.0
_NOTHING = Piece("", (), (), 0, "length")


class Serving:
    """What the routes share. Loading starts at once, in the background."""

    def __init__(self, config: ServiceConfig):
        self.config = config
        self.metrics = Metrics(config.name, lambda: self.thread.engine)
        self.room = Room(config.engine.slots + config.max_waiting)
        self._reader: PromptReader | None = None
        self._texts: TokenTexts | None = None
        self.thread = EngineThread(config, self._loaded)

    def _loaded(self, model: Model) -> None:
        """In the engine's thread, while nobody can ask yet."""
        self._reader = PromptReader(model.tokenizer, self.config.engine.cache_length)
        self._texts = TokenTexts(self._reader.tokenizer)

    def ready(self) -> "Ready":
        """What there is once all is loaded and compiled. Raises RequestError (503) until then."""
        if self.thread.engine is None:
            raise RequestError(503, "loading")
        assert self._reader is not None
        assert self._texts is not None
        return Ready(self.thread.engine, self._reader, self._texts)

    def close(self, seconds: float) -> bool:
        """Ends threads and processes. Returns False if the engine takes longer than `seconds`."""
        if self._reader is not None:
            self._reader.close()
        return self.thread.stop(seconds)


@dataclass(frozen=True)
class Ready:
    """The loaded parts."""

    engine: Engine
    reader: PromptReader
    texts: TokenTexts


class Answer(Response):
    """The response to a completion request; the work is done as it is sent.

    So that all of it, streamed or not, ends with the request: a client that leaves cancels it.
    """

    def __init__(self, serving: Serving, body: ChatRequest | CompletionRequest):
        super().__init__()
        self._serving = serving
        self._body = body
        self._started = False

    async def __call__(self, scope, receive, send) -> None:
        """Raises RequestError for what is refused."""
        await unless_disconnected(self._within_limits(scope, receive, send), receive)

    async def _within_limits(self, scope, receive, send) -> None:
        serving, body = self._serving, self._body
        ready = serving.ready()
        body.check()
        prompts = len(body.prompts) if isinstance(body, CompletionRequest) else 1
        seconds = serving.config.request_seconds
        with serving.room.take(prompts * body.n):
            try:
                async with asyncio.timeout(seconds):
                    await self._answer(ready, scope, receive, send)
            except TimeoutError:
                error = RequestError(504, f"no answer within {seconds:g} s")
                if not self._started:
                    raise error from None
                await _last_word(error, send)

    async def _answer(self, ready: Ready, scope, receive, send) -> None:
        started = time.monotonic()
        body = self._body
        prompts = await _read_prompts(ready.reader, body)
        requests = [
            request for prompt in prompts for request in _requests(body, prompt, ready.engine)
        ]
        scores = await _prompt_scores(self._serving.thread, ready.engine, body, prompts)
        self._serving.metrics.prompt_tokens.inc(sum(len(prompt.tokens) for prompt in prompts))
        replies = Replies(
            chat=isinstance(body, ChatRequest),
            model=body.model,
            texts=ready.texts,
            prompts=[prompt for prompt in prompts for _ in range(body.n)],
            scores=[score for score in scores for _ in range(body.n)],
            echo=isinstance(body, CompletionRequest) and bool(body.echo),
            with_logprobs=body.alternatives is not None,
            with_token_ids=body.return_token_ids,
            with_usage=body.stream_options is not None and body.stream_options.include_usage,
        )
        pieces = _Pieces(self._serving, requests, len(replies.prompts), started)
        read = sum(len(prompt.tokens) for prompt in prompts)
        if body.stream:
            await self._stream(pieces, replies, read, send)
            return
        found: list[list[Piece]] = [[] for _ in replies.prompts]
        async with aclosing(pieces.each()) as each:
            async for place, piece in each:
                found[place].append(piece)

        def content() -> bytes:
            answers = [
                join(own, len(prompt.tokens))
                for own, prompt in zip(found, replies.prompts, strict=True)
            ]
            usage = count_usage(read, sum(answer.generated_tokens for answer in answers))
            return json.dumps(replies.whole(answers, usage), allow_nan=False).encode()

        data = await ready.reader.off_loop(content) if replies.with_logprobs else content()
        self._started = True
        await Response(data, media_type="application/json")(scope, receive, send)

    async def _stream(self, pieces: "_Pieces", replies: Replies, read: int, send) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        generated = 0
        await _send_part(send, replies.opening())
        async with aclosing(pieces.each()) as each:
            async for place, piece in each:
                generated += piece.generated_tokens
                await _send_part(send, replies.part(place, piece))
        closing = replies.closing(count_usage(read, generated))
        await send({"type": "http.response.body", "body": closing})


@dataclass(frozen=True)
class _Pieces:
    """The pieces of all choices; those of no request at all are empty and end at once."""

    serving: Serving
    requests: list[Request]
    choices: int
    started: float

    async def each(self):
        if not self.requests:
            for place in range(self.choices):
                yield place, _NOTHING
            return
        clocks = [self.serving.metrics.clock(self.started) for _ in self.requests]
        async with aclosing(self.serving.thread.stream(self.requests)) as each:
            async for place, piece in each:
                assert isinstance(piece, Piece)
                clocks[place].count(piece)
                yield place, piece


async def _send_part(send, data: bytes) -> None:
    if data:
        await send({"type": "http.response.body", "body": data, "more_body": True})


async def _last_word(error: RequestError, send) -> None:
    """Ends a stream with an error, unless the client does not read at all."""
    data = event(error_body(error.status, str(error)))
    try:
        async with asyncio.timeout(_LAST_WORD_SECONDS):
            await send({"type": "http.response.body", "body": data})
    except TimeoutError:
        return  # the server closes what has not been finished


async def unless_disconnected(work: Coroutine[Any, Any, None], receive) -> None:
    """Does the work; cancels it when the client leaves first."""

    async def until_disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(until_disconnected())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(leaving, working, return_exceptions=True)


async def _read_prompts(reader: PromptReader, body: ChatRequest | CompletionRequest):
    if isinstance(body, ChatRequest):
        return [await reader.chat(body.messages)]
    return await reader.prompts(body.prompts, body.add_special_tokens, bool(body.echo))


def _requests(
    body: ChatRequest | CompletionRequest, prompt: Prompt, engine: Engine
) -> list[Request]:
    """One for each choice of the prompt; none for max_tokens 0.

    A prompt's choices do not depend on the prompts beside it. Raises RequestError.
    """
    field = "messages" if isinstance(body, ChatRequest) else "prompt"
    room = max(engine.config.cache_length - len(prompt.tokens), 1)
    if isinstance(body, ChatRequest):
        wanted = body.max_completion_tokens or body.max_tokens or room
    else:
        wanted = min(_COMPLETION_TOKENS, room) if body.max_tokens is None else body.max_tokens
    seed = secrets.randbits(32) if body.seed is None else body.seed
    requests = [
        Request(
            tokens=prompt.tokens,
            max_tokens=max(wanted, 1),
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(body.top_k, 0),
            seed=(seed + index) % (1 << 32),
            stop=tuple(body.stop or ()),
            logprobs=body.alternatives,
        )
        for index in range(body.n)
    ]
    if wanted:
        _check(engine, requests[0], field)
    else:
        _check(engine, ScoreRequest(prompt.tokens), field)
    return requests if wanted else []


async def _prompt_scores(
    thread: EngineThread,
    engine: Engine,
    body: ChatRequest | CompletionRequest,
    prompts: list[Prompt],
) -> list[Scores | None]:
    """Of every prompt, if its logprobs are to be echoed. Raises RequestError."""
    if isinstance(body, ChatRequest) or not body.echo or body.logprobs is None:
        return [None] * len(prompts)
    requests = [ScoreRequest(prompt.tokens, body.logprobs) for prompt in prompts]
    for request in requests:
        _check(engine, request, "echo")
    return list(await thread.scores(requests))


def _check(engine: Engine, request: Request | ScoreRequest, field: str) -> None:
    try:
        engine.check(request)
    except ValueError as error:
        raise RequestError(400, f"{field}: {error}", field) from None


async def score_tokens(serving: Serving, body: ScoreTokensRequest, receive) -> list[float]:
    """Log-probabilities of the tokens from `completion_start` on. Raises RequestError."""
    ready, start = serving.ready(), body.completion_start
    request = ScoreRequest(tuple(body.token_ids))
    if start >= len(request.tokens):
        message = f"must be less than the {len(request.tokens)} token_ids, got {start}"
        raise RequestError(400, f"completion_start: {message}", "completion_start")
    _check(ready.engine, request, "token_ids")
    found: list[Scores] = []

    async def work() -> None:
        found.extend(await serving.thread.scores([request]))

    seconds = serving.config.request_seconds
    with serving.room.take(1):
        try:
            async with asyncio.timeout(seconds):
                await unless_disconnected(work(), receive)
        except TimeoutError:
            raise RequestError(504, f"no answer within {seconds:g} s") from None
    if not found:
        raise RequestError(499, "the client has gone")
    return [number(entry.logprob) for entry in found[0].logprobs[start:] if entry is not None]
