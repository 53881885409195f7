"""Asking teachers through a real endpoint: what is asked, what is not, and what it costs."""

import dataclasses
import json
import math
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from persyn_jax.config import ConfigError
from persyn_jax.pipeline.answers import Ask, collect_answers, teacher_fingerprint
from persyn_jax.pipeline.calibrate import calibrate
from persyn_jax.pipeline.generate import check_cost, generate, to_examples
from persyn_jax.records import Answer, Prompt, Route
from persyn_jax.sampling.client import BudgetError, EndpointError
from persyn_jax.sampling.config import (
    ClientConfig,
    SamplingConfig,
    TeacherConfig,
    WorkedExample,
)
from persyn_jax.store import AnswerStore, StoredAnswer, answer_key


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible server that answers `<model>: <question>` and remembers its requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict] = []
        self.fails_for: set[str] = set()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def asked(self) -> Counter:
        """How often each (model, question) was asked."""
        return Counter((r["model"], r["messages"][-1]["content"]) for r in self.requests)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        question = body["messages"][-1]["content"]
        if question in self.server.fails_for:
            self.send_error(500)
            return
        reply = json.dumps(
            {
                "choices": [
                    {
                        "message": {"content": f"{body['model']}: {question}"},
                        "finish_reason": "stop",
                    }
                ],
                "usage": {"prompt_tokens": 1000, "completion_tokens": 500},
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def store(tmp_path):
    with AnswerStore(tmp_path / "answers.sqlite") as opened:
        yield opened


def make_prompt(name: str, split: str = "calibration", question: str | None = None) -> Prompt:
    return Prompt(
        id=name,
        messages=[{"role": "user", "content": question or f"question {name}"}],
        source="mine",
        split=split,
        answer=None,
        verifier="exact_match",
        source_licence="CC0-1.0",
    )


def make_teacher(name: str, base_url: str | None, **changes) -> TeacherConfig:
    model = None if base_url is None else f"model-{name}"
    return TeacherConfig(name=name, model=model, base_url=base_url, licence="MIT", **changes)


def no_service() -> tuple[str, str]:
    raise AssertionError("the own service was started though nobody needs it")


def collect(asks, store, attempts: int = 1, own_service=no_service, own_weights=None):
    client = ClientConfig(attempts=attempts, max_failed_share=1.0)
    return collect_answers(asks, own_weights, store, client, own_service, "ask").answers


def test_answers_come_in_the_order_of_the_asks_and_none_is_asked_twice(endpoint, store):
    teachers = [make_teacher(name, endpoint.base_url) for name in "ab"]
    asks = [Ask(make_prompt(name), teacher) for name in "xyz" for teacher in teachers]
    answers = collect(asks, store)
    assert [(a.prompt_id, a.teacher, a.text) for a in answers] == [
        (ask.prompt.id, ask.teacher.name, f"model-{ask.teacher.name}: question {ask.prompt.id}")
        for ask in asks
    ]
    assert collect([*asks[3:], *asks], store) == [*answers[3:], *answers]
    assert set(endpoint.asked().values()) == {1}
    assert len(endpoint.asked()) == store.count() == 6


def test_equal_prompts_share_one_answer_under_their_own_names(endpoint, store):
    teacher = make_teacher("a", endpoint.base_url)
    twins = [make_prompt(name, question="the same") for name in ("one", "other")]
    one, other = collect([Ask(prompt, teacher) for prompt in twins], store)
    assert endpoint.asked() == {("model-a", "the same"): 1}
    assert (one.prompt_id, other.prompt_id) == ("one", "other")
    assert dataclasses.replace(one, prompt_id="other") == other


def test_a_failure_that_stands_in_the_store_is_asked_again_and_replaced(endpoint, store):
    teacher = make_teacher("a", endpoint.base_url)
    asks = [Ask(make_prompt(name), teacher) for name in "xy"]
    fingerprint = teacher_fingerprint(teacher, None)
    failed = StoredAnswer(
        key=answer_key(asks[0].prompt.messages, fingerprint, 0),
        teacher="a",
        teacher_fingerprint=fingerprint,
        sample_index=0,
        text="",
        token_ids=None,
        finish_reason="error",
        prompt_tokens=0,
        completion_tokens=0,
        usd=None,
        licence="MIT",
        error="status 500",
        server="elsewhere",
        latency_seconds=0.0,
    )
    store.put(failed)
    answers = collect(asks, store)
    assert [(answer.finish_reason, answer.error) for answer in answers] == [("stop", None)] * 2
    assert answers[0].key == failed.key
    assert set(endpoint.asked().values()) == {1}
    assert len(endpoint.asked()) == store.count() == 2


def test_a_question_that_fails_is_a_row_never_used_and_asked_again_next_time(endpoint, store):
    teacher = make_teacher("a", endpoint.base_url)
    prompts = [make_prompt(name) for name in "xyz"]
    asks = [Ask(prompt, teacher) for prompt in prompts]
    endpoint.fails_for.add("question y")
    answers = collect(asks, store)
    assert [answer.finish_reason for answer in answers] == ["stop", "error", "stop"]
    failed = answers[1]
    assert (failed.text, failed.usable, failed.prompt_tokens, failed.usd) == ("", False, 0, None)
    assert failed.error.startswith("failed 1 times, last: status 500: ")
    assert [example.id for example in to_examples(prompts, answers)] == ["x", "z"]
    endpoint.fails_for.clear()
    assert [answer.text for answer in collect(asks, store)] == [
        f"model-a: question {name}" for name in "xyz"
    ]
    assert endpoint.asked() == {
        ("model-a", "question x"): 1,
        ("model-a", "question y"): 2,
        ("model-a", "question z"): 1,
    }


def test_what_was_answered_before_too_many_failed_is_kept(endpoint, store):
    teacher = make_teacher("a", endpoint.base_url)
    asks = [Ask(make_prompt(name), teacher) for name in "xyz"]
    endpoint.fails_for.add("question z")
    client = ClientConfig(attempts=1, concurrency=1)
    with pytest.raises(EndpointError, match=r"teacher 'a' at .*failed 1 times, last: status 500"):
        collect_answers(asks, None, store, client, no_service, "")
    assert store.count() == 3
    endpoint.fails_for.clear()
    assert [answer.text for answer in collect(asks, store)] == [
        f"model-a: question {name}" for name in "xyz"
    ]
    assert endpoint.asked()["model-a", "question x"] == 1


PRICES = {"usd_per_million_prompt_tokens": 2.0, "usd_per_million_completion_tokens": 4.0}


def test_a_budget_counts_what_is_stored_and_a_larger_one_goes_on(endpoint, store):
    """An answer costs 1500 tokens and $ 0.004; the most that one may cost is less."""
    teacher = make_teacher("a", endpoint.base_url, **PRICES)
    asks = [Ask(make_prompt(name), teacher) for name in "uvwxyz"]

    def ask(**budget):
        client = ClientConfig(concurrency=1, **budget)
        return collect_answers(asks, None, store, client, no_service, "")

    for _ in range(2):
        with pytest.raises(BudgetError, match=r"spent 3000 tokens and \$ 0\.0080; 4 answers are"):
            ask(budget_usd=0.0081)
        assert store.count() == len(endpoint.requests) == 2
    collected = ask(budget_tokens=9000)
    assert store.count() == len(endpoint.requests) == 6
    assert math.fsum(answer.usd for answer in collected.answers) == pytest.approx(0.024)
    assert ask(budget_usd=0.0).answers == collected.answers, "nothing is asked, nothing is spent"


def test_what_asking_came_to_is_in_the_summary_and_is_said(endpoint, store, capsys):
    priced = make_teacher("priced", endpoint.base_url, **PRICES)
    other = make_teacher("other", endpoint.base_url)
    asks = [Ask(make_prompt(name), teacher) for name in "xyz" for teacher in (priced, other)]
    endpoint.fails_for.add("question z")
    client = ClientConfig(attempts=1, max_failed_share=0.5)
    summary = collect_answers(asks, None, store, client, no_service, "calibrate").summary
    assert (summary["answers"], summary["failed_answers"]) == (6, 2)
    counts = {"answers": 2, "failed": 1, "requests": 3, "retries": 0}
    tokens = {"prompt_tokens": 2000, "completion_tokens": 1000}
    asked = summary["measured"]["asked"]
    assert asked["priced"] == {**counts, **tokens, "usd": pytest.approx(0.008)}
    assert asked["other"] == {**counts, **tokens, "usd": None}
    said = capsys.readouterr().err
    assert "calibrate: teacher 'priced': 2 answers, 1 failed, 3 requests" in said
    assert "$ 0.0080" in said
    assert "price unknown" in said


def test_a_dollar_budget_with_an_unknown_price_starts_nothing(store):
    own = make_teacher("own", None)
    with pytest.raises(ConfigError, match="price of teacher 'own' is unknown"):
        collect_answers(
            [Ask(make_prompt("x"), own)], "w", store, ClientConfig(budget_usd=1.0), no_service, ""
        )


def test_the_own_service_is_started_once_and_only_if_something_is_missing(endpoint, store):
    started = []

    def own_service():
        started.append(1)
        return endpoint.base_url, "served"

    own = make_teacher("own", None)
    asks = [Ask(make_prompt(name), own) for name in "xy"]
    answers = collect(asks, store, own_service=own_service, own_weights="w1")
    assert [answer.text for answer in answers] == ["served: question x", "served: question y"]
    assert collect(asks, store, own_weights="w1") == answers
    assert started == [1]
    collect(asks, store, own_service=own_service, own_weights="w2")
    assert len(endpoint.requests) == 4, "other weights are another teacher"


def test_a_request_says_all_that_the_teacher_says_and_its_seed_follows_from_that(endpoint, store):
    sampling = SamplingConfig(temperature=0.5, top_p=0.9, max_tokens=7, stop=["."])
    teacher = make_teacher(
        "a",
        endpoint.base_url,
        system="Be brief.",
        examples=[WorkedExample(question="1+1", answer="2")],
        sampling=sampling,
        usd_per_million_prompt_tokens=2.0,
        usd_per_million_completion_tokens=4.0,
    )
    (answer,) = collect([Ask(make_prompt("x"), teacher)], store)
    (request,) = endpoint.requests
    assert [(m["role"], m["content"]) for m in request["messages"]] == [
        ("system", "Be brief."),
        ("user", "1+1"),
        ("assistant", "2"),
        ("user", "question x"),
    ]
    assert (request["temperature"], request["top_p"], request["max_tokens"], request["stop"]) == (
        *(0.5, 0.9, 7),
        ["."],
    )
    assert 0 <= request["seed"] < 2**31
    assert answer.usd == pytest.approx(1000 * 2e-6 + 500 * 4e-6)
    assert (answer.licence, answer.error, answer.sample_index) == ("MIT", None, 0)

    renamed = dataclasses.replace(teacher, name="renamed")
    (same,) = collect([Ask(make_prompt("another id", question="question x"), renamed)], store)
    assert (same.key, same.teacher) == (answer.key, "renamed")
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"model": "another"},
        {"system": "Be long."},
        {"examples": [WorkedExample(question="1+1", answer="2")]},
        {"sampling": SamplingConfig(temperature=0.1)},
        {"sampling": SamplingConfig(max_tokens=3)},
        {"sampling": SamplingConfig(stop=["x"])},
    ],
)
def test_whatever_decides_an_answer_is_in_the_fingerprint(change):
    teacher = make_teacher("a", "http://one/v1")
    changed = dataclasses.replace(teacher, **change)
    assert teacher_fingerprint(changed, None) != teacher_fingerprint(teacher, None)
    for base_url in ("http://other/v1", ["http://one/v1", "http://other/v1"]):
        elsewhere = dataclasses.replace(teacher, name="b", base_url=base_url, licence="GPL")
        assert teacher_fingerprint(elsewhere, None) == teacher_fingerprint(teacher, None)


