"""The trained router as a service: it says which teacher suits a prompt, or asks that teacher.

    POST /predict {"prompt": TEXT or [TURN, ...]} -> {"coefs": [...], "teacher": NAME}
    POST /v1/chat/completions with `model: router-RUN`: routed to a teacher, whose answer comes back
    GET  /models (the teachers, in the order of coefs)   /v1/models   /health

The first is the interface of Prompt-to-Leaderboard (arXiv 2502.14855), the second RouteLLM's.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import fastapi
import httpx
import numpy as np
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from persyn_jax.config import ConfigError
from persyn_jax.pipeline.config import RunConfig
from persyn_jax.pipeline.run import Run
from persyn_jax.records import Message
from persyn_jax.routing.selection import licence_gate
from persyn_jax.sampling.answering import unless_disconnected
from persyn_jax.sampling.config import ServiceConfig, TeacherConfig, teacher_messages
from persyn_jax.sampling.http_limits import HttpLimits, Room, read_api_key
from persyn_jax.sampling.protocol import RequestError, error_body
from persyn_jax.sampling.question import Target
from persyn_jax.sampling.question import read_api_key as read_teacher_key
from persyn_jax.sampling.server import Server

Choose = Callable[[list[Message]], list[float]]
"""Messages -> a Bradley-Terry coefficient for each teacher. Raises ConfigError for bad messages."""
TEACHER_HEADER = "x-persyn-teacher"
_ROOM = 256
_UPSTREAM_SECONDS = 600.0


class Turn(BaseModel):
    """One turn of a conversation."""

    role: str
    content: str


class PredictRequest(BaseModel):
    """The body of POST /predict: the user's only turn, or all of the user's turns."""

    prompt: str | Annotated[list[str], Field(min_length=1)]


class RoutedRequest(BaseModel):
    """The body of POST /v1/chat/completions. Further fields reach the teacher as they are."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[Turn], Field(min_length=1)]


class Asked(NamedTuple):
    """A teacher that can be asked."""

    teacher: TeacherConfig
    target: Target


def load_router_of(run: Run) -> tuple[Choose, list[str]]:
    """The finished run's router, and the names of its teachers, in the order of coefficients.

    Raises ConfigError when the run has no router yet.
    """
    from persyn_jax import mesh as meshes
    from persyn_jax.models import router
    from persyn_jax.models.tokenizer import prompt_ids
    from persyn_jax.pipeline.run_files import ROUTER
    from persyn_jax.sampling.scoring import on_mesh, pooled_states

    folder = run.folder / ROUTER
    if not folder.exists():
        raise ConfigError(f"{run.folder}: has no router; run the stages up to train_router first")
    head, teachers, _ = router.load_router(folder)
    meshes.start_platform(run.config.run.platform, 1)
    mesh, config = meshes.make_mesh(1), run.config
    backbone = router.load_backbone(folder, config.router_backbone, config.run.seed)
    backbone = on_mesh(backbone, mesh)

    def choose(messages: list[Message]) -> list[float]:
        state_1D = pooled_states(backbone, [tuple(prompt_ids(backbone.tokenizer, messages))], mesh)
        return np.asarray(router.coefficients(head, state_1D))[0].tolist()

    return choose, teachers


def find_teachers(config: RunConfig, names: Sequence[str], own_service: Callable) -> list[Asked]:
    """Where each teacher of the router is asked: at the first of its URLs. Starts the run's own
    service if one needs it.

    Raises ConfigError for a teacher that is not in the config any more or has only a file of
    answers, and a missing API key.
    """
    teacher_of = {teacher.name: teacher for teacher in config.teachers}
    found = []
    for name in names:
        if name not in teacher_of:
            raise ConfigError(f"the router knows a teacher {name!r}, the config does not")
        teacher = teacher_of[name]
        if teacher.answers is not None:
            raise ConfigError(f"teacher {name!r}: has a file of answers and no endpoint to ask")
        url, model = (
            (teacher.base_urls[0], str(teacher.model)) if teacher.base_urls else own_service()
        )
        found.append(Asked(teacher, Target(url, teacher.model or model, read_teacher_key(teacher))))
    return found


