"""The client against an endpoint that fails in every way an endpoint may."""

import json
import socket
import threading
import time

import pytest
import scripted_endpoint
from scripted_endpoint import completion, error

from persyn_jax import config
from persyn_jax.config import ConfigError
from persyn_jax.sampling import client, limiter
from persyn_jax.sampling.client import EndpointError, ask_all
from persyn_jax.sampling.config import (
    ClientConfig,
    SamplingConfig,
    TeacherConfig,
    WorkedExample,
    teacher_messages,
)
from persyn_jax.sampling.question import Question
from persyn_jax.sampling.replies import Reply
from persyn_jax.sampling.spending import price

KEY = "sk-secret-123"


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(limiter, "FIRST_REST_SECONDS", 0.0)


@pytest.fixture
def endpoint():
    with scripted_endpoint.serving() as endpoint:
        yield endpoint


def teacher(endpoint, **changed) -> TeacherConfig:
    values = {"name": "wise", "base_url": endpoint.url, "model": "m", "licence": "MIT", **changed}
    return config.validate(TeacherConfig, values, where="test")


def questions(teacher: TeacherConfig, *prompts: str) -> list[Question]:
    return [
        Question(f"key {p}", f"id-{p}", teacher, [{"role": "user", "content": p}], seed=5)
        for p in prompts
    ]


def by_teacher(asked: list[Question]) -> list[tuple[TeacherConfig, list[Question]]]:
    teachers = {question.teacher.name: question.teacher for question in asked}
    return [(t, [q for q in asked if q.teacher.name == name]) for name, t in teachers.items()]


def ask(asked, own_service=None, replies=None, **settings) -> dict[str, Reply]:
    """Replies by prompt id, all of which may be failures unless the settings say otherwise.

    replies: a dict to put them in, for when this raises.
    """
    replies = {} if replies is None else replies
    ask_all(
        by_teacher(asked),
        ClientConfig(**({"attempts": 3, "max_failed_share": 1.0} | settings)),
        own_service,
        lambda rows: replies.update({question.prompt_id: reply for question, reply in rows}),
    )
    return replies


def ask_one(endpoint, **settings) -> Reply:
    return ask(questions(teacher(endpoint), "q"), **settings)["id-q"]


def test_sends_what_the_teacher_says(endpoint):
    sampling = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 11, "stop": ["\n"]}
    ask(questions(teacher(endpoint, sampling=sampling, base_url=endpoint.url + "/"), "q\0é"))
    assert endpoint.requests == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "q\0é"}],
            "temperature": 0.5,
            "top_p": 0.9,
            "max_tokens": 11,
            "stop": ["\n"],
            "seed": 5,
        }
    ]
    assert endpoint.paths == ["/v1/chat/completions"]
    assert "Authorization" not in endpoint.headers[0]


def test_the_runs_own_service_is_asked_for_token_ids(endpoint):
    own = teacher(endpoint, base_url=None, model=None)
    endpoint.script = lambda body, _: (200, completion("hi", token_ids=[4, 5]))
    replies = ask(questions(own, "q"), own_service=(endpoint.url, "served"))
    assert replies["id-q"].token_ids == [4, 5]
    assert endpoint.requests[0]["model"] == "served"
    assert endpoint.requests[0]["return_token_ids"] is True
    with pytest.raises(ConfigError, match="teacher 'wise': no base_url"):
        ask(questions(own, "q"), own_service=None)


def test_reads_the_reply(endpoint):
    reply = ask_one(endpoint)
    assert (reply.text, reply.finish_reason, reply.token_ids) == ("yes", "stop", None)
    assert (reply.prompt_tokens, reply.completion_tokens) == (7, 3)
    assert reply.server == endpoint.url
    assert 0 < reply.latency_seconds < 60


def test_every_question_gets_its_own_reply(endpoint):
    endpoint.script = lambda body, _: (200, completion(body["messages"][-1]["content"] * 2))
    prompts = [str(i) for i in range(200)]
    replies = ask(questions(teacher(endpoint), *prompts), concurrency=16)
    assert {key: reply.text for key, reply in replies.items()} == {
        f"id-{prompt}": prompt * 2 for prompt in prompts
    }