def test_calibrate_asks_all_teachers_and_generate_the_chosen_one(endpoint, store):
    """3 calibration and 2 train prompts, 2 teachers: 5 + 3 (2 - 1) answers, not 10."""
    teachers = [make_teacher(name, endpoint.base_url) for name in "ab"]
    prompts = [
        *(make_prompt(name) for name in "xyz"),
        *(make_prompt(name, "train") for name in "uv"),
        make_prompt("w", "eval"),
    ]
    arguments = (teachers, None, store, ClientConfig(), no_service)
    calibration = calibrate(prompts, *arguments).answers
    assert [(a.prompt_id, a.teacher) for a in calibration] == [(p, t) for p in "xyz" for t in "ab"]
    chosen = {"x": "b", "y": "a", "z": "b", "u": "a", "v": "b"}
    routes = [Route(name, [0.0, 0.0], teacher, 0.0) for name, teacher in chosen.items()]
    answers = generate(prompts, routes, *arguments).answers
    assert [(a.prompt_id, a.teacher) for a in answers] == list(chosen.items())
    assert set(answers[:3]) <= set(calibration)
    expected = 5 + 3 * (2 - 1)
    assert len(endpoint.requests) == store.count() == expected
    assert check_cost(prompts, 2, calibration, answers) == expected


