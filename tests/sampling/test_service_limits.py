"""Overload, deadlines, clients that leave, keys and signals, over real HTTP."""

import concurrent.futures
import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator

import pytest
from service_cases import (
    QUESTION,
    ask,
    chat,
    complete,
    refused,
    service_config,
    serving,
)

from persyn_jax.sampling.process import read_counters

CONTEXT = 2048
LONG = {"messages": QUESTION, "temperature": 0, "max_tokens": None}  # fills the context
# A round trip to the host for each token: slow enough to be left, and overtaken.
CONFIG = service_config(
    slots=2,
    cache_length=CONTEXT,
    decode_steps=1,
    max_waiting=2,
    max_body_bytes=100_000,
    max_header_bytes=4096,
)


@pytest.fixture(scope="module")
def service():
    with serving(CONFIG) as http:
        yield http


def counters(service) -> dict[str, float]:
    return read_counters(str(service.base_url).rstrip("/") + "/v1")


def head(length: int, path: str = "/v1/chat/completions") -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json")
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


@contextlib.contextmanager
def left_alone(service, **body) -> Iterator[socket.socket]:
    """A connection whose request is under way and whose answer nobody reads."""
    data = json.dumps({"model": "tiny"} | LONG | body).encode()
    address = service.base_url.host, service.base_url.port
    with socket.create_connection(address) as connection:
        connection.sendall(head(len(data)) + data)
        yield connection


def wait_until_idle(service) -> None:
    deadline = time.monotonic() + 60
    while True:
        metrics = service.get("/metrics").text.splitlines()
        values = [
            float(line.split()[-1]) for line in metrics if line.startswith("persyn_num_requests")
        ]
        if values == [0, 0]:
            return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_does_not_fit_is_refused_at_once_and_the_rest_is_answered(service):
    """2 slots and 2 that wait; the 60 that come on top do not wait for the engine."""
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        running = [pool.submit(chat, service, **LONG) for _ in range(4)]
        time.sleep(0.3)
        began = time.monotonic()
        body = {"model": "tiny", "messages": QUESTION}
        over = list(pool.map(lambda _: service.post("/v1/chat/completions", json=body), range(60)))
        seconds = time.monotonic() - began
        first_ended = any(future.done() for future in running)
        texts = {future.result()["choices"][0]["message"]["content"] for future in running}
    assert not first_ended, "too fast for this test: nobody waited"
    assert seconds < 5
    for response in over:
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        refused(response.json(), "rate_limit_error")
    assert len(texts) == 1
    assert texts == {chat(service, **LONG)["choices"][0]["message"]["content"]}


def test_all_choices_of_a_request_count(service):
    assert len(complete(service, ["a", "b"], n=2)["choices"]) == 4
    assert "5 answers" in refused(complete(service, list("abcde"), 400))["message"]
    assert "6 answers" in refused(complete(service, list("abc"), 400, n=2))["message"]


@pytest.mark.parametrize("body", [{}, {"stream": True}, {"n": 4}, {"stream": True, "n": 3}])
def test_a_client_that_leaves_frees_its_slots(service, body):
    expected = chat(service, seed=9)["choices"]
    steps = []
    while min(steps, default=CONTEXT) > CONTEXT / 2:  # a busy machine may notice late, not ever so
        assert len(steps) < 5, f"each answer ran on: {steps} decode steps"
        wait_until_idle(service)
        before = counters(service)["decode_steps"]
        with left_alone(service, **body):
            while counters(service)["decode_steps"] < before + 8:
                time.sleep(0.001)
        wait_until_idle(service)
        steps.append(counters(service)["decode_steps"] - before)
    assert chat(service, seed=9)["choices"] == expected


def test_a_reset_connection_and_a_half_sent_body_leave_nothing_behind(service):
    with left_alone(service, stream=True) as connection:
        time.sleep(0.05)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    address = service.base_url.host, service.base_url.port
    for sent in (b"", head(100), head(100) + b'{"model": "tiny", ', b"\0\xff" * 50):
        with socket.create_connection(address) as connection:
            connection.sendall(sent)
    wait_until_idle(service)
    assert len(complete(service, list("abcd"))["choices"]) == 4  # all room is free


def test_a_reader_that_stops_reading_holds_up_nobody(service):
    with left_alone(service, stream=True, n=2, logprobs=True, top_logprobs=20):
        time.sleep(0.3)
        assert chat(service, seed=1)["choices"]
    wait_until_idle(service)


def test_long_bodies_and_headers_are_refused_unread(service):
    for content in (b"x" * 100_001, (b"x" * 1000 for _ in range(101))):
        response = service.post("/v1/chat/completions", content=content)
        assert response.status_code == 413
        assert refused(response.json())["message"] == "the body exceeds the 100000 bytes allowed"
    assert service.get("/health", headers={"x-long": "x" * 5000}).status_code == 431
    for size in (10_000, 1_000_000):  # more than the parser itself takes
        address = service.base_url.host, service.base_url.port
        with socket.create_connection(address) as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * size)
            with contextlib.suppress(ConnectionResetError):
                assert b" 431 " in connection.recv(100).split(b"\r\n")[0] + b" "
    assert service.get("/health").status_code == 200


def test_a_chunked_body_is_taken(service):
    data = json.dumps({"model": "tiny", "messages": QUESTION, "max_tokens": 2}).encode()
    parts = (data[place : place + 7] for place in range(0, len(data), 7))
    headers = {"Content-Type": "application/json"}
    response = service.post("/v1/chat/completions", content=parts, headers=headers)
    assert response.status_code == 200


def test_an_empty_bearer_is_no_obstacle_without_a_key(service):
    """lm-eval sends one."""
    connection = http.client.HTTPConnection(service.base_url.host, service.base_url.port)
    connection.request("GET", "/v1/models", headers={"Authorization": "Bearer "})
    assert connection.getresponse().status == 200
    connection.close()


def test_request_ids(service):
    given = service.get("/health", headers={"X-Request-Id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = {service.get(path).headers["x-request-id"] for path in ("/health", "/nowhere")}
    assert len(made) == 2


def test_deadlines():
    seconds = 0.4
    short = service_config(slots=1, cache_length=CONTEXT, request_seconds=seconds)
    with serving(short) as service:
        body = LONG | {"n": 8}
        began = time.monotonic()
        error = refused(chat(service, 504, **body), "server_error")
        assert error["message"] == f"no answer within {seconds:g} s"
        assert seconds <= time.monotonic() - began < seconds + 5
        with service.stream(
            "POST", "/v1/chat/completions", json={"model": "tiny", "stream": True} | body
        ) as response:
            lines = [line for line in response.iter_lines() if line]
        assert response.status_code == 200
        last = json.loads(lines[-1].removeprefix("data: "))
        assert refused(last, "server_error")["message"] == f"no answer within {seconds:g} s"
        assert len(lines) > 8
        assert ask(service, "/v1/score_tokens", token_ids=[5, 6])
        assert chat(service, max_tokens=2)
