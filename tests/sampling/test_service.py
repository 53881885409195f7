"""The HTTP service, as a process of its own, spoken to as any client would."""

import concurrent.futures
import json
import socket
import time
from typing import Any

import httpx
import psutil
import pytest

from persyn_jax.models import tokenizer
from persyn_jax.models.spec import ModelConfig
from persyn_jax.sampling.config import EngineConfig, ServiceConfig
from persyn_jax.sampling.process import read_counters, running_service

CONTEXT = 2048
CONFIG = ServiceConfig(
    model=ModelConfig(weights="random:tiny"),
    name="tiny",
    engine=EngineConfig(
        slots=4,
        cache_length=CONTEXT,
        prefill_rows=2,
        prefill_chunk=16,
        decode_steps=4,
        prefix_blocks=16,
    ),
)
QUESTION = [{"role": "user", "content": "Why?"}]
TOK = tokenizer.byte_level()


@pytest.fixture(scope="module")
def service():
    """A client whose paths begin at the service's root. The process is gone at the end."""
    before = set(psutil.Process().children())
    with running_service(CONFIG, "cpu") as url, httpx.Client(trust_env=False, timeout=60) as http:
        assert url.endswith("/v1")
        http.base_url = url.removesuffix("/v1")
        (child,) = set(psutil.Process().children()) - before
        yield http
    assert not child.is_running()


def chat(service, **body: Any) -> dict[str, Any]:
    return post(service, 200, **body)


def post(service, status: int, **body: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 8} | body
    response = service.post("/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    return response.json()


def refused(service, status: int, **body: Any) -> dict[str, Any]:
    found = post(service, status, **body)
    assert found.keys() == {"error"}
    assert found["error"]["type"] == "invalid_request_error"
    assert found["error"]["message"]
    return found["error"]


def test_a_chat_completion(service):
    before = time.time()
    found = chat(service, seed=1, return_token_ids=True)
    choice = found["choices"][0]
    assert found["object"] == "chat.completion"
    assert found["model"] == "tiny"
    assert before - 1 <= found["created"] <= time.time()
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    assert len(choice["token_ids"]) == 8
    text = TOK.decode(choice["token_ids"], skip_special_tokens=True)
    assert choice["message"]["content"] == text
    prompt = len(tokenizer.prompt_ids(TOK, QUESTION))
    assert found["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 8,
        "total_tokens": prompt + 8,
    }
    again = chat(service, seed=1)
    assert "token_ids" not in again["choices"][0]
    assert again["id"] != found["id"]


def test_health_and_models(service):
    assert service.get("/health").json() == {"status": "ok"}
    models = service.get("/v1/models").json()
    assert models["object"] == "list"
    assert [model["id"] for model in models["data"]] == ["tiny"]


def test_metrics_count(service):
    url = f"{service.base_url}/v1".replace("//v1", "/v1")
    before = read_counters(url)
    chat(service, max_tokens=5, temperature=0)
    after = read_counters(url)
    assert after["decoded_tokens"] == before["decoded_tokens"] + 4
    read = sum(after[name] - before[name] for name in ("prompt_tokens", "reused_tokens"))
    assert read == len(tokenizer.prompt_ids(TOK, QUESTION))
    assert 0 < after["mean_slot_occupancy"] <= 4
    assert "# TYPE persyn_decode_steps gauge" in service.get("/metrics").text


def test_a_seed_replays_an_answer(service):
    def text(**sampling):
        return chat(service, max_tokens=20, **sampling)["choices"][0]["message"]["content"]

    assert text(seed=7) == text(seed=7) == text(seed=7 + 2**40)
    assert text(seed=-1) == text(seed=2**32 - 1)
    assert text(seed=7) != text(seed=8)
    assert text() != text()  # no seed: another one each time
    assert text(temperature=0) == text(temperature=0, seed=3)


def test_concurrent_requests_get_what_each_gets_alone(service):
    bodies = [
        {
            "messages": [{"role": "user", "content": "Say " * (i % 7) + str(i)}],
            "seed": i,
            "temperature": i % 3 / 2,
            "max_tokens": 1 + i,
        }
        for i in range(32)
    ]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda body: chat(service, **body), bodies))
    for body, found in zip(bodies, together, strict=True):
        alone = chat(service, **body)
        assert found["choices"] == alone["choices"]
        assert found["usage"] == alone["usage"]


def test_stop_texts(service):
    text = chat(service, seed=3, max_tokens=60)["choices"][0]["message"]["content"]
    letter = next(letter for letter in text[3:] if letter.isascii() and letter.isalnum())
    for stop in (letter, [letter], ["never this", letter]):
        choice = chat(service, seed=3, max_tokens=60, stop=stop)["choices"][0]
        assert choice["message"]["content"] == text.split(letter)[0]
        assert choice["finish_reason"] == "stop"


