"""Contamination: training prompts that repeat a prompt of an evaluation set."""

import re
from collections.abc import Iterable

from persyn_jax.evaluation.contents import normalise

NGRAM_WORDS = 13
"""Words in a row that two texts must share; GPT-3's choice (2005.14165, appendix C)."""


class Overlap:
    """Texts to keep clear of: `Overlap(texts).found(text)` tells whether `text` repeats one.

    It does if it has a run of NGRAM_WORDS words in common with one of them, or all of its words.
    Words are compared without letter case and punctuation.
    """

    def __init__(self, texts: Iterable[str]):
        self._whole: set[str] = set()
        self._ngrams: set[str] = set()
        for text in texts:
            words = _words(text)
            self._whole.add(" ".join(words))
            self._ngrams.update(_ngrams(words))

    def found(self, text: str) -> bool:
        words = _words(text)
        return " ".join(words) in self._whole or not self._ngrams.isdisjoint(_ngrams(words))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", normalise(text))


def _ngrams(words: list[str]) -> Iterable[str]:
    return (" ".join(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1))
