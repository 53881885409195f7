"""The client with several endpoints, busy ones, silent ones, and a budget."""

import contextlib
import datetime
import email.utils
import itertools
import socket
import threading
import time

import pytest
import scripted_endpoint
from scripted_endpoint import completion, error

from persyn_jax import config
from persyn_jax.config import ConfigError
from persyn_jax.sampling import client, limiter
from persyn_jax.sampling.client import BudgetError, EndpointError, ask_all
from persyn_jax.sampling.config import ClientConfig, TeacherConfig
from persyn_jax.sampling.question import Question
from persyn_jax.sampling.replies import Reply
from persyn_jax.sampling.spending import NOTHING, Cost, Tally

PRICES = {"usd_per_million_prompt_tokens": 1000.0, "usd_per_million_completion_tokens": 1000.0}
ANSWER_TOKENS = 10  # of the scripted endpoint's completion


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(limiter, "FIRST_REST_SECONDS", 0.01)


@pytest.fixture
def endpoint():
    with scripted_endpoint.serving() as endpoint:
        yield endpoint


@pytest.fixture
def other():
    with scripted_endpoint.serving() as endpoint:
        yield endpoint


@pytest.fixture
def nowhere():
    """A URL that refuses every connection."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"


def teacher(*urls: str, **changed) -> TeacherConfig:
    values = {"name": "wise", "base_url": list(urls), "model": "m", "licence": "MIT", **changed}
    return config.validate(TeacherConfig, values, where="test")


def question(teacher: TeacherConfig, number: int) -> Question:
    messages = [{"role": "user", "content": f"{number}"}]
    return Question(f"key {number}", f"id-{number}", teacher, messages, seed=5)


def ask(teacher: TeacherConfig, count: int, replies=None, spent=NOTHING, **settings):
    """(replies by prompt id, tally) of `count` questions."""
    replies: dict[str, Reply] = {} if replies is None else replies
    questions = [(teacher, (question(teacher, number) for number in range(count)))]
    tallies = ask_all(
        questions,
        ClientConfig(**settings),
        None,
        lambda rows: replies.update({asked.prompt_id: reply for asked, reply in rows}),
        spent,
    )
    return replies, tallies[teacher.name]


def test_questions_are_spread_over_all_endpoints_of_a_teacher(endpoint, other):
    for one in (endpoint, other):
        one.script = lambda *_: time.sleep(0.005) or (200, completion())
    replies, tally = ask(teacher(endpoint.url, other.url), 60, concurrency=3)
    assert len(replies) == len(endpoint.requests) + len(other.requests) == 60
    assert min(len(endpoint.requests), len(other.requests)) > 15
    assert {reply.server for reply in replies.values()} == {endpoint.url, other.url}
    assert tally == Tally(
        answers=60, requests=60, prompt_tokens=420, completion_tokens=180, usd=None
    )


def test_few_questions_are_spread_too(endpoint, other):
    ask(teacher(endpoint.url, other.url), 4, concurrency=1)
    assert (len(endpoint.requests), len(other.requests)) == (2, 2)


def test_an_endpoint_that_is_not_there_is_left_out(endpoint, nowhere):
    replies, tally = ask(teacher(nowhere, endpoint.url), 200)
    assert {reply.server for reply in replies.values()} == {endpoint.url}
    assert len(endpoint.requests) == tally.answers == 200
    assert tally.failed == 0
    assert tally.retries < 30, "it was asked again and again"


def test_an_endpoint_that_keeps_failing_is_left_out_and_taken_back(endpoint, other):
    broken = threading.Event()
    broken.set()

    def script(body, attempt):
        return (500, error("broken")) if broken.is_set() else (200, completion())

    def healing(body, attempt):
        if len(endpoint.requests) == 100:
            broken.clear()
        time.sleep(0.002)
        return 200, completion()

    endpoint.script, other.script = healing, script
    replies, tally = ask(teacher(endpoint.url, other.url), 300, concurrency=4)
    assert tally.answers == 300
    assert tally.retries < 40
    assert sum(reply.server == other.url for reply in replies.values()) > 20


def test_an_endpoint_that_takes_few_at_once_gets_few_and_no_answer_fails(endpoint):
    """It answers 429 to every request beyond 3 at once."""
    lock, under_way, most_late = threading.Lock(), 0, 0

    def script(body, attempt):
        nonlocal under_way, most_late
        with lock:
            under_way += 1
            too_many = under_way > 3
            if len(endpoint.requests) > 100:
                most_late = max(most_late, under_way)
        time.sleep(0 if too_many else 0.005)
        with lock:
            under_way -= 1
        return (429, error("slow down")) if too_many else (200, completion())

    endpoint.script = script
    _, tally = ask(teacher(endpoint.url), 300, concurrency=32, attempts=10)
    assert (tally.answers, tally.failed) == (300, 0)
    assert tally.requests == 300 + tally.retries
    assert tally.retries < 150
    assert most_late <= 8


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for_by_all_requests(endpoint, form):
    times = []

    def script(body, attempt):
        times.append(time.time())
        if len(times) > 1:
            return 200, completion()
        until = datetime.datetime.fromtimestamp(int(times[0]) + 2, datetime.UTC)
        value = "1" if form == "seconds" else email.utils.format_datetime(until, usegmt=True)
        return 429, error("later"), {"Retry-After": value}

    endpoint.script = script
    _, tally = ask(teacher(endpoint.url), 3, concurrency=1)
    assert (tally.answers, tally.retries) == (3, 1)
    assert times[1] >= times[0] + 1 if form == "seconds" else times[1] >= int(times[0]) + 2
    assert times[1] < times[0] + 4


@pytest.mark.parametrize(
    "value", ["", "soon", "-5", "1.5", "\xb2", "Mon, 99 Foo 2026 00:00:00 GMT"]
)
def test_a_retry_after_that_says_nothing_is_ignored(endpoint, value):
    endpoint.script = lambda _, attempt: (
        (200, completion()) if attempt > 1 else (503, error("busy"), {"Retry-After": value})
    )
    assert ask(teacher(endpoint.url), 1)[1].answers == 1


def test_a_silent_endpoint_is_left_before_the_whole_time_is_over():
    with socket.create_server(("127.0.0.1", 0)) as silent, contextlib.ExitStack() as connections:

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    connections.enter_context(silent.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        started = time.monotonic()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match=r"failed 2 times, last: no byte for 0\.1 s"):
            ask(teacher(url), 1, idle_seconds=0.1, timeout_seconds=60, attempts=2)
        assert time.monotonic() - started < 5
        silent.shutdown(socket.SHUT_RDWR)


def test_no_question_is_forgotten_while_the_only_endpoint_rests(endpoint):
    """The second fails for good just when the endpoint wants no request for a second."""
    endpoint.script = lambda body, _: (
        (503, error("busy"), {"Retry-After": "1"})
        if body["messages"][-1]["content"] == "1"
        else (200, completion())
    )
    one = teacher(endpoint.url)
    with pytest.raises(EndpointError):  # nothing was answered meanwhile
        ask(one, 6, concurrency=1, attempts=1)
    endpoint.script = lambda body, _: (
        (500, error("no"), {"Retry-After": "1"})
        if body["messages"][-1]["content"] == "1"
        else (200, completion())
    )
    replies, tally = ask(one, 6, concurrency=1, attempts=1, max_failed_share=1.0)
    assert (len(replies), tally.answers, tally.failed) == (6, 5, 1)


def test_teachers_do_not_wait_for_each_other(endpoint, nowhere):
    """One whose endpoint is down ends the run, and the other's answers were not held up by it."""
    down, up = teacher(nowhere, name="down"), teacher(endpoint.url, name="up")
    replies = []
    with pytest.raises(EndpointError, match=f"teacher 'down' at {nowhere}: failed 8 times"):
        ask_all(
            [(t, [question(t, number) for number in range(50)]) for t in (down, up)],
            ClientConfig(attempts=8),
            None,
            replies.extend,
        )
    assert len(replies) == 50


