"""Chat completions, and what else is told over HTTP, as any client would see it."""

import concurrent.futures
import time

import numpy as np
import psutil
import pytest
from service_cases import QUESTION, TOK, ask, chat, refused, service_config, serving

from persyn_jax.models import tokenizer
from persyn_jax.sampling.process import read_counters

CONTEXT = 2048


@pytest.fixture(scope="module")
def service():
    """A client whose paths begin at the service's root. The process is gone at the end."""
    before = set(psutil.Process().children())
    with serving(service_config(cache_length=CONTEXT)) as http:
        (child,) = set(psutil.Process().children()) - before
        family = [child, *child.children(recursive=True)]
        yield http
    assert not any(process.is_running() for process in family)


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
    assert "# TYPE persyn_engine_decode_steps gauge" in service.get("/metrics").text


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
        {"min_p": 0.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {"5": 100}},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function"}]},
        {"ignore_eos": True},
        {"chat_template": "{{ 'A' * 10**9 }}"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"echo": True},
        {"best_of": 2},
        {"prompt_logprobs": 1},
        {"stop_token_ids": [5]},
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_field_that_would_change_the_answer_is_named(service, field):
    (name,) = field
    error = refused(chat(service, 400, **field))
    assert error["param"] == name
    assert error["message"].startswith(f"{name}: ")
    assert error["message"].endswith("is not supported")


def test_fields_that_ask_for_nothing_are_let_through(service):
    nothing = {"n": 1, "stream": False, "top_k": -1, "logit_bias": None, "tools": [], "top_p": 1}
    nothing |= {"stop": [], "logprobs": False, "presence_penalty": 0.0, "tool_choice": "none"}
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
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        ({"model": None}, "model"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"seed": 2**64}, "seed"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stop": ["x" * 257]}, "stop.0"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_an_impossible_value_is_named(service, field, param):
    error = refused(chat(service, 400, **field))
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
        (b'{"model": "tiny", "messages": [], "temperature": NaN}', "NaN is not a number"),
        (b'{"model": "tiny", "messages": [], "temperature": 1e999}', "1e999 is too large"),
        (b'{"model": "tiny", "messages": [], "seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": ' * 65 + b"1" + b"}" * 65, "nested deeper than 64 levels"),
        (b"\xff\xfe", "body"),
    ],
)
def test_a_garbled_body_is_a_bad_request(service, data, message):
    headers = {"Content-Type": "application/json"}
    response = service.post("/v1/chat/completions", content=data, headers=headers)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_another_model_is_not_found(service):
    error = refused(chat(service, 404, model="gpt-4"))
    assert error["message"] == "model: 'gpt-4' is not served here; 'tiny' is"


def test_another_path_is_not_found(service):
    for response, status in ((service.get("/v2"), 404), (service.get("/v1/chat/completions"), 405)):
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_context_too_long_is_refused(service):
    long = [{"role": "user", "content": "x" * CONTEXT}]
    for tokens in ({"max_tokens": 1}, {"max_tokens": None}):
        error = refused(chat(service, 400, messages=long, **tokens))
        assert error["message"].startswith("messages: context too long: ")
        assert f"exceed the context length of {CONTEXT}" in error["message"]


def test_without_max_tokens_an_answer_may_fill_the_context(service):
    found = chat(service, max_tokens=None, temperature=0)
    room = CONTEXT - found["usage"]["prompt_tokens"]
    assert found["usage"]["completion_tokens"] == room
    assert found["choices"][0]["finish_reason"] == "length"


def test_choices_have_the_seeds_that_follow_each_other(service):
    choices = chat(service, n=3, seed=5)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    for offset, choice in enumerate(choices):
        (alone,) = chat(service, seed=5 + offset)["choices"]
        assert choice["message"] == alone["message"]
    usage = chat(service, n=3, seed=5)["usage"]
    assert usage["completion_tokens"] == 3 * 8
    assert usage["prompt_tokens"] == len(tokenizer.prompt_ids(TOK, QUESTION))


def test_top_k_of_one_is_greedy(service):
    greedy = chat(service, temperature=0)["choices"]
    assert chat(service, temperature=2, top_k=1)["choices"] == greedy
    assert chat(service, seed=3, top_k=0)["choices"] == chat(service, seed=3)["choices"]


def test_content_may_be_text_parts_and_developer_means_system(service):
    parts = [{"type": "text", "text": "You"}, {"type": "text", "text": "answer."}]
    found = chat(
        service, temperature=0, messages=[{"role": "developer", "content": parts}, *QUESTION]
    )
    plain = [{"role": "system", "content": "You\nanswer."}, *QUESTION]
    assert found["choices"] == chat(service, temperature=0, messages=plain)["choices"]


