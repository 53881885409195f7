"""Overlap with evaluation texts, planted and not."""

from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.evaluation.contamination import NGRAM_WORDS, Overlap

WORDS = [f"word{n}" for n in range(40)]


def sentence(*words: str) -> str:
    return " ".join(words)


def test_a_shared_run_of_thirteen_words_is_found_and_of_twelve_is_not():
    overlap = Overlap([sentence(*WORDS)])
    for length, expected in ((12, False), (13, True)):
        shared = WORDS[5 : 5 + length]
        assert overlap.found(sentence("other", *shared, "end")) is expected


def test_letter_case_and_punctuation_hide_nothing():
    overlap = Overlap([sentence(*WORDS[:20])])
    assert overlap.found(", ".join(word.upper() for word in WORDS[:15]) + "!")


def test_a_short_text_is_found_only_whole():
    overlap = Overlap(["What is 2 + 2?"])
    assert overlap.found("what is  2 + 2")
    assert not overlap.found("What is 2 + 2 + 2?")


words = st.lists(st.sampled_from("abcdefgh"), max_size=30)


@given(words, words)
def test_it_is_what_the_definition_says(text, other):
    """Against a comparison of every run of one with every run of the other."""
    runs = [text[i : i + NGRAM_WORDS] for i in range(len(text) - NGRAM_WORDS + 1)]
    others = [other[i : i + NGRAM_WORDS] for i in range(len(other) - NGRAM_WORDS + 1)]
    expected = text == other or any(run in others for run in runs)
    assert Overlap([sentence(*other)]).found(sentence(*text)) is expected
