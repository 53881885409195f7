"""Verifiers by name: pure functions (answer text, reference answer) -> score in [0, 1]."""

from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator


def exact_match(answer: str, reference: str) -> float:
    """1.0 where the whole answer equals the reference, but for white space around either; else 0.0.

    Nothing else is forgiven: not case, not a full stop, not a sentence around the right word.
    """
    return float(answer.strip() == reference.strip())


def first_line_match(answer: str, reference: str) -> float:
    """`exact_match` of the answer's first line that is not blank.

    Talk on the lines after it is forgiven; talk before it, or on the same line, is not.
    """
    first_line = answer.strip().partition("\n")[0]
    return exact_match(first_line, reference)


VERIFIERS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "first_line_match": first_line_match,
}


def _known(name: str) -> str:
    if name not in VERIFIERS:
        raise ValueError(f"no such verifier: {name!r}; there are {', '.join(VERIFIERS)}")
    return name


VerifierName = Annotated[str, AfterValidator(_known)]
"""A key of VERIFIERS, checked when a config is loaded."""
