"""Rewards of answers: quality and learnability, standardised and combined (PerSyn eq. 1 and 2)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from persyn_jax.config import config_class
from persyn_jax.records import Answer, Prompt, Reward

UNUSABLE_GAP = 1.0
"""Nats a token by which an unusable answer's learnability lies below its prompt's worst usable."""


@config_class
class RewardConfig:
    """How quality and learnability are combined."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Weight of learnability; quality has 1 - alpha. 0.4 is the paper's."""


def measure_quality(
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    verifiers: Mapping[str, Callable[[str, str], float]],
) -> list[float | None]:
    """The verifier's score of each answer, in [0, 1].

    0 if the answer is unusable; None, usable or not, if its prompt has no reference answer.
    """
    prompt_of = {prompt.id: prompt for prompt in prompts}
    return [_quality(prompt_of[answer.prompt_id], answer, verifiers) for answer in answers]


def _quality(
    prompt: Prompt, answer: Answer, verifiers: Mapping[str, Callable[[str, str], float]]
) -> float | None:
    if prompt.answer is None:
        return None
    if not answer.usable:
        return 0.0
    return verifiers[prompt.verifier](answer.text, prompt.answer)


def standardise_within_prompt(values_M: ArrayLike) -> np.ndarray:
    """The z-scores of one prompt's M values, by the population standard deviation.

    All are exactly 0 where the values are equal. NaN stands for a value that is not known: it
    becomes 0, the mean, and the others are standardised without it.
    """
    values_M = np.asarray(values_M, dtype=np.float64)
    standardised_M = np.zeros_like(values_M)
    known_M = ~np.isnan(values_M)
    known = values_M[known_M]
    if known.size and known.max() > known.min():
        # Scaling to [0, 1] changes no z-score and keeps nearly equal values from dividing by 0.
        scaled = (known - known.min()) / (known.max() - known.min())
        standardised_M[known_M] = (scaled - scaled.mean()) / scaled.std()
    return standardised_M


def combine(
    quality_standardised: ArrayLike, learnability_standardised: ArrayLike, alpha: float
) -> np.ndarray:
    """The total (PerSyn eq. 2): (1 - alpha) * quality + alpha * learnability, both standardised."""
    quality, learnability = np.asarray(quality_standardised), np.asarray(learnability_standardised)
    return (1 - alpha) * quality + alpha * learnability


def make_rewards(
    answers: Sequence[Answer],
    quality: Sequence[float | None],
    learnability: Sequence[float],
    response_tokens: Sequence[int],
    alpha: float,
) -> list[Reward]:
    """One reward an answer, in the order of `answers`; the other sequences run parallel to it.

    quality: from `measure_quality`, or any other measure in [0, 1]; None where it is not known.
    learnability: mean log-likelihood of a response token under the student, in nats (eq. 1). What
        stands there for an unusable answer does not count (NaN will do): see `fill_unusable`.
    response_tokens: |y|, EOS included if it was generated.
    alpha: weight of learnability (eq. 2), in [0, 1].

    Both terms are standardised over all answers of the same prompt. Raises ValueError where a
    usable answer's learnability is not finite.
    """
    rows_of_prompt: dict[str, list[int]] = {}
    for row, answer in enumerate(answers):
        rows_of_prompt.setdefault(answer.prompt_id, []).append(row)

    reward_of_row: dict[int, Reward] = {}
    for rows in rows_of_prompt.values():
        rewards_M = _rewards_of_prompt(
            [answers[row] for row in rows],
            [quality[row] for row in rows],
            [learnability[row] for row in rows],
            [response_tokens[row] for row in rows],
            alpha,
        )
        reward_of_row.update(zip(rows, rewards_M, strict=True))
    return [reward_of_row[row] for row in range(len(answers))]


def _rewards_of_prompt(
    answers_M: list[Answer],
    quality_M: list[float | None],
    learnability_M: list[float],
    response_tokens_M: list[int],
    alpha: float,
) -> list[Reward]:
    learnabilities_M = fill_unusable(learnability_M, [answer.usable for answer in answers_M])
    if not np.isfinite(learnabilities_M).all():
        raise ValueError(
            f"prompt {answers_M[0].prompt_id!r}: the learnability of a usable answer must be "
            f"finite, got {learnabilities_M.tolist()}"
        )
    z_quality_M = standardise_within_prompt([np.nan if q is None else q for q in quality_M])
    z_learnability_M = standardise_within_prompt(learnabilities_M)
    total_M = combine(z_quality_M, z_learnability_M, alpha)
    return [
        Reward(
            key=answer.key,
            prompt_id=answer.prompt_id,
            teacher=answer.teacher,
            usable=answer.usable,
            quality=quality_M[m],
            learnability=float(learnabilities_M[m]),
            response_tokens=response_tokens_M[m],
            quality_standardised=float(z_quality_M[m]),
            learnability_standardised=float(z_learnability_M[m]),
            total=float(total_M[m]),
        )
        for m, answer in enumerate(answers_M)
    ]


def fill_unusable(learnability_M: ArrayLike, usable_M: ArrayLike) -> np.ndarray:
    """One prompt's learnabilities, with UNUSABLE_GAP below the worst usable for every unusable one.

    (-UNUSABLE_GAP where none is usable.) An empty answer has no likelihood and a cut-off one may be
    easy to learn, yet neither may win: with quality 0 and this learnability, the total of an
    unusable answer lies below that of every usable one. Only alpha = 0, which looks at quality
    alone, lets it tie with a wrong answer.
    """
    learnability_M = np.asarray(learnability_M, dtype=np.float64)
    usable_M = np.asarray(usable_M, dtype=bool)
    worst = min(learnability_M[usable_M], default=0.0)
    return np.where(usable_M, learnability_M, worst - UNUSABLE_GAP)
