"""The text of an answer that comes token by token is the text of the whole answer."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from persyn_jax.models.tokenizer import byte_level
from persyn_jax.sampling.answer_text import AnswerText

TOKENIZER = byte_level()
# Bytes make every kind of broken text; characters of up to four bytes make whole ones.
any_tokens = st.lists(st.integers(0, 258), max_size=40)
any_text = st.text("aabb\n é漢🙂", max_size=30)


def tokens_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def decode(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def spell(tokens: list[int], stop: tuple[str, ...]) -> tuple[list[str], int]:
    """(the parts of the text, how many tokens were taken)."""
    text, parts = AnswerText(TOKENIZER, stop), []
    for count, token in enumerate(tokens, 1):
        parts.append(text.push(token))
        if text.stopped:
            return parts, count
    return [*parts, text.finish()], len(tokens)


@settings(deadline=None)
@given(any_tokens)
@example(tokens_of("é")[:1] * 5 + tokens_of("a"))  # broken bytes, then a whole character
def test_the_parts_are_the_whole(tokens):
    assert "".join(spell(tokens, ())[0]) == decode(tokens)


@settings(deadline=None)
@given(any_text)
def test_no_part_breaks_a_character(text):
    parts, _ = spell(tokens_of(text), ())
    assert "".join(parts) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


@settings(deadline=None)
@given(any_text)
def test_without_stop_texts_nothing_whole_is_held_back(text):
    tokens = tokens_of(text)
    parts, _ = spell(tokens, ())
    for count in range(len(tokens) + 1):
        known = decode(tokens[:count])
        assert "".join(parts[:count]) == known.rstrip("\N{REPLACEMENT CHARACTER}")


@settings(deadline=None, max_examples=300)
@given(any_text, st.lists(st.text("ab\né", min_size=1, max_size=4), min_size=1, max_size=3))
@example("aab", ["ab"])  # its beginning comes twice
@example("aba", ["b", "aba"])  # what may become one stop text holds another
@example("aaé", ["aé"])  # it ends in a character of two tokens
def test_the_text_ends_before_the_first_stop_text(text, stop):
    tokens = tokens_of(text)
    parts, taken = spell(tokens, tuple(stop))
    # It ends with the token that makes some stop text whole, before the first one in the text.
    whole = (n for n in range(len(tokens) + 1) if any(s in decode(tokens[:n]) for s in stop))
    expected = next(whole, len(tokens))
    assert taken == expected
    known = decode(tokens[:expected])
    places = [known.find(s) for s in stop if s in known]
    assert "".join(parts) == known[: min(places, default=len(known))]


@settings(deadline=None)
@given(any_text, st.text("ab", min_size=1, max_size=4))
def test_what_was_handed_out_is_never_taken_back(text, stop):
    """At any time the text so far is a beginning of the final one."""
    final = text.split(stop)[0]
    so_far = ""
    for part in spell(tokens_of(text), (stop,))[0]:
        so_far += part
        assert final.startswith(so_far)