def test_tool_calls_in_a_message_are_refused(service):
    messages = [{"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}]
    assert refused(chat(service, 400, messages=messages))["param"] == "messages.0.tool_calls"


def test_too_many_messages_or_characters_are_refused_before_they_are_read(service):
    assert refused(chat(service, 400, messages=QUESTION * 1025))["param"] == "messages"
    error = refused(chat(service, 400, messages=[{"role": "user", "content": "x" * 10**6}]))
    assert error["message"].startswith("messages: context too long: 1000000 characters exceed")


def test_logprobs_of_a_chat_are_those_of_its_tokens(service):
    """The model's own: whatever the temperature, and the likeliest first."""
    found = chat(service, seed=2, logprobs=True, top_logprobs=3, return_token_ids=True)
    (choice,) = found["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == found["usage"]["completion_tokens"]
    said = bytes(byte for entry in content for byte in entry["bytes"])
    assert said.decode(errors="replace") == choice["message"]["content"]
    ids = tokenizer.prompt_ids(TOK, QUESTION) + choice["token_ids"]
    scored = ask(service, "/v1/score_tokens", token_ids=ids, completion_start=len(ids) - 8)
    told = [entry["logprob"] for entry in content]
    np.testing.assert_allclose(told, scored["token_logprobs"], atol=1e-4)
    for entry in content:
        top = [other["logprob"] for other in entry["top_logprobs"]]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
        assert max(top) >= entry["logprob"]
        exact = bytes(entry["bytes"])
        assert entry["token"] in (exact.decode(errors="ignore"), f"bytes:\\x{exact.hex()}")
    cold = chat(service, seed=2, logprobs=True, temperature=0)["choices"][0]["logprobs"]["content"]
    assert cold[0]["top_logprobs"] == []


def test_texts_and_tokens_go_both_ways(service):
    text = "héllo <|im_end|> \u2028"
    tokens = ask(service, "/tokenize", prompt=text, add_special_tokens=False)
    assert tokens["tokens"] == TOK(text, add_special_tokens=False)["input_ids"]
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == CONTEXT
    assert ask(service, "/detokenize", tokens=tokens["tokens"]) == {"prompt": text}
    chatted = ask(service, "/tokenize", messages=QUESTION)["tokens"]
    assert chatted == tokenizer.prompt_ids(TOK, QUESTION)
    assert refused(ask(service, "/detokenize", 400, tokens=[10**6]))["param"] == "tokens"
    assert refused(ask(service, "/tokenize", 400))["param"] == "prompt"


def test_tokenizer_info(service):
    info = service.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>"
    assert info["chat_template"] == tokenizer.CHATML


def test_scores_may_start_anywhere_but_before_the_first_token(service):
    ids = TOK("abcdef")["input_ids"]
    whole = ask(service, "/v1/score_tokens", token_ids=ids)
    assert len(whole["token_logprobs"]) == len(ids) - 1
    part = ask(service, "/v1/score_tokens", token_ids=ids, completion_start=4)
    assert part["token_logprobs"] == whole["token_logprobs"][3:]
    assert part["mean"] == pytest.approx(sum(part["token_logprobs"]) / 2)
    for start in (0, len(ids)):
        error = refused(
            ask(service, "/v1/score_tokens", 400, token_ids=ids, completion_start=start)
        )
        assert error["param"] == "completion_start"


def test_version_and_one_model(service):
    assert service.get("/version").json().keys() == {"version"}
    assert service.get("/v1/models/tiny").json()["id"] == "tiny"
    assert service.get("/v1/models/other").status_code == 404


def test_metrics_have_the_series_of_vllm(service):
    chat(service, max_tokens=6, temperature=0)
    lines = service.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    name = '{model_name="tiny"}'
    for gauge in ("num_requests_running", "num_requests_waiting"):
        assert float(values[f"persyn_{gauge}{name}"]) == 0
    ended = float(
        values['persyn_request_success_total{finished_reason="length",model_name="tiny"}']
    )
    for series in ("time_to_first_token", "time_per_output_token", "e2e_request_latency"):
        assert float(values[f"persyn_{series}_seconds_count{name}"]) > 0
        assert float(values[f"persyn_{series}_seconds_sum{name}"]) > 0
    assert ended >= 1
    for counter in ("prompt_tokens", "generation_tokens", "prefix_cache_queries"):
        assert float(values[f"persyn_{counter}_total{name}"]) > 0