def create_router_app(
    name: str,
    choose: Choose,
    teachers: Sequence[Asked],
    limits: ServiceConfig,
    room: Room,
    refuse_licences: Collection[str] = (),
) -> fastapi.FastAPI:
    """The HTTP application. One request at a time is routed; any number wait for teachers.

    refuse_licences: as in `RoutingConfig`. Raises ConfigError where no teacher remains.
    """
    allowed_M = licence_gate([asked.teacher.licence for asked in teachers], refuse_licences)
    app = fastapi.FastAPI(title="persyn_jax router", docs_url=None, redoc_url=None)
    app.add_middleware(HttpLimits, config=limits, room=room, api_key=read_api_key(limits))
    routing = asyncio.Lock()
    http = httpx.AsyncClient(timeout=_UPSTREAM_SECONDS, trust_env=False)

    async def route(messages: list[Message]) -> tuple[list[float], Asked]:
        async with routing:
            try:
                coefficients = await asyncio.to_thread(choose, messages)
            except ConfigError as error:
                raise RequestError(400, f"messages: {error}", "messages") from None
        return coefficients, teachers[int(np.where(allowed_M, coefficients, -np.inf).argmax())]

    @app.exception_handler(fastapi.exceptions.RequestValidationError)
    async def invalid(_, error: Any) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return JSONResponse(error_body(400, f"{field}: {first['msg']}", field), 400)

    @app.get("/health")
    async def health() -> Mapping[str, str]:
        return {"status": "ok"}

    @app.get("/models")
    async def teacher_names() -> list[str]:
        return [asked.teacher.name for asked in teachers]

    @app.get("/v1/models")
    async def models() -> Mapping[str, Any]:
        card = {"id": name, "object": "model", "created": 0, "owned_by": "persyn_jax"}
        return {"object": "list", "data": [card]}

    @app.post("/predict")
    async def predict(body: PredictRequest) -> Mapping[str, Any]:
        turns = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        with room.take(1):
            coefficients, chosen = await route([{"role": "user", "content": t} for t in turns])
        return {"coefs": coefficients, "teacher": chosen.teacher.name}

    @app.post("/v1/chat/completions")
    async def chat_completions(body: RoutedRequest) -> fastapi.Response:
        if body.model != name:
            raise RequestError(404, f"model: {body.model!r:.100} is not served here; {name!r} is")
        messages: list[Message] = [
            {"role": turn.role, "content": turn.content} for turn in body.messages
        ]
        with contextlib.ExitStack() as held:  # until the last byte: the service drains so long
            held.enter_context(room.take(1))
            _, chosen = await route(messages)
            reply = await _ask_teacher(http, chosen, messages, body.model_extra or {})
            return _PassedOn(reply, chosen.teacher.name, held.pop_all())

    return app


async def _ask_teacher(
    http: httpx.AsyncClient, asked: Asked, messages: list[Message], fields: Mapping[str, Any]
) -> httpx.Response:
    """The teacher's reply, its body not read yet. What the request does not say is drawn as the
    teacher's config says. Raises RequestError (502) when it does not answer."""
    teacher, target = asked
    sampling = {key: value for key, value in vars(teacher.sampling).items() if value != []}
    if "max_completion_tokens" in fields:
        del sampling["max_tokens"]
    own = {"model": target.model, "messages": teacher_messages(teacher, messages)}
    headers = {"Content-Type": "application/json"}
    if target.api_key is not None:
        headers["Authorization"] = f"Bearer {target.api_key}"
    request = http.build_request(
        "POST",
        f"{target.base_url}/chat/completions",
        content=json.dumps(sampling | dict(fields) | own).encode(),
        headers=headers,
    )
    try:
        return await http.send(request, stream=True, follow_redirects=False)
    except httpx.RequestError as error:
        reason = str(error) or type(error).__name__
        raise RequestError(502, f"teacher {teacher.name!r} does not answer: {reason}") from None


class _PassedOn(fastapi.Response):
    """A teacher's reply as it comes, streamed or whole, status included.

    held: closed after the last byte, or when the client has left.
    """

    def __init__(self, reply: httpx.Response, teacher: str, held: contextlib.ExitStack):
        super().__init__()
        self._reply, self._teacher, self._held = reply, teacher, held

    async def __call__(self, scope, receive, send) -> None:
        with self._held:
            try:
                await unless_disconnected(self._pass_on(send), receive)
            finally:
                await self._reply.aclose()

    async def _pass_on(self, send) -> None:
        kind = self._reply.headers.get("content-type", "application/json")
        headers = {"content-type": kind, TEACHER_HEADER: self._teacher}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        status = self._reply.status_code
        await send({"type": "http.response.start", "status": status, "headers": raw})
        async for part in self._reply.aiter_bytes():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def run_router(run: Run, listener: Any, ready: Callable[[], None]) -> None:
    """Serves the run's router on a bound socket until SIGINT or SIGTERM.

    ready: called when everything is loaded. Raises ConfigError as the functions above.
    """
    choose, names = load_router_of(run)
    teachers = find_teachers(run.config, names, run.own_service)
    limits = run.config.service or ServiceConfig(model=run.config.router_backbone)
    room = Room(_ROOM)
    refused = run.config.routing.refuse_licences
    app = create_router_app(
        f"router-{run.config.run.name}", choose, teachers, limits, room, refused
    )
    ready()
    Server(app, room, limits.max_header_bytes, limits.drain_seconds).run([listener])