def test_no_more_are_under_way_than_the_config_says(endpoint):
    under_way, most, lock = 0, 0, threading.Lock()

    def script(body, attempt):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        with lock:
            under_way -= 1
        return 200, completion()

    endpoint.script = script
    ask(questions(teacher(endpoint), *map(str, range(40))), concurrency=5)
    assert most == 5


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(endpoint, status):
    endpoint.script = lambda _, attempt: (200, completion()) if attempt == 3 else (status, b"busy")
    assert ask_one(endpoint).text == "yes"
    assert endpoint.asked("q") == 3


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_an_answer_that_the_endpoint_calls_failed_is_tried_again(endpoint, reason):
    endpoint.script = lambda _, attempt: (
        200,
        completion("half", reason) if attempt == 1 else completion(),
    )
    assert ask_one(endpoint).text == "yes"


def test_gives_up_naming_teacher_url_and_reason(endpoint):
    endpoint.script = lambda body, _: (503, error("over\nloaded"))
    with pytest.raises(EndpointError) as caught:
        ask_all(
            by_teacher(questions(teacher(endpoint), "q", "r")),
            ClientConfig(attempts=3),
            None,
            lambda rows: pytest.fail("there is nothing to commit"),
        )
    expected = f"teacher 'wise' at {endpoint.url}: failed 3 times, last: status 503: over loaded"
    assert str(caught.value) == expected
    assert max(endpoint.asked("q"), endpoint.asked("r")) == 3


@pytest.mark.parametrize("status", [302, 401, 403, 404])
def test_what_refuses_every_prompt_is_bad_input_and_not_tried_again(endpoint, status):
    endpoint.script = lambda body, _: (status, error("no such thing"))
    with pytest.raises(ConfigError) as caught:
        ask_one(endpoint)
    refused = f"refused prompt 'id-q' with status {status}: no such thing"
    assert str(caught.value) == f"teacher 'wise' at {endpoint.url}: {refused}"
    assert endpoint.asked("q") == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_is_refused_is_a_failed_row_and_not_tried_again(endpoint, status):
    endpoint.script = lambda body, _: (
        (status, error("too\nlong"))
        if body["messages"][-1]["content"] == "b"
        else (200, completion())
    )
    replies = ask(questions(teacher(endpoint), *"abc"))
    assert [replies[f"id-{name}"].text for name in "abc"] == ["yes", "", "yes"]
    refused = replies["id-b"]
    assert refused.error == f"refused with status {status}: too long"
    assert (refused.finish_reason, refused.server) == ("error", endpoint.url)
    assert (refused.prompt_tokens, refused.completion_tokens) == (0, 0)
    assert endpoint.asked("b") == 1


def test_a_row_that_fails_at_its_last_try_leaves_the_others_alone(endpoint):
    endpoint.script = lambda body, _: (
        (500, error("no")) if body["messages"][-1]["content"] == "b" else (200, completion())
    )
    replies = ask(questions(teacher(endpoint), *"abc"))
    assert replies["id-b"].error == "failed 3 times, last: status 500: no"
    assert endpoint.asked("b") == 3
    assert [replies[f"id-{name}"].error for name in "ac"] == [None, None]


@pytest.mark.parametrize(("share", "ends"), [(0.2, False), (0.19, True)])
def test_too_large_a_share_of_failed_rows_ends_it_when_all_are_done(endpoint, share, ends):
    endpoint.script = lambda body, _: (
        (400, error("no")) if body["messages"][-1]["content"] == "3" else (200, completion())
    )
    replies: dict[str, Reply] = {}
    asked = questions(teacher(endpoint), *map(str, range(5)))
    if ends:
        reason = r"'wise' at http.*: refused with status 400: no \(1 of 5 answers failed"
        with pytest.raises(EndpointError, match=reason):
            ask(asked, replies=replies, max_failed_share=share)
    else:
        ask(asked, replies=replies, max_failed_share=share)
    assert len(replies) == 5, "what was answered is handed over all the same"


def test_too_large_a_share_of_failed_rows_ends_it_early(endpoint):
    endpoint.script = lambda body, _: (400, error("no"))
    replies: dict[str, Reply] = {}
    asked = questions(teacher(endpoint), *map(str, range(500)))
    with pytest.raises(EndpointError, match=r"20 of 20 answers failed"):
        ask(asked, replies=replies, max_failed_share=0.9, concurrency=4)
    assert 20 <= len(replies) < 20 + 4, "those under way may still come in"
    assert len(endpoint.requests) < 40


