"""POST /v1/completions, log-likelihoods as lm-eval reads them, and streams of both kinds."""

import numpy as np
import pytest
from service_cases import (
    QUESTION,
    TOK,
    ask,
    chat,
    complete,
    refused,
    service_config,
    serving,
    stream,
)

from persyn_jax.models import decoder, weights
from persyn_jax.models.spec import ModelConfig

CONTEXT = 256
EOS = TOK.eos_token_id
TEXT = "The sea, é and \N{GRINNING FACE}."


@pytest.fixture(scope="module")
def service():
    with serving(service_config(cache_length=CONTEXT)) as http:
        yield http


def ids(text: str) -> list[int]:
    return TOK(text)["input_ids"]


def log_softmax(tokens: list[int]) -> np.ndarray:
    """float64 [T, V]: by the trainer's forward, in this process, of what comes after each token."""
    model = weights.load(ModelConfig(weights="random:tiny"))
    tokens_BT = np.array([tokens], np.int32)
    hidden_BTD, _ = decoder.hidden_states(
        model.config,
        model.params,
        tokens_BT,
        np.arange(len(tokens), dtype=np.int32)[None],
        decoder.attend_causally(np.ones_like(tokens_BT)),
    )
    logits_TV = np.asarray(decoder.logits(model.config, model.params, hidden_BTD))[0].astype(
        np.float64
    )
    top_T1 = logits_TV.max(axis=1, keepdims=True)
    return logits_TV - top_T1 - np.log(np.exp(logits_TV - top_T1).sum(axis=1, keepdims=True))


def test_a_prompt_may_be_text_or_token_ids_one_or_many(service):
    (one,) = complete(service, "abc", temperature=0)["choices"]
    assert one["finish_reason"] == "length"
    assert one["logprobs"] is None
    for prompt in (["abc"], ids("abc"), [ids("abc")]):
        found = complete(service, prompt, temperature=0)
        assert found["choices"] == [one]
        assert found["usage"]["prompt_tokens"] == 3
    many = complete(service, ["xyz", "abc", "w"], seed=4, n=2)
    assert [choice["index"] for choice in many["choices"]] == list(range(6))
    assert many["usage"] == {"prompt_tokens": 7, "completion_tokens": 48, "total_tokens": 55}
    alone = complete(service, "abc", seed=4, n=2)["choices"]
    assert [c["text"] for c in many["choices"][2:4]] == [c["text"] for c in alone]
    assert many["object"] == "text_completion"


def test_sixteen_tokens_unless_asked_or_what_there_is_room_for(service):
    assert (
        complete(service, "a", max_tokens=None, temperature=0)["usage"]["completion_tokens"] == 16
    )
    long = "a" * (CONTEXT - 3)
    assert (
        complete(service, long, max_tokens=None, temperature=0)["usage"]["completion_tokens"] == 3
    )


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("", "prompt"),
        ([], "prompt"),
        ([[]], "prompt"),
        (None, "prompt"),
        (3, "prompt"),
        ([1, "a"], "prompt"),
        ([-1], "prompt"),
        ([True], "prompt"),
        ([10**6], "prompt"),
        ([1.5], "prompt"),
        (["a", [1]], "prompt"),
        ([5] * (CONTEXT + 1), "prompt"),
        ("x" * CONTEXT, "prompt"),
        ("x" * 10**6, "prompt"),
    ],
)
def test_an_impossible_prompt_is_named(service, prompt, field):
    error = refused(complete(service, prompt, 400))
    assert error["param"] == field
    assert error["message"].startswith(f"{field}: ")


@pytest.mark.parametrize("field", [{"suffix": "x"}, {"best_of": 3}, {"max_tokens": 0}])
def test_what_completions_do_not_offer_is_named(service, field):
    (name,) = field
    assert refused(complete(service, "a", 400, **field))["param"] == name


def test_more_choices_than_ever_fit_are_refused(service):
    error = refused(complete(service, ["a"] * 17, 400, n=16))
    assert "272 answers are more than the 260 allowed" in error["message"]