def test_questions_are_read_as_they_are_asked_and_memory_stays_bounded(endpoint):
    """An endless supply, ended by a refusal; no more is read than can be under way."""
    read = 0

    def endless(teacher):
        nonlocal read
        for read in itertools.count(1):
            yield question(teacher, read)

    endpoint.script = lambda *_: (
        (401, error("enough")) if len(endpoint.requests) > 100 else (200, completion())
    )
    one = teacher(endpoint.url)
    with pytest.raises(ConfigError, match="enough"):
        ask_all([(one, endless(one))], ClientConfig(concurrency=8), None, lambda rows: None)
    assert read <= 101 + 8


@pytest.mark.parametrize("budget", ["budget_tokens", "budget_usd"])
def test_the_budget_is_never_exceeded_and_nearly_used(endpoint, budget):
    one = teacher(endpoint.url, sampling={"max_tokens": 20}, **PRICES)
    replies: dict[str, Reply] = {}
    value = {"budget_tokens": 1000, "budget_usd": 1.0}[budget]  # 1000 USD a million: 1 USD
    with pytest.raises(BudgetError) as caught:
        ask(one, 500, replies, concurrency=16, **{budget: value})
    spent = ANSWER_TOKENS * len(replies)
    most_of_one = 1 + 64 + 16 + 20  # bytes of the prompt, template, answer
    assert 1000 - most_of_one - ANSWER_TOKENS < spent <= 1000
    assert len(endpoint.requests) == len(replies)
    line = str(caught.value)
    assert line.startswith(f"client.{budget} {value:g}: the next answer could exceed it; ")
    assert f"spent {spent} tokens and $ {spent / 1000:.4f}; " in line
    assert f"{500 - len(replies)} answers are missing" in line
    assert "larger budget" in line


def test_what_was_spent_before_counts_towards_the_budget(endpoint):
    one = teacher(endpoint.url, sampling={"max_tokens": 20})
    with pytest.raises(BudgetError, match=r"3 answers are missing"):
        ask(one, 3, spent=Cost(950, None), budget_tokens=1000)
    assert not endpoint.requests
    ask(one, 3, spent=Cost(950, None), budget_tokens=1000 + 200)
    assert len(endpoint.requests) == 3


def test_a_budget_in_dollars_needs_the_prices(endpoint):
    with pytest.raises(ConfigError, match=r"budget_usd 5: the price of teacher 'wise' is unknown"):
        ask(teacher(endpoint.url), 1, budget_usd=5.0)
    assert not endpoint.requests
    free = teacher(endpoint.url, **dict.fromkeys(PRICES, 0.0))
    assert ask(free, 3, budget_usd=0.0)[1].usd == 0.0


def test_failed_rows_cost_nothing_and_give_their_part_of_the_budget_back(endpoint):
    endpoint.script = lambda body, _: (400, error("no"))
    one = teacher(endpoint.url, sampling={"max_tokens": 20}, **PRICES)
    _, tally = ask(one, 100, budget_tokens=150, max_failed_share=1.0)
    assert tally == Tally(failed=100, requests=100, usd=0.0)


def test_dollars_are_of_the_tokens_that_the_endpoint_counted(endpoint):
    _, tally = ask(teacher(endpoint.url, **PRICES), 8)
    assert tally.usd == pytest.approx(8 * ANSWER_TOKENS / 1000)
    assert ask(teacher(endpoint.url), 8)[1].usd is None