def make_answer(prompt_id: str, teacher: str = "a", **changes) -> Answer:
    values = {
        "key": f"{prompt_id}{teacher}",
        "prompt_id": prompt_id,
        "teacher": teacher,
        "sample_index": 0,
        "text": "text",
        "finish_reason": "stop",
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "usd": None,
        "licence": "MIT",
        "error": None,
    }
    return Answer(**values | changes)


def test_an_answer_too_many_or_too_few_is_noticed():
    prompts = [make_prompt("x"), make_prompt("u", "train")]
    calibration = [make_answer("x", "a"), make_answer("x", "b")]
    chosen = [make_answer("x", "b"), make_answer("u", "a")]
    assert check_cost(prompts, 2, calibration, chosen) == 3
    for wrong in (chosen[:1], [*chosen, make_answer("u", "b")]):
        with pytest.raises(RuntimeError, match=r"\d answers were asked for; .* is 3"):
            check_cost(prompts, 2, calibration, wrong)


def test_an_answer_beside_another_prompt_is_noticed():
    prompts = [make_prompt("x"), make_prompt("y")]
    with pytest.raises(RuntimeError, match="prompt 'x' meets what belongs to 'y'"):
        list(to_examples(prompts, [make_answer("y"), make_answer("x")]))


def test_only_usable_answers_become_examples_and_licences_follow():
    prompts = [make_prompt(name) for name in "wxyz"]
    answers = [
        make_answer("w"),
        make_answer("x", finish_reason="length"),
        make_answer("y", text="  \n"),
        make_answer("z", teacher="b", licence="GPL"),
    ]
    first, last = to_examples(prompts, answers)
    assert (first.id, last.id) == ("w", "z")
    assert first.messages == [
        {"role": "user", "content": "question w"},
        {"role": "assistant", "content": "text"},
    ]
    assert (last.teacher, last.teacher_licence, last.source_licence) == ("b", "GPL", "CC0-1.0")
    assert prompts[0].messages == [{"role": "user", "content": "question w"}]
