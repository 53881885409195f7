"""Constraints against texts made for them: what keeps each, and what just misses it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.config import ConfigError
from persyn_jax.evaluation.instructions import CONSTRAINTS, NOT_CHECKABLE, share_kept

WORDS = st.lists(st.from_regex(r"[a-z]{1,8}", fullmatch=True), min_size=1, max_size=12)


def reference(*constraints) -> str:
    return json.dumps([{"id": name, "kwargs": kwargs} for name, kwargs in constraints])


def kept(text: str, name: str, **kwargs) -> bool:
    score = share_kept(text, reference((name, kwargs)))
    assert score in (0.0, 1.0)
    return score == 1.0


# (constraint, arguments, texts that keep it, texts that do not)
MADE = [
    ("keywords:existence", {"keywords": ["cat", "C++"]}, ["Cats like c++."], ["cats", "c+"]),
    (
        "keywords:frequency",
        {"keyword": "Fish", "frequency": 2, "relation": "at least"},
        ["fish, fishing"],
        ["fish", ""],
    ),
    (
        "keywords:frequency",
        {"keyword": "fish", "frequency": 2, "relation": "less than"},
        ["fish", ""],
        ["fish FISH"],
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ["category"], ["A Cat!"]),
    (
        "keywords:letter_frequency",
        {"letter": "Q", "let_frequency": 2, "let_relation": "at least"},
        ["Quick quiz"],
        ["quick"],
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "***a***b***"],
     ["a\n\nb", "a***b***c", "a******b"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        ['First.\n\n"Then," he said.', "a\n\n\n\nthen"],
        ["then\n\nfirst", "a\n\nthen\n\nb", "a\n\nthence", ""],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] of [town]"],
     ["[name]", "name, town"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\np. s. more"], ["ps"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S more"], ["P.S. no"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["So:\n* one\n* two", "- one\n  - two", "* one\n**bold**\n- two"],
        ["* one", "* one\n* two\n- three", "one - two"],
    ),
    ("detectable_format:constrained_response", {}, ["Well. My answer is maybe."], ["Maybe."]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*one* and **two**", "*one* *two*"],
        ["**one**", "** ** and *one*", "* one\n* two\n"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1 and SECTION two", "Section 1, Section 2"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1]}', "```json\n[1]\n```", "```\n3\n```", " 1 "],
        ["{a: 1}", "Here: {}", "", "[" * 100_000],
    ),
    ("detectable_format:title", {}, ["<<Ode>>\nText"], ["<Ode>", "<< >>", "<<Ode\n>>"]),
    (
        "combination:two_responses",
        {},
        ["a ****** b", "******a******b"],
        ["a", "a******a", "a******b******c", "a************b"],
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Why?"}, [" why? So."], ["So. Why?"]),
    ("startend:end_checker", {"end_phrase": "The end."}, ['"... the END."\n'], ["The end. Bye."]),
    ("startend:quotation", {}, [' "So." '], ['"So.', '"', ""]),
    ("change_case:english_capital", {}, ["NO 3!"], ["NOt", "3"]),
    ("change_case:english_lowercase", {}, ["no 3!"], ["no T", "3"]),
    ("punctuation:no_comma", {}, ["a; b", ""], ["a, b"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs", "keeping", "missing"), MADE)
def test_made_texts(name, kwargs, keeping, missing):
    assert [text for text in keeping if not kept(text, name, **kwargs)] == []
    assert [text for text in missing if kept(text, name, **kwargs)] == []


def test_every_constraint_has_a_text():
    assert {name for name, *_ in MADE} | {"length_constraints:number_words"} == set(CONSTRAINTS)
    assert len(CONSTRAINTS) + len(NOT_CHECKABLE) == 25  # IFEval's


@given(WORDS, st.integers(0, 14))
def test_at_least_and_less_than_divide_the_texts_at_the_number_of_words(words, number):
    name, text = "length_constraints:number_words", ", ".join(words)
    assert kept(text, name, num_words=number, relation="at least") == (len(words) >= number)
    assert kept(text, name, num_words=number, relation="less than") == (len(words) < number)


@given(WORDS, st.sampled_from(["***", "******"]))
def test_as_many_paragraphs_as_there_are_parts_between_dividers(words, divider):
    name, text = "length_constraints:number_paragraphs", divider.join(words)
    if divider == "***":
        assert kept(text, name, num_paragraphs=len(words))
        assert not kept(text, name, num_paragraphs=len(words) + 1)
    else:  # a divider twice: nothing stands between
        assert kept(text, name, num_paragraphs=len(words)) == (len(words) == 1)


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_the_score_is_the_share_kept(wanted):
    constraints = [
        ("startend:end_checker", {"end_phrase": "word" if keep else "other"}) for keep in wanted
    ]
    assert share_kept("a word", reference(*constraints)) == sum(wanted) / len(wanted)


def test_arguments_that_are_null_are_not_given_as_in_the_published_rows():
    constraint = ("punctuation:no_comma", {"num_words": None, "keywords": None})
    assert share_kept("a", reference(constraint)) == 1.0
    assert share_kept("a", json.dumps([{"id": "punctuation:no_comma"}])) == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yes", "constraints are not JSON: "),
        ("[]", "at least one"),
        ('{"id": "punctuation:no_comma"}', "must be a JSON list"),
        ('["punctuation:no_comma"]', "an object {id, kwargs}, got 'punctuation:no_comma'"),
        ('[{"id": "punctuation:no_dot"}]', "no such constraint: 'punctuation:no_dot'; there are"),
        ('[{"id": ["a"]}]', r"no such constraint: \['a'\]"),
        ('[{"id": "punctuation:no_comma", "kwargs": [1]}]', r"kwargs must be an object, got \[1\]"),
        ('[{"id": "punctuation:no_comma", "kwargs": {"text": ""}}]', "no_comma': "),
        (reference(("language:response_language", {})), "cannot be checked: it needs a language"),
        (reference(("length_constraints:number_words", {"relation": "at least"})), "num_words: "),
        (
            reference(("length_constraints:number_words", {"relation": "over", "num_words": 1})),
            "relation: .*'less than' or 'at least'",
        ),
        (reference(("keywords:existence", {"keywords": "cat"})), "keywords: .*list"),
        (reference(("keywords:existence", {"keywords": []})), "keywords: "),
        (reference(("startend:end_checker", {"end_phrase": "a", "more": 1})), "more: "),
    ],
)
def test_what_is_no_constraint_is_refused_in_one_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        share_kept("a", text)
    assert "\n" not in str(caught.value)
