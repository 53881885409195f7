"""The router's service: its choices against the run's records, and what reaches the teachers."""

import asyncio
import dataclasses
import json

import httpx
import pytest
import scripted_endpoint
from pipeline_runs import small_config

from persyn_jax import config, store
from persyn_jax.models.spec import ModelConfig
from persyn_jax.pipeline import router_service
from persyn_jax.pipeline.run import Run
from persyn_jax.records import Prompt, Route
from persyn_jax.sampling.config import SamplingConfig, ServiceConfig, TeacherConfig, WorkedExample
from persyn_jax.sampling.http_limits import Room
from persyn_jax.sampling.question import Target

LIMITS = ServiceConfig(model=ModelConfig(weights="random:tiny"))


@pytest.fixture
def endpoint():
    with scripted_endpoint.serving() as endpoint:
        yield endpoint


def teacher(name: str, **values) -> TeacherConfig:
    return TeacherConfig(name=name, model="m", base_url="http://x/v1", licence="MIT", **values)


def app_of(url: str, room: Room | None = None, **more):
    """Two teachers; the second is for prompts that begin with `2`."""
    first = teacher("first", sampling=SamplingConfig(temperature=0.5, max_tokens=9))
    second = teacher(
        "second", system="Be brief.", examples=[WorkedExample(question="q", answer="a")]
    )
    if "refuse_licences" in more:
        second = dataclasses.replace(second, licence="Llama3.1")

    def choose(messages):
        return [0.25, 1.5 if messages[-1]["content"].startswith("2") else -1.5]

    asked = [
        router_service.Asked(t, Target(url, f"model of {t.name}", "key")) for t in (first, second)
    ]
    return router_service.create_router_app(
        "router-mine", choose, asked, LIMITS, room or Room(8), **more
    )


def post(app, path: str, **body) -> httpx.Response:
    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            return await http.post(path, json=body)

    return asyncio.run(ask())


def chat(app, content: str, **fields) -> httpx.Response:
    messages = [{"role": "user", "content": content}]
    return post(app, "/v1/chat/completions", model="router-mine", messages=messages, **fields)


def test_predict_says_the_coefficients(endpoint):
    assert post(app_of(endpoint.url), "/predict", prompt="2 apples").json() == {
        "coefs": [0.25, 1.5],
        "teacher": "second",
    }
    turns = ["2 apples", "and pears?"]
    assert post(app_of(endpoint.url), "/predict", prompt=turns).json()["teacher"] == "first"
    assert not endpoint.requests


def test_a_teacher_whose_licence_is_refused_is_not_asked(endpoint):
    app = app_of(endpoint.url, refuse_licences=["Llama3.1"])
    reply = post(app, "/predict", prompt="2 apples").json()
    assert reply == {"coefs": [0.25, 1.5], "teacher": "first"}
    assert chat(app, "2 apples").headers["x-persyn-teacher"] == "first"


def test_a_chat_reaches_the_teacher_as_its_config_says(endpoint):
    reply = chat(app_of(endpoint.url), "2 apples", seed=5)
    assert reply.headers["x-persyn-teacher"] == "second"
    assert reply.json()["choices"][0]["message"]["content"] == "yes"
    (sent,) = endpoint.requests
    assert sent["model"] == "model of second"
    assert [m["content"] for m in sent["messages"]] == ["Be brief.", "q", "a", "2 apples"]
    assert sent["seed"] == 5
    assert endpoint.headers[0]["Authorization"] == "Bearer key"


def test_what_the_request_says_comes_before_the_config(endpoint):
    app = app_of(endpoint.url)
    chat(app, "1")
    chat(app_of(endpoint.url), "1", temperature=0, max_completion_tokens=4)
    first, second = endpoint.requests
    assert (first["temperature"], first["max_tokens"]) == (0.5, 9)
    assert (second["temperature"], second["max_completion_tokens"]) == (0, 4)
    assert "max_tokens" not in second
    assert "stop" not in first


def test_the_teachers_refusal_comes_back_as_it_is(endpoint):
    endpoint.script = lambda body, attempt: (429, scripted_endpoint.error("slow down"))
    reply = chat(app_of(endpoint.url), "1")
    assert (reply.status_code, reply.json()["error"]["message"]) == (429, "slow down")


def test_a_teacher_that_is_down_is_named():
    reply = chat(app_of("http://127.0.0.1:9/v1"), "1")
    assert reply.status_code == 502
    assert "teacher 'first' does not answer" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/predict", {}, 400),
        ("/predict", {"prompt": []}, 400),
        (
            "/v1/chat/completions",
            {"model": "gpt", "messages": [{"role": "user", "content": "x"}]},
            404,
        ),
        ("/v1/chat/completions", {"model": "router-mine", "messages": []}, 400),
    ],
)
def test_a_bad_request_is_one_line(endpoint, path, body, status):
    reply = post(app_of(endpoint.url), path, **body)
    assert reply.status_code == status
    assert "\n" not in reply.json()["error"]["message"]


def test_a_full_router_says_so(endpoint):
    room = Room(1)
    with room.take(1):
        assert chat(app_of(endpoint.url, room), "1").status_code == 429


def test_room_is_held_until_the_last_byte(endpoint):
    """So that a service that is told to end waits for answers that are still on their way."""
    room = Room(8)
    app, taken = app_of(endpoint.url, room), []
    body = {"model": "router-mine", "messages": [{"role": "user", "content": "1"}]}

    async def ask():
        asked = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive():
            return asked.pop() if asked else await asyncio.Event().wait()

        async def send(message):
            taken.append((message.get("more_body"), room.requests))

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions"}
        scope |= {"query_string": b"", "headers": headers, "root_path": "", "scheme": "http"}
        await app(scope, receive, send)

    asyncio.run(ask())
    assert taken == [(None, 1), (True, 1), (None, 1)]
    assert room.requests == 0


def test_it_chooses_as_the_run_did(finished_run, monkeypatch):
    """Against routes.parquet, which the stage wrote; alone instead of in a batch: to rounding."""
    place = finished_run.place
    monkeypatch.chdir(place.folder)
    loaded = small_config()
    choose, names = router_service.load_router_of(Run(loaded))
    assert names == [t.name for t in loaded.teachers]
    prompts = {p.id: p for p in store.read_records(place.run / "prompts.parquet", Prompt)}
    routes = store.read_records(place.run / "routes.parquet", Route)
    for route in routes[:5]:
        found = choose(prompts[route.prompt_id].messages)
        assert found == pytest.approx(route.coefficients, abs=1e-4)


def test_a_run_without_a_router_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = small_config()
    with pytest.raises(config.ConfigError, match="has no router; run the stages"):
        router_service.load_router_of(Run(loaded))


def test_a_teacher_that_left_the_config_is_named():
    loaded = small_config()
    with pytest.raises(config.ConfigError, match="knows a teacher 'gone'"):
        router_service.find_teachers(loaded, ["gone"], lambda: ("u", "m"))
