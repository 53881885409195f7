"""Verifiers by name: what an answer's text is worth beside the reference answer, in [0, 1].

`verify` takes many answers at once. All but one of the verifiers are pure functions (text,
reference) -> score in [0, 1], in VERIFIERS; `math` needs processes of its own (`math_answers`).
"""

from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

from pydantic import AfterValidator

from persyn_jax.config import ConfigError
from persyn_jax.evaluation import generated, instructions, math_answers


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
    "instructions": instructions.share_kept,
    "reasoning_gym": generated.own_score,
}
MATH = "math"
"""The name of the one that is no such function: math-verify's comparison."""


def _known(name: str) -> str:
    names = (*VERIFIERS, MATH)
    if name not in names:
        raise ValueError(f"no such verifier: {name!r}; there are {', '.join(names)}")
    return name


VerifierName = Annotated[str, AfterValidator(_known)]
"""A key of VERIFIERS, or `math`; checked when a config is loaded."""


class Case(NamedTuple):
    """An answer to verify."""

    verifier: str
    text: str
    reference: str


class Verified(NamedTuple):
    """Scores, and what stands behind some of the zeros among them."""

    scores: list[float]
    """One a case, in [0, 1]."""
    counts: dict[str, int]
    """Of `math`, if there was any: answers on which time or memory ran out (`math_stopped`), and
    those whose reference does not read as mathematics (`math_unreadable`). Both score 0."""


def verify(cases: Sequence[Case]) -> Verified:
    """The score of each case by its verifier, in order; equal cases are computed once."""
    distinct = list(dict.fromkeys(cases))
    of_math = [case for case in distinct if case.verifier == MATH]
    verdicts = math_answers.compare([(case.text, case.reference) for case in of_math])
    verdict_of = dict(zip(of_math, verdicts, strict=True))
    score_of = {case: float(verdict == "right") for case, verdict in verdict_of.items()}
    for case in distinct:
        if case.verifier != MATH:
            score_of[case] = VERIFIERS[case.verifier](case.text, case.reference)
    found = [verdict_of[case] for case in cases if case in verdict_of]
    counts = {f"math_{word}": found.count(word) for word in ("stopped", "unreadable") if found}
    return Verified([score_of[case] for case in cases], counts)


def check_reference(verifier: str, reference: str, where: str) -> None:
    """Raises ConfigError, naming `where`, if the verifier could not read the reference.

    That of `math` is not looked into: it would take longer than all the rest.
    """
    try:
        if verifier == "instructions":
            instructions.read_constraints(reference)
        elif verifier == "reasoning_gym":
            generated.check_reference(reference)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def one_answer(verifier: str, reference: str) -> str | None:
    """A right answer in words, if the reference holds one."""
    if verifier == "instructions":
        return None
    return generated.one_answer(reference) if verifier == "reasoning_gym" else reference
