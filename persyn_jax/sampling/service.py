"""The sampling service: an OpenAI-compatible HTTP endpoint in front of one engine.

    POST /v1/chat/completions    GET /v1/models    GET /health    GET /metrics

One thread drives the engine; requests of all connections meet in its slots. `/health` answers 503
until the weights are loaded and every program is compiled.
"""

import asyncio
import concurrent.futures
import os
import queue
import secrets
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Coroutine
from typing import Annotated, Any, Literal

import fastapi
import uvicorn
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.exceptions import HTTPException

from persyn_jax.config import ConfigError
from persyn_jax.models import tokenizer, weights
from persyn_jax.sampling.config import ServiceConfig
from persyn_jax.sampling.engine import Completion, Engine, Request

# Fields of OpenAI's protocol and of vLLM's that would change the answer and are not offered, with
# the value that asks for nothing.
_NOT_OFFERED: dict[str, Any] = {
    "n": 1,
    "stream": False,
    "logprobs": False,
    "top_logprobs": 0,
    "prompt_logprobs": None,
    "echo": False,
    "top_k": -1,
    "min_p": 0,
    "min_tokens": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "bad_words": [],
    "stop_token_ids": [],
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "response_format": {"type": "text"},
    "structured_outputs": None,
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "none",
    "chat_template": None,
    "chat_template_kwargs": {},
    "continue_final_message": False,
    "add_generation_prompt": True,
}

_NonEmpty = Annotated[str, Field(min_length=1)]


def _one_or_many(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class ChatMessage(BaseModel):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions.

    Further fields are let through unless they would change the answer.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int | None = None
    stop: Annotated[list[_NonEmpty] | None, Field(max_length=4), BeforeValidator(_one_or_many)] = (
        None
    )
    return_token_ids: bool = False


class BadRequestError(Exception):
    """A request that can never succeed: 400, with the field that is to blame."""

    def __init__(self, message: str, param: str):
        super().__init__(message)
        self.param = param


class EngineThread:
    """Loads the engine and drives it in a thread of its own; the event loop calls `answer`."""

    def __init__(self, config: ServiceConfig):
        self.config = config
        self.engine: Engine | None = None
        """None until it is ready."""
        self._inbox: queue.SimpleQueue[tuple[Request, concurrent.futures.Future]] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._run, daemon=True, name="engine").start()

    async def answer(self, request: Request) -> Completion:
        """Waits for the completion of a request that has passed `Engine.check`.

        Cancelling the wait frees the request's slot.
        """
        future: concurrent.futures.Future[Completion] = concurrent.futures.Future()
        self._inbox.put((request, future))
        return await asyncio.wrap_future(future)

    def _run(self) -> None:
        try:
            self.engine = Engine(weights.load(self.config.model), self.config.engine)
            self._drive(self.engine)
        except ConfigError as error:
            _exit_process(str(error), 2)
        except Exception as error:  # a dead engine must not look like a slow one
            traceback.print_exc()
            _exit_process(f"the engine failed: {type(error).__name__}: {error}", 1)

    def _drive(self, engine: Engine) -> None:
        futures: dict[int, concurrent.futures.Future[Completion]] = {}
        while True:
            while not engine.busy or not self._inbox.empty():
                request, future = self._inbox.get()
                futures[engine.submit(request)] = future
            for ticket in [ticket for ticket, future in futures.items() if future.cancelled()]:
                engine.cancel(ticket)
                del futures[ticket]
            for ticket, completion in engine.step().items():
                future = futures.pop(ticket)
                if future.set_running_or_notify_cancel():  # from here on it cannot be cancelled
                    future.set_result(completion)


def _exit_process(reason: str, code: int) -> None:
    print("error: " + " ".join(reason.split()), file=sys.stderr, flush=True)
    os._exit(code)


