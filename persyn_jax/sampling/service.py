"""The sampling service: an OpenAI-compatible HTTP endpoint in front of one engine.

    POST /v1/chat/completions   /v1/completions   /v1/score_tokens   /tokenize   /detokenize
    GET  /v1/models   /health   /metrics   /version   /tokenizer_info   /openapi.json

One thread drives the engine; requests of all connections meet in its slots. `/health` answers 503
until the weights are loaded and every program is compiled, and again while the service ends.
"""

import asyncio
import importlib.metadata
import os
import socket
import sys
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from persyn_jax.sampling import protocol
from persyn_jax.sampling.answering import Answer, Serving, score_tokens
from persyn_jax.sampling.config import ServiceConfig
from persyn_jax.sampling.http_limits import HttpLimits, read_api_key
from persyn_jax.sampling.openai_replies import ChatCompletion, TextCompletion
from persyn_jax.sampling.protocol import RequestError, error_body
from persyn_jax.sampling.server import Server

_STOP_SECONDS = 2.0
_LARGE_BYTES = 64 << 10


class Status(TypedDict):
    """The reply to GET /health."""

    status: str


class Version(TypedDict):
    """The reply to GET /version."""

    version: str


class ModelCard(TypedDict):
    """A model that is served."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    """The reply to GET /v1/models."""

    object: str
    data: list[ModelCard]


class Tokens(TypedDict):
    """The reply to POST /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(TypedDict):
    """The reply to POST /detokenize."""

    prompt: str


class TokenizerInfo(TypedDict):
    """The reply to GET /tokenizer_info."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str
    pad_token: str | None
    chat_template: str
    model_max_length: int


class TokenScores(TypedDict):
    """The reply to POST /v1/score_tokens: natural logarithms, from completion_start on."""

    token_logprobs: list[float]
    mean: float


class _StrictRequest(fastapi.Request):
    async def json(self) -> Any:
        data = await self.body()
        try:
            if len(data) < _LARGE_BYTES:
                return protocol.parse_json(data)
            return await asyncio.to_thread(protocol.parse_json, data)
        except ValueError as error:
            raise HTTPException(400, f"the body is not valid JSON: {error}") from None


class _StrictRoute(APIRoute):
    """Parses bodies with `protocol.parse_json`."""

    def get_route_handler(self):
        handle = super().get_route_handler()

        async def strict(request: fastapi.Request) -> fastapi.Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


def create_app(config: ServiceConfig) -> fastapi.FastAPI:
    """The HTTP application. Loading starts at once, in the background.

    `app.state.serving` is what it serves from. Raises ConfigError if the API key is not set.
    """
    api_key = read_api_key(config)
    serving = Serving(config)
    app = fastapi.FastAPI(
        title="persyn_jax sampling service",
        version=importlib.metadata.version("persyn-jax"),
        docs_url=None,
        redoc_url=None,
        responses={
            "4XX": {"model": protocol.ErrorReply, "description": "Refused"},
            "5XX": {"model": protocol.ErrorReply, "description": "Failed"},
        },
    )
    app.state.serving = serving
    app.router.route_class = _StrictRoute
    app.add_middleware(HttpLimits, config=config, room=serving.room, api_key=api_key)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    _add_completions(app, serving)
    _add_tokens(app, serving)
    _add_information(app, serving)
    return app


async def _invalid(_, error: Any) -> JSONResponse:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or "body"
    message = first["msg"].removeprefix("Value error, ")
    if field == "body" and first["type"] != "missing":
        message = "must be a JSON object, with Content-Type: application/json"
    return JSONResponse(error_body(400, f"{field}: {message}", field), 400)


async def _http_error(_, error: Any) -> JSONResponse:
    return JSONResponse(
        error_body(error.status_code, error.detail), error.status_code, headers=error.headers
    )


def _check_model(config: ServiceConfig, model: str | None) -> None:
    if model not in (config.name, None):
        message = f"model: {model!r:.100} is not served here; {config.name!r} is"
        raise RequestError(404, message, "model")


def _add_completions(app: fastapi.FastAPI, serving: Serving) -> None:
    def documented(model: Any) -> dict[int | str, dict[str, Any]]:
        return {
            200: {
                "model": model,
                "description": "The answers; with `stream`, events that bring their parts",
                "content": {"text/event-stream": {}},
            }
        }

    @app.post("/v1/chat/completions", responses=documented(ChatCompletion))
    async def chat_completions(body: protocol.ChatRequest) -> fastapi.Response:
        _check_model(serving.config, body.model)
        return Answer(serving, body)

    @app.post("/v1/completions", responses=documented(TextCompletion))
    async def completions(body: protocol.CompletionRequest) -> fastapi.Response:
        _check_model(serving.config, body.model)
        return Answer(serving, body)

    @app.post("/v1/score_tokens")
    async def score(body: protocol.ScoreTokensRequest, http: fastapi.Request) -> TokenScores:
        _check_model(serving.config, body.model)
        found = await score_tokens(serving, body, http.receive)
        return {"token_logprobs": found, "mean": sum(found) / len(found)}


def _add_tokens(app: fastapi.FastAPI, serving: Serving) -> None:
    length = serving.config.engine.cache_length

    @app.post("/tokenize")
    async def tokenize(body: protocol.TokenizeRequest) -> Tokens:
        _check_model(serving.config, body.model)
        reader = serving.ready().reader
        with serving.room.take(1):
            if body.messages is not None and body.prompt is None:
                tokens = (await reader.chat(body.messages)).tokens
            elif body.prompt is not None and body.messages is None:
                tokens = await reader.text_tokens(body.prompt, body.add_special_tokens)
            else:
                raise RequestError(400, "prompt: either this or messages is needed", "prompt")
        return {"tokens": list(tokens), "count": len(tokens), "max_model_len": length}

    @app.post("/detokenize")
    async def detokenize(body: protocol.DetokenizeRequest) -> Text:
        _check_model(serving.config, body.model)
        reader = serving.ready().reader
        with serving.room.take(1):
            return {"prompt": await reader.token_text(body.tokens)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        tokenizer = serving.ready().reader.tokenizer
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.pad_token,
            "chat_template": tokenizer.get_chat_template(),
            "model_max_length": length,
        }


def _add_information(app: fastapi.FastAPI, serving: Serving) -> None:
    config = serving.config
    card: ModelCard = {
        "id": config.name,
        "object": "model",
        "created": 0,
        "owned_by": "persyn_jax",
        "max_model_len": config.engine.cache_length,
    }

    @app.get("/health")
    async def health() -> Status:
        serving.ready()
        if serving.room.drains:
            raise RequestError(503, "the service is about to end")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> fastapi.Response:
        return fastapi.Response(serving.metrics.text(), media_type=serving.metrics.media_type)

    @app.get("/version")
    async def version() -> Version:
        return {"version": app.version}

    @app.get("/v1/models")
    async def models() -> ModelList:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> ModelCard:
        _check_model(config, model)
        return card


def run(config: ServiceConfig, listener: socket.socket) -> None:
    """Serves on a bound socket until SIGINT or SIGTERM, and until running requests have ended.

    Raises ConfigError if the API key is not set.
    """
    app = create_app(config)
    serving: Serving = app.state.serving
    Server(app, serving.room, config.max_header_bytes, config.drain_seconds).run([listener])
    if not serving.close(_STOP_SECONDS):  # it compiles: nothing can interrupt that
        sys.stdout.flush()
        os._exit(0)