@pytest.mark.parametrize(
    "body", [b"<html>\nno</html>", b"", b'{"error": "text"}', b"[" * 10**5], ids=len
)
def test_a_refusal_without_a_message_is_one_line_all_the_same(endpoint, body):
    endpoint.script = lambda *_: (404, body)
    with pytest.raises(ConfigError, match="status 404: ") as caught:
        ask_one(endpoint)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not JSON",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b"null",
        b"{}",
        b'{"error": {"message": "in disguise"}}',
        b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}',
        completion(text=["a list"]),
        completion(finish_reason=None),
        completion(finish_reason=""),
        completion(token_ids="abc"),
        completion().replace(b'"usage"', b'"used"'),
        completion().replace(b": 7", b": -7"),
        completion().replace(b": 7", b": NaN"),
        completion()[:-1],
    ],
    ids=lambda body: body[:20],
)
def test_a_garbled_reply_is_tried_again_and_then_named(endpoint, body):
    endpoint.script = lambda _, attempt: (200, completion() if attempt == 2 else body)
    assert ask_one(endpoint).text == "yes"
    endpoint.requests.clear()
    endpoint.script = lambda *_: (200, body)
    failed = ask_one(endpoint)
    assert failed.error.startswith("failed 3 times, last: not a chat completion: ")
    assert "\n" not in failed.error
    assert endpoint.asked("q") == 3


@pytest.mark.parametrize("reason", ["stop", "length", "content_filter", "tool_calls"])
def test_the_finish_reason_is_the_endpoints_word(endpoint, reason):
    endpoint.script = lambda *_: (200, completion("x", reason))
    assert ask_one(endpoint).finish_reason == reason


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (rb'"\ud83d\ude00"', "\N{GRINNING FACE}"),
        (rb'"a\ud83d"', "a\N{REPLACEMENT CHARACTER}"),
        (rb'"\ude00\ud83db"', "\N{REPLACEMENT CHARACTER}" * 2 + "b"),
        (rb'"a\u0000\u2028\u202e"', "a\0\u2028\u202e"),
        (b"null", ""),
        (b'""', ""),
    ],
)
def test_any_text_becomes_valid_unicode(endpoint, sent, read):
    endpoint.script = lambda *_: (200, completion().replace(b'"yes"', sent))
    text = ask_one(endpoint).text
    assert text == read
    text.encode()


def test_a_prompt_that_is_not_valid_unicode_is_named(endpoint):
    with pytest.raises(ConfigError, match=r"prompt 'id-.*' is not valid Unicode"):
        ask(questions(teacher(endpoint), "half \ud83d"))
    assert not endpoint.requests


def test_an_endpoint_that_is_down_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = scripted_endpoint.Endpoint(f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
    with pytest.raises(EndpointError, match=f"'wise' at {nobody.url}: failed 3 times, last: .*"):
        ask_one(nobody)


def test_an_endpoint_that_does_not_answer_in_time_is_named(endpoint):
    endpoint.script = lambda *_: time.sleep(0.5) or (200, completion())
    with pytest.raises(EndpointError, match=r"failed 2 times, last: no answer within 0\.1 s"):
        ask_one(endpoint, timeout_seconds=0.1, attempts=2)


def test_an_answer_that_trickles_in_is_not_waited_for():
    """The limit is for the whole answer: every byte comes in time, their sum does not."""

    def trickle(listener):
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            try:
                while True:
                    connection.sendall(b" ")
                    time.sleep(0.01)
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle, args=(listener,))
        thread.start()
        slow = scripted_endpoint.Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        with pytest.raises(EndpointError, match=r"no answer within 0\.2 s"):
            ask_one(slow, timeout_seconds=0.2, attempts=1)
        thread.join()