def create_app(config: ServiceConfig) -> fastapi.FastAPI:
    """The HTTP application. Loading starts at once, in the background."""
    app = fastapi.FastAPI(title="persyn_jax sampling service", docs_url=None, redoc_url=None)
    thread = EngineThread(config)

    @app.exception_handler(BadRequestError)
    async def bad_request(_, error: BadRequestError):
        return _error(400, str(error), error.param)

    @app.exception_handler(RequestValidationError)
    async def invalid(_, error: RequestValidationError):
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _error(400, "the body is not valid JSON")
        field = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return _error(400, f"{field}: {first['msg']}", field)

    @app.exception_handler(HTTPException)
    async def http_error(_, error: HTTPException):
        return _error(error.status_code, error.detail)

    @app.get("/health")
    async def health():
        return _error(503, "loading") if thread.engine is None else {"status": "ok"}

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(_metrics_text(thread.engine))

    @app.get("/v1/models")
    async def models():
        model = {"id": config.name, "object": "model", "created": 0, "owned_by": "persyn_jax"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: fastapi.Request):
        if body.model != config.name:
            message = f"model: {body.model!r} is not served here; {config.name!r} is"
            return _error(404, message, "model")
        if thread.engine is None:
            return _error(503, "loading")
        request = _engine_request(thread.engine, body)
        completion = await _unless_disconnected(thread.answer(request), http)
        if completion is None:
            return _error(499, "the client has gone")
        return _chat_response(config.name, completion, body.return_token_ids)

    return app


async def _unless_disconnected(
    answer: Coroutine[Any, Any, Completion], http: fastapi.Request
) -> Completion | None:
    """The answer; None if the client leaves first, and then nobody works on it any longer."""

    async def until_disconnected() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(until_disconnected())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else None
    finally:
        leaving.cancel()
        answering.cancel()


def _engine_request(engine: Engine, body: ChatRequest) -> Request:
    for name, value in (body.model_extra or {}).items():
        if name in _NOT_OFFERED and value is not None and value != _NOT_OFFERED[name]:
            raise BadRequestError(f"{name}: {value!r} is not supported", name)
    try:
        tokens = tuple(
            tokenizer.prompt_ids(
                engine.tokenizer,
                [{"role": message.role, "content": message.content} for message in body.messages],
            )
        )
    except ConfigError as error:
        raise BadRequestError(f"messages: {error}", "messages") from None
    room = engine.config.cache_length - len(tokens)
    request = Request(
        tokens=tokens,
        max_tokens=body.max_completion_tokens or body.max_tokens or max(room, 1),
        temperature=body.temperature,
        top_p=body.top_p,
        seed=secrets.randbits(32) if body.seed is None else body.seed,
        stop=tuple(body.stop or ()),
    )
    try:
        engine.check(request)
    except ValueError as error:
        raise BadRequestError(f"messages: {error}", "messages") from None
    return request


def _chat_response(name: str, completion: Completion, with_token_ids: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": completion.text},
        "finish_reason": completion.finish_reason,
        "logprobs": None,
    }
    if with_token_ids:
        choice["token_ids"] = list(completion.token_ids)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": name,
        "choices": [choice],
        "usage": {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.generated_tokens,
            "total_tokens": completion.prompt_tokens + completion.generated_tokens,
        },
    }


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": None}
    return JSONResponse({"error": error}, status_code=status)


def _metrics_text(engine: Engine | None) -> str:
    """The engine's counters in Prometheus' text format."""
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    registry = CollectorRegistry()
    values = {} if engine is None else engine.counters.as_dict()
    for name, value in values.items():
        Gauge(f"persyn_{name}", name.replace("_", " "), registry=registry).set(value)
    return generate_latest(registry).decode()


def run(config: ServiceConfig, listener: socket.socket) -> None:
    """Serves on a bound socket until SIGINT or SIGTERM."""
    server = uvicorn.Server(uvicorn.Config(create_app(config), log_level="warning", lifespan="off"))
    server.run(sockets=[listener])