def test_loglikelihood_as_lm_eval_reads_it(service):
    """EleutherAI/lm-evaluation-harness@4e7e0d4, openai_completions.py: parse_logprobs, on the very
    body that it sends; against the trainer's forward in this process."""
    pairs = [("The cat", " sat on"), ("a", TEXT), (TEXT, "b"), ("Once upon a time", " there")]
    greedy = complete(service, ids("greedy?"), temperature=0, max_tokens=4, return_token_ids=True)
    tokens = [(ids(context), ids(rest)) for context, rest in pairs]
    tokens.append((ids("greedy?"), greedy["choices"][0]["token_ids"]))
    found = ask(
        service,
        "/v1/completions",
        prompt=[context + rest for context, rest in tokens],
        temperature=0,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
    )
    answers = []
    choices = sorted(found["choices"], key=lambda choice: choice["index"])
    for choice, (context, _) in zip(choices, tokens, strict=True):
        told = choice["logprobs"]["token_logprobs"][len(context) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        is_greedy = all(own == max(top.values()) for own, top in zip(told, tops, strict=True))
        answers.append((sum(told), is_greedy))
    for (total, is_greedy), (context, rest) in zip(answers, tokens, strict=True):
        own_TV = log_softmax(context + rest)
        places = range(len(context) - 1, len(context) + len(rest) - 1)
        expected = sum(own_TV[place, token] for place, token in zip(places, rest, strict=True))
        assert total == pytest.approx(expected, abs=1e-4)
        assert is_greedy == all(
            own_TV[place].argmax() == token for place, token in zip(places, rest, strict=True)
        )
    assert [is_greedy for _, is_greedy in answers] == [False] * 4 + [True]


def test_echo_tells_of_every_token_and_where_it_stands(service):
    (choice,) = complete(service, TEXT, echo=True, logprobs=3, seed=1, max_tokens=4)["choices"]
    told = choice["logprobs"]
    count = len(ids(TEXT)) + 4
    assert choice["text"].startswith(TEXT)
    assert {name: len(values) for name, values in told.items()} == dict.fromkeys(
        ("tokens", "token_logprobs", "top_logprobs", "text_offset"), count
    )
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    for token, own, top in zip(
        told["tokens"][1:], told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True
    ):
        assert 3 <= len(top) <= 4
        assert top[token] == own
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)
    smile = TEXT.index("\N{GRINNING FACE}")
    assert told["tokens"][told["text_offset"].index(smile)] == "bytes:\\xf0"


def test_echo_alone_and_with_no_new_token(service):
    (plain,) = complete(service, "abc", temperature=0)["choices"]
    (echoed,) = complete(service, "abc", temperature=0, echo=True)["choices"]
    assert echoed["text"] == "abc" + plain["text"]
    for prompt in ("abc", ids("abc")):
        found = complete(service, prompt, echo=True, max_tokens=0, logprobs=0)
        (choice,) = found["choices"]
        assert choice["text"] == "abc"
        assert choice["finish_reason"] == "length"
        assert len(choice["logprobs"]["tokens"]) == 3
        assert [top and len(top) for top in choice["logprobs"]["top_logprobs"]] == [None, 1, 1]
        assert found["usage"]["completion_tokens"] == 0
        (silent,) = complete(service, prompt, echo=True, max_tokens=0)["choices"]
        assert (silent["text"], silent["logprobs"]) == ("abc", None)


def test_an_end_that_is_generated_is_told_of(service):
    """lm-eval drops the last entry, so that there must be one for EOS too."""
    for seed in range(400):
        found = complete(service, "x", n=16, seed=16 * seed, max_tokens=8, logprobs=0)
        ended = [c for c in found["choices"] if c["finish_reason"] == "stop"]
        lengths = [len(choice["logprobs"]["tokens"]) for choice in found["choices"]]
        assert sum(lengths) == found["usage"]["completion_tokens"]
        if ended:
            assert ended[0]["logprobs"]["tokens"][-1] == "<|im_end|>"
            assert not ended[0]["text"].endswith("<|im_end|>")
            return
    pytest.fail("no answer ended by itself")


STREAMED = [
    {},
    {"n": 3},
    {"stop": ["e", "q"], "max_tokens": 60},
    {"temperature": 0},
    {"return_token_ids": True},
    {"max_tokens": 100},
]


@pytest.mark.parametrize("body", [*STREAMED, {"logprobs": True, "top_logprobs": 2}])
def test_a_streamed_chat_adds_up_to_the_whole_one(service, body):
    body = {"messages": QUESTION, "seed": 6, "max_tokens": 12} | body
    whole = chat(service, **body)
    chunks = stream(service, "/v1/chat/completions", **body, stream_options={"include_usage": True})
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(part["delta"].get("content", "") for part in parts)
        assert text == choice["message"]["content"]
        assert [p["finish_reason"] for p in parts if p["finish_reason"]] == [
            choice["finish_reason"]
        ]
        assert parts[-1]["finish_reason"] is not None
        streamed = [token for part in parts for token in part.get("token_ids", [])]
        assert streamed == choice.get("token_ids", [])
        told = [e for p in parts if p["logprobs"] for e in p["logprobs"]["content"]]
        assert told == (choice["logprobs"] or {"content": []})["content"]


@pytest.mark.parametrize(
    "body", [*STREAMED, {"logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 1, "n": 2}]
)
def test_a_streamed_completion_adds_up_to_the_whole_one(service, body):
    body = {"prompt": ["abc", TEXT], "seed": 6, "max_tokens": 12} | body
    whole = complete(service, **body)
    chunks = stream(service, "/v1/completions", **body)
    assert all("usage" not in chunk for chunk in chunks)
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        if choice["logprobs"]:
            for name, values in choice["logprobs"].items():
                assert [each for part in parts for each in part["logprobs"][name]] == values


def test_a_stream_that_is_refused_has_a_status(service):
    error = refused(chat(service, 400, stream=True, max_tokens=10**6))
    assert error["param"] == "messages"
