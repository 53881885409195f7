"""Bodies as JSON, token texts and log-probabilities, with no service."""

import contextlib
import gc
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from persyn_jax.models import tokenizer
from persyn_jax.sampling.openai_replies import event
from persyn_jax.sampling.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestError,
    parse_json,
)
from persyn_jax.sampling.requests import TokenLogprob
from persyn_jax.sampling.token_text import CompletionLogprobs, TokenTexts, chat_logprobs, number

TOK = tokenizer.byte_level()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
)


@given(VALUES, st.booleans())
def test_what_is_json_is_read_as_json(value, ascii_only):
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=60) | TEXT.map(str.encode))
def test_what_is_not_json_is_nothing_but_a_value_error(data):
    with contextlib.suppress(ValueError):
        parse_json(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 65 + b"]" * 65, "deeper than 64"),
        (b"[" * 10**6, "deeper than 64"),
        (b'{"a":' * 10**5, "deeper than 64"),
        (b'["' + rb"\"" * 10**6, "Unterminated string"),
        (rb'["\ud83d"]', "not valid Unicode"),
        (rb'{"\uDFFF": 1}', "not valid Unicode"),
        (b'["\xed\xa0\xbd"]', "not UTF-8"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1e400]", "too large"),
        (b"[" + b"1" * 5000 + b"]", "digits"),
        (b"", "Expecting value"),
    ],
)
def test_what_json_leaves_open_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        parse_json(data)


MANY = 1_300_000  # as many as fit into 4 MB


@pytest.fixture
def own_garbage_only():
    """The collector leaves out what other tests of this process left: it is not what is timed."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionRequest, {"prompt": [5.5] * MANY}),
        (CompletionRequest, {"prompt": [5] * MANY + ["a"]}),
        (CompletionRequest, {"prompt": [[5.5]] * MANY}),
        (ChatRequest, {"messages": [{}] * MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
        (DetokenizeRequest, {"tokens": [-1] * MANY}),
    ],
)
@pytest.mark.usefixtures("own_garbage_only")
def test_a_million_errors_are_one_or_two(kind, fields):
    began = time.process_time()
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "m"} | fields)
    assert caught.value.error_count() <= 2
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "data",
    [b"[" + b"[]," * MANY + b"[]]", b'["",' * MANY, b'["' + rb"\"" * 2 * 10**6, rb"\u0" * 10**6],
)
@pytest.mark.usefixtures("own_garbage_only")
def test_a_large_body_is_parsed_or_refused_in_time(data):
    began = time.process_time()
    with contextlib.suppress(ValueError):
        parse_json(data)
    assert time.process_time() - began < 5


def test_brackets_in_a_text_are_not_depth():
    value = ["[{" * 100, '"\\[[[[' * 50]
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(rb'["\ud83d\ude00"]') == ["\N{GRINNING FACE}"]


@given(st.text(min_size=1).filter(lambda name: name not in ChatRequest.model_fields), VALUES)
def test_unknown_fields_pass(name, value):
    body = {"model": "m", "messages": [{"role": "user", "content": ""}], name: value}
    assert ChatRequest.model_validate(body).model_extra == {name: value}


def test_the_prompt_of_a_completion_is_many():
    for prompt, prompts in (
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ):
        assert CompletionRequest(model="m", prompt=prompt).prompts == prompts


def test_echo_is_what_allows_no_token():
    CompletionRequest(model="m", prompt="a", max_tokens=0, echo=True).check()
    with pytest.raises(RequestError, match="max_tokens: 0 is only for echo"):
        CompletionRequest(model="m", prompt="a", max_tokens=0).check()


@given(TEXT)
def test_the_bytes_of_tokens_are_those_of_the_text(text):
    texts = TokenTexts(TOK)
    ids = TOK(text, add_special_tokens=False)["input_ids"]
    assert b"".join(texts[token][1] for token in ids) == text.encode()
    shown = {texts[token] for token in range(len(TOK))}
    assert len({one for one, _ in shown}) == len(TOK)  # no two look alike


@given(TEXT, st.integers(0, 30))
def test_offsets_are_those_of_the_characters(text, hidden):
    ids = TOK(text, add_special_tokens=False)["input_ids"]
    entries = [(token, TokenLogprob(token, -1.0, ())) for token in ids]
    told = CompletionLogprobs(TokenTexts(TOK)).add(entries)
    expected = [place for place, character in enumerate(text) for _ in character.encode()]
    assert told["text_offset"] == expected
    parts = CompletionLogprobs(TokenTexts(TOK))
    offsets = [offset for entry in entries for offset in parts.add([entry])["text_offset"]]
    assert offsets == expected
    assert told["top_logprobs"] == [{token: -1.0} for token in told["tokens"]]


def test_a_hidden_first_token_takes_no_room():
    texts = TokenTexts(TOK)
    hidden = len(texts[0][0])
    entries = [(0, None), *((token, TokenLogprob(token, -1.0, ())) for token in (70, 71))]
    assert CompletionLogprobs(texts, hidden).add(entries)["text_offset"] == [0, 0, 1]


def test_of_tokens_that_look_alike_the_likeliest_stays():
    texts = TokenTexts(TOK, {1: ("x", b"x"), 2: ("x", b"x"), 3: ("y", b"y")})
    entry = TokenLogprob(2, -3.0, ((1, -1.0), (3, -2.0)))
    (top,) = CompletionLogprobs(texts).add([(2, entry)])["top_logprobs"]
    assert top == {"x": -1.0, "y": -2.0}


def test_minus_infinity_is_the_least_number():
    entry = TokenLogprob(70, -float("inf"), ((71, -0.5), (72, -float("inf"))))
    (told,) = chat_logprobs([entry], TokenTexts(TOK))["content"]
    assert [told["logprob"], *(top["logprob"] for top in told["top_logprobs"])] == [
        -9999,
        -0.5,
        -9999,
    ]


def test_a_model_that_says_nan_gets_no_reply_that_hides_it():
    entry = TokenLogprob(70, float("nan"), ())
    with pytest.raises(ValueError, match="not JSON compliant"):
        event(chat_logprobs([entry], TokenTexts(TOK)))
    assert number(-9998.5) == -9998.5
