"""Chat templates in a process of their own: the same text, and no more work than allowed."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persyn_jax.config import ConfigError
from persyn_jax.models import tokenizer
from persyn_jax.sampling.templates import TemplateRenderer

TOK = tokenizer.byte_level()
QUESTION = [{"role": "user", "content": "Why?"}]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def renderer():
    made = TemplateRenderer(TOK)
    yield made
    made.close()


def with_template(template: str) -> TemplateRenderer:
    tok = tokenizer.byte_level()
    tok.chat_template = template
    return TemplateRenderer(tok)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXTS), min_size=1))
def test_the_same_ids_as_in_this_process(renderer, turns):
    messages = [{"role": role, "content": text} for role, text in turns]
    expected = TOK.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.prompt_ids(TOK, messages) == expected
    assert tokenizer.prompt_ids(TOK, messages, renderer.render) == expected


def test_a_large_conversation(renderer):
    messages = [{"role": "user", "content": "é" * 2_000_000}]
    assert renderer.render(TOK, messages) == tokenizer.render_chat(TOK, messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}", "1 s"),
        ("{{ 'A' * 10**10 }}", "256 MB"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages.__class__.__mro__ }}", "refuses"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% if %}", "refuses"),
    ],
)
def test_a_template_that_misbehaves_is_refused_and_the_next_one_is_served(template, message):
    renderer = with_template(template + "{{ messages[0].content }}")
    try:
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(ConfigError, match="the chat template") as caught:
                renderer.render(TOK, QUESTION)
            assert message in str(caught.value)
            assert time.monotonic() - began < 60
    finally:
        renderer.close()


def test_a_killed_process_is_replaced(renderer):
    renderer.start()
    before = renderer._child
    before.kill()
    before.wait()
    with pytest.raises(ConfigError, match="the chat template failed"):
        renderer.render(TOK, QUESTION)
    assert renderer.render(TOK, QUESTION) == tokenizer.render_chat(TOK, QUESTION)
    assert renderer._child is not before


def test_it_ends_with_its_parent(renderer):
    """Its standard input ends then."""
    renderer.start()
    renderer._child.stdin.close()
    renderer._child.wait(timeout=20)
    renderer._child.stdout.close()
    renderer._child = None