def test_max_completion_tokens_is_the_newer_name(service):
    assert chat(service, max_completion_tokens=3)["usage"]["completion_tokens"] <= 3


@pytest.mark.parametrize(
    "content", ["", "\0", "<|im_end|>", "\u2028\u202e\N{GRINNING FACE}", "é" * 500]
)
def test_any_valid_text_is_answered(service, content):
    found = chat(service, messages=[{"role": "user", "content": content}])
    read = len(tokenizer.prompt_ids(TOK, [{"role": "user", "content": content}]))
    assert found["usage"]["prompt_tokens"] == read


@pytest.mark.parametrize(
    "field",
    [
        {"n": 2},
        {"stream": True},
        {"logprobs": True},
        {"top_logprobs": 3},
        {"top_k": 5},
        {"min_p": 0.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {"5": 100}},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function"}]},
        {"ignore_eos": True},
        {"chat_template": "{{ 'A' * 10**9 }}"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_field_that_would_change_the_answer_is_named(service, field):
    (name,) = field
    error = refused(service, 400, **field)
    assert error["param"] == name
    assert error["message"].startswith(f"{name}: ")
    assert error["message"].endswith("is not supported")


def test_fields_that_ask_for_nothing_are_let_through(service):
    nothing = {"n": 1, "stream": False, "top_k": -1, "logit_bias": None, "tools": [], "top_p": 1}
    harmless = {"user": "someone", "metadata": {"a": 1}, "unheard_of": True}
    expected = chat(service, seed=1)["choices"]
    assert chat(service, seed=1, **nothing, **harmless)["choices"] == expected


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 101}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"seed": "x"}, "seed"),
        ({"stop": list("abcde")}, "stop"),
        ({"stop": ""}, "stop.0"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": 3}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"model": None}, "model"),
    ],
)
def test_an_impossible_value_is_named(service, field, param):
    error = refused(service, 400, **field)
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "body: Field required"),
        (b"{", "the body is not valid JSON"),
        (b"[]", "body: "),
        (b"[" * 100_000, "body"),
        (
            b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud83d"}]}',
            "not valid Unicode",
        ),
        (b'{"model": "tiny", "messages": [], "temperature": NaN}', "messages"),
        (b"\xff\xfe", "body"),
    ],
)
def test_a_garbled_body_is_a_bad_request(service, data, message):
    headers = {"Content-Type": "application/json"}
    response = service.post("/v1/chat/completions", content=data, headers=headers)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_a_temperature_that_is_no_number_is_refused(service):
    body = {"model": "tiny", "messages": QUESTION, "temperature": float("nan")}
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    response = service.post("/v1/chat/completions", content=data, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "temperature"


def test_another_model_is_not_found(service):
    error = refused(service, 404, model="gpt-4")
    assert error["message"] == "model: 'gpt-4' is not served here; 'tiny' is"


def test_another_path_is_not_found(service):
    for response, status in ((service.get("/v2"), 404), (service.get("/v1/chat/completions"), 405)):
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_context_too_long_is_refused(service):
    long = [{"role": "user", "content": "x" * CONTEXT}]
    for tokens in ({"max_tokens": 1}, {"max_tokens": None}):
        error = refused(service, 400, messages=long, **tokens)
        assert error["message"].startswith("messages: context too long: ")
        assert f"exceed the context length of {CONTEXT}" in error["message"]


def test_without_max_tokens_an_answer_may_fill_the_context(service):
    found = chat(service, max_tokens=None, temperature=0)
    room = CONTEXT - found["usage"]["prompt_tokens"]
    assert found["usage"]["completion_tokens"] == room
    assert found["choices"][0]["finish_reason"] == "length"


def test_a_client_that_leaves_frees_its_slot(service):
    """Each of these answers would take about two thousand tokens."""
    url = str(service.base_url).rstrip("/") + "/v1"
    body = {"model": "tiny", "messages": QUESTION, "temperature": 0}
    data = json.dumps(body).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = head + b"Content-Length: %d\r\n\r\n" % len(data) + data
    clients, before = 8, read_counters(url)["decoded_tokens"]
    for _ in range(clients):
        with socket.create_connection((service.base_url.host, service.base_url.port)) as leaving:
            leaving.sendall(request)
            time.sleep(0.05)
    assert chat(service, max_tokens=2)  # a slot is free
    done, now = before, read_counters(url)["decoded_tokens"]
    while now > done:
        time.sleep(0.3)
        done, now = now, read_counters(url)["decoded_tokens"]
    assert done - before < clients * (CONTEXT - 100) / 2, "it went on for those who had left"
