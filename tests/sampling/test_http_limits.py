"""What stands before the routes, around an application that only repeats the body."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from service_cases import service_config

from persyn_jax.config import ConfigError
from persyn_jax.sampling import http_limits
from persyn_jax.sampling.http_limits import HttpLimits, Room, read_api_key
from persyn_jax.sampling.protocol import RequestError

KEY = b"the-right-key"
PATHS = ["/v1/chat/completions", "/metrics", "/openapi.json", "/nowhere", "/health/", "//health"]


async def repeat(scope, receive, send):
    body = (await receive())["body"]
    if body == b"break":
        raise ZeroDivisionError("secret detail")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def request(
    parts=(b"",), path="/v1/x", method="POST", room=None, key=None, headers=(), **config
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of a request whose body comes in parts."""
    limits = HttpLimits(repeat, service_config(**config), room or Room(1), key)
    scope = {
        "type": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "method": method,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
    }
    waiting = [
        {"type": "http.request", "body": part, "more_body": place < len(parts) - 1}
        for place, part in enumerate(parts)
    ]
    sent: list[dict] = []

    async def receive():
        return waiting.pop(0) if waiting else await asyncio.Future()

    async def send(message):
        sent.append(message)

    asyncio.run(limits(scope, receive, send))
    start, *rest = sent
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], found, b"".join(part["body"] for part in rest)


def error(reply) -> tuple[int, str]:
    return reply[0], json.loads(reply[2])["error"]["message"]


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=8), st.integers(1, 200))
def test_a_body_passes_unchanged_or_is_too_long(parts, limit):
    status, _, body = request(parts, max_body_bytes=limit)
    whole = b"".join(parts)
    if len(whole) <= limit and whole != b"break":
        assert (status, body) == (200, whole)
    else:
        assert status == (413 if len(whole) > limit else 500)


@pytest.mark.parametrize("declared", ["101", "9" * 30])
def test_a_declared_length_is_believed(declared):
    headers = [("content-length", declared), ("expect", "100-continue")]
    reply = request([b""] * 3, headers=headers, max_body_bytes=100)
    assert error(reply) == (413, "the body exceeds the 100 bytes allowed")
    assert reply[1]["connection"] == "close"


def test_a_body_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr(http_limits, "_BODY_SECONDS", 0.05)

    async def silent():
        return await asyncio.Future()

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/", "query_string": b"", "method": "POST", "headers": []}
    asyncio.run(HttpLimits(repeat, service_config(), Room(1), None)(scope, silent, send))
    assert sent[0]["status"] == 408


def test_headers_and_path_count_together():
    assert request(headers=[("a", "x" * 1000)], max_header_bytes=1024)[0] == 200
    for many in ([("a", "x" * 1024)], [("a", "x")] * 205):
        status, message = error(request(headers=many, max_header_bytes=1024))
        assert (status, message.endswith("1024 are allowed")) == (431, True)
    assert request(path="/" + "x" * 1100, max_header_bytes=1024)[0] == 431


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
@pytest.mark.parametrize(
    "header",
    ["", "the-right-key", "Bearer ", "Bearer the-right-ke", "Bearer the-right-key2", "Basic é"],
)
def test_every_path_but_health_needs_the_key(path, method, header):
    reply = request(path=path, method=method, key=KEY, headers=[("authorization", header)])
    assert reply[0] == 401
    assert reply[1]["www-authenticate"] == "Bearer"
    assert KEY.decode() not in str(reply)


def test_the_key_opens_and_health_needs_none():
    for header in ("Bearer the-right-key", "bearer the-right-key "):
        assert request(key=KEY, headers=[("authorization", header)])[0] == 200
    assert request(path="/health", key=KEY)[0] == 200
    assert request(headers=[("authorization", "Bearer ")])[0] == 200


def test_a_key_that_is_not_there_is_bad_input(monkeypatch):
    config = service_config(api_key_env="PERSYN_TEST_KEY", host="0.0.0.0")
    for value in ("", "  "):
        monkeypatch.setenv("PERSYN_TEST_KEY", value)
        with pytest.raises(ConfigError, match="variable PERSYN_TEST_KEY is not set"):
            read_api_key(config)
    monkeypatch.setenv("PERSYN_TEST_KEY", "sécret")  # which no client could send, ours included
    with pytest.raises(ConfigError, match="holds characters that no API key has") as caught:
        read_api_key(config)
    assert "cret" not in str(caught.value)
    monkeypatch.setenv("PERSYN_TEST_KEY", " secret\n")
    assert read_api_key(config) == b"secret"
    assert read_api_key(service_config()) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "example.org"])
def test_other_hosts_need_a_key(host):
    with pytest.raises(ValueError, match="set api_key_env"):
        service_config(host=host)
    assert service_config(host=host, api_key_env="KEY").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_none(host):
    assert service_config(host=host).api_key_env is None


@pytest.mark.parametrize(
    ("given", "echoed"),
    [("abc-1.2:3_X", True), ("x" * 128, True), ("", False), ("x" * 129, False), ("a b", False)],
)
def test_a_sane_request_id_comes_back(given, echoed):
    found = [request(headers=[("x-request-id", given)])[1]["x-request-id"] for _ in range(2)]
    assert (found == [given] * 2) is echoed
    assert all(found)
    assert echoed or found[0] != found[1]


def test_a_failure_says_nothing_of_itself(caplog):
    reply = request([b"break"])
    assert error(reply) == (500, "internal error")
    assert b"secret" not in reply[2]
    assert "x-request-id" in reply[1]
    assert "secret detail" in caplog.text


def test_a_service_that_drains_takes_no_new_work():
    room = Room(1, drains=True)
    reply = request(room=room)
    assert (reply[0], reply[1]["retry-after"]) == (503, "1")
    assert request(room=room, method="GET", path="/metrics")[0] == 200


@given(st.lists(st.integers(1, 6), max_size=20), st.integers(1, 8))
def test_room_is_never_overdrawn_and_always_given_back(wanted, limit):
    room, held = Room(limit), []
    for answers in wanted:
        taking = room.take(answers)
        if room.taken + answers > limit:
            with pytest.raises(RequestError) as refusal:
                taking.__enter__()
            assert refusal.value.status == (400 if answers > limit else 429)
        else:
            taking.__enter__()
            held.append((answers, taking))
        assert room.taken == sum(n for n, _ in held) <= limit
        assert room.requests == len(held)
        if len(held) > 2:
            held.pop(0)[1].__exit__(None, None, None)
    for _, taking in held:
        taking.__exit__(None, None, None)
    assert (room.taken, room.requests) == (0, 0)