@pytest.mark.parametrize(
    "cut", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{", b"what?\r\n"]
)
def test_a_connection_that_breaks_is_tried_again(cut):
    body = completion()
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    def serve(listener):
        for data in (cut, whole):
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        breaking = scripted_endpoint.Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        assert ask_one(breaking).text == "yes"
        thread.join()


def test_replies_before_a_failure_stay_and_the_rest_is_not_asked(endpoint):
    endpoint.script = lambda body, _: (
        (403, error("bad")) if body["messages"][-1]["content"] == "3" else (200, completion())
    )
    replies: dict[str, Reply] = {}
    asked = questions(teacher(endpoint), *map(str, range(30)))
    with pytest.raises(ConfigError, match="'id-3'"):
        ask(asked, replies=replies, concurrency=1)
    assert list(replies) == ["id-0", "id-1", "id-2"]
    assert len(endpoint.requests) == 4


def test_what_commit_raises_comes_through(endpoint):
    def fail(rows):
        raise ConfigError("disk full")

    with pytest.raises(ConfigError, match="disk full"):
        ask_all(by_teacher(questions(teacher(endpoint), "a", "b")), ClientConfig(), None, fail)


def test_the_api_key_comes_from_the_environment(endpoint, monkeypatch):
    monkeypatch.setenv("WISE_KEY", KEY + "\n")
    ask(questions(teacher(endpoint, api_key_env="WISE_KEY"), "q"))
    assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", [None, "", "  \n"])
def test_without_its_api_key_nothing_is_asked(endpoint, monkeypatch, key):
    monkeypatch.delenv("WISE_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("WISE_KEY", key)
    keyless = questions(teacher(endpoint, name="free"), "a")
    with pytest.raises(
        ConfigError, match="teacher 'wise': environment variable WISE_KEY is not set"
    ):
        ask(keyless + questions(teacher(endpoint, api_key_env="WISE_KEY"), "q"))
    assert not endpoint.requests


@pytest.mark.parametrize("status", [401, 500])
def test_the_api_key_is_never_shown(endpoint, monkeypatch, status):
    monkeypatch.setenv("WISE_KEY", KEY)
    endpoint.script = lambda *_: (status, error(f"wrong key {KEY}, go away"))
    with pytest.raises((ConfigError, EndpointError), match=r"wrong key .*go away") as caught:
        ask(questions(teacher(endpoint, api_key_env="WISE_KEY"), "q"), max_failed_share=0)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-\u20ac-secret", "sk-1\nsecret: 2", "sk-\x07secret"])
def test_an_impossible_api_key_is_not_shown_either(endpoint, monkeypatch, key):
    monkeypatch.setenv("WISE_KEY", key)
    with pytest.raises(ConfigError, match="WISE_KEY holds characters") as caught:
        ask(questions(teacher(endpoint, api_key_env="WISE_KEY"), "q"))
    assert "secret" not in str(caught.value)


def test_a_price_is_unknown_unless_both_parts_are_known():
    prices = {"usd_per_million_prompt_tokens": 2.0, "usd_per_million_completion_tokens": 10.0}
    priced = TeacherConfig(name="a", licence="x", **prices)
    assert price(priced, 1000, 200) == pytest.approx(0.004)
    for missing in prices:
        assert (
            price(TeacherConfig(name="a", licence="x", **prices | {missing: None}), 1000, 200)
            is None
        )
    free = TeacherConfig(name="a", licence="x", **dict.fromkeys(prices, 0.0))
    assert price(free, 1000, 200) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_url": "elsewhere:8000/v1"}, "must begin with http"),
        ({"base_url": "ftp://elsewhere/v1"}, "must begin with http"),
        ({"base_url": "http://"}, "must begin with http"),
        ({"base_url": "http://[broken"}, "Invalid IPv6"),
        ({"base_url": "http://elsewhere:99999/v1"}, "[Pp]ort out of range"),
        ({"base_url": "http://elsewhere/v1", "model": None}, "a base_url needs a model"),
        ({"base_url": ["http://elsewhere/v1", "elsewhere"]}, "'elsewhere' must begin with http"),
        ({"base_url": ["http://elsewhere/v1", "http://elsewhere/v1/"]}, "is given twice"),
        ({"base_url": []}, "base_url"),
        ({"sampling": {"temperature": float("nan")}}, "temperature"),
        ({"sampling": {"temperature": float("inf")}}, "temperature"),
        ({"sampling": {"stop": list("abcde")}}, "stop"),
        ({"sampling": {"stop": [""]}}, "stop"),
        ({"name": ""}, "name"),
    ],
)
def test_an_impossible_teacher_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        teacher(scripted_endpoint.Endpoint("http://elsewhere/v1"), **values)


def test_worked_examples_stand_before_the_question():
    shown = TeacherConfig(
        name="shown",
        licence="x",
        system="Be brief.",
        examples=[WorkedExample(question="1+1?", answer="2")],
        sampling=SamplingConfig(),
    )
    messages = [{"role": "user", "content": "2+2?"}]
    assert json.dumps(teacher_messages(shown, messages)) == json.dumps(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "2+2?"},
        ]
    )
    plain = TeacherConfig(name="plain", licence="x")
    assert teacher_messages(plain, messages) == messages
