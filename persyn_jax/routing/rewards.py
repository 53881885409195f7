"""Rewards of answers: quality and learnability, standardised and combined (PerSyn eq. 1 and 2).

PerSyn does not say how terms are standardised: here by the z-score within each prompt, if nothing
else is asked for.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from persyn_jax.config import config_class
from persyn_jax.records import Answer, Measurement, Reward
from persyn_jax.routing.learnability import MetricName, higher_is_better
from persyn_jax.routing.normalisation import Normalisation, Scope, normalise

UNUSABLE_GAP = 1.0
"""By how much an unusable answer's learnability lies below its prompt's worst usable one: as it is,
in nats a token or whatever the metric is in, and standardised."""


@config_class
class RewardConfig:
    """How quality and learnability are measured and combined."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Weight of learnability; quality has 1 - alpha. 0.4 is the paper's."""
    learnability: MetricName = "mean_log_likelihood"
    """The metric of learnability: mean_log_likelihood (the paper's), grape, rsr, ifd or
    local_naturalness; see `routing.learnability`. Of rsr and ifd, of which less is better, the
    negative is taken."""
    normalisation: Normalisation = "z_score"
    """How quality and learnability are made comparable: z_score, min_max or rank."""
    scope: Scope = "prompt"
    """Among which answers: those to the same prompt (prompt) or all (set)."""


ALPHAS = tuple(step / 10 for step in range(11))
"""Of a sweep: from quality alone to learnability alone."""


def combine(
    quality_standardised: ArrayLike, learnability_standardised: ArrayLike, alpha: float
) -> np.ndarray:
    """The total (PerSyn eq. 2): (1 - alpha) * quality + alpha * learnability, both standardised."""
    quality, learnability = np.asarray(quality_standardised), np.asarray(learnability_standardised)
    return (1 - alpha) * quality + alpha * learnability


def rewards_at(
    measurements: Sequence[Measurement],
    quality: Sequence[float | None],
    config: RewardConfig,
) -> list[Reward]:
    """One reward a measurement, in the same order. Runs no model: sweep alpha with it.

    quality: as in `make_rewards`, parallel to `measurements`; what a `Reward` holds will do.
    Raises ValueError where the config's metric was not measured for a usable answer.
    """
    learnability = []
    for measurement in measurements:
        value = getattr(measurement, config.learnability)
        if measurement.usable and value is None:
            raise ValueError(
                f"prompt {measurement.prompt_id!r}, teacher {measurement.teacher!r}: "
                f"{config.learnability} was not measured"
            )
        learnability.append(
            np.nan if value is None else higher_is_better(config.learnability, value)
        )
    return make_rewards(
        measurements,
        quality,
        learnability,
        [measurement.response_tokens for measurement in measurements],
        config.alpha,
        config.normalisation,
        config.scope,
    )


def make_rewards(
    answers: Sequence[Answer] | Sequence[Measurement],
    quality: Sequence[float | None],
    learnability: Sequence[float],
    response_tokens: Sequence[int],
    alpha: float,
    normalisation: Normalisation = "z_score",
    scope: Scope = "prompt",
) -> list[Reward]:
    """One reward an answer, in the order of `answers`; the other sequences run parallel to it.

    quality: any measure of which higher is better and that puts no
        unusable answer above a usable one; None where it is not known.
    learnability: a metric of `learnability` of which higher is better (`higher_is_better`): in
        PerSyn the mean log-likelihood of a response token under the student, in nats (eq. 1). What
        stands there for an unusable answer does not count (NaN will do): see `fill_unusable`.
    response_tokens: |y|, EOS included if it was generated.
    alpha: weight of learnability (eq. 2), in [0, 1].
    normalisation, scope: how both terms are standardised, and among which answers; learnability
        among the usable ones of these.

    Raises ValueError where a usable answer's learnability is not finite.
    """
    prompt_ids = [answer.prompt_id for answer in answers]
    filled = fill_unusable_by_prompt(answers, learnability)
    known_quality = [np.nan if value is None else value for value in quality]
    quality_standardised = normalise(known_quality, prompt_ids, normalisation, scope)
    learnability_standardised = _standardised_learnability(
        answers, filled, prompt_ids, normalisation, scope
    )
    total = combine(quality_standardised, learnability_standardised, alpha)
    return [
        Reward(
            key=answer.key,
            prompt_id=answer.prompt_id,
            teacher=answer.teacher,
            usable=answer.usable,
            quality=quality[row],
            learnability=float(filled[row]),
            response_tokens=response_tokens[row],
            quality_standardised=float(quality_standardised[row]),
            learnability_standardised=float(learnability_standardised[row]),
            total=float(total[row]),
        )
        for row, answer in enumerate(answers)
    ]


def _standardised_learnability(
    answers: Sequence[Answer] | Sequence[Measurement],
    filled_A: np.ndarray,
    prompt_ids: Sequence[str],
    normalisation: Normalisation,
    scope: Scope,
) -> np.ndarray:
    """Usable answers among themselves, then the others below them: one answer that was cut off must
    not make the usable ones look alike."""
    usable_A = np.array([answer.usable for answer in answers], bool)
    standardised_A = normalise(
        np.where(usable_A, filled_A, np.nan), prompt_ids, normalisation, scope
    )
    for rows in _rows_of(prompt_ids).values():
        if usable_A[rows].any():
            standardised_A[rows] = fill_unusable(standardised_A[rows], usable_A[rows])
    return standardised_A


def _rows_of(prompt_ids: Sequence[str]) -> dict[str, list[int]]:
    rows_of: dict[str, list[int]] = {}
    for row, prompt_id in enumerate(prompt_ids):
        rows_of.setdefault(prompt_id, []).append(row)
    return rows_of


def fill_unusable_by_prompt(
    answers: Sequence[Answer] | Sequence[Measurement], learnability: Sequence[float]
) -> np.ndarray:
    """`fill_unusable` within each prompt, float64, in the order of `answers`.

    Raises ValueError where a usable answer's learnability is not finite.
    """
    rows_of = _rows_of([answer.prompt_id for answer in answers])
    filled = np.array(learnability, dtype=np.float64)
    for prompt_id, rows in rows_of.items():
        filled[rows] = fill_unusable(filled[rows], [answers[row].usable for row in rows])
        if not np.isfinite(filled[rows]).all():
            raise ValueError(
                f"prompt {prompt_id!r}: the learnability of a usable answer must be finite, "
                f"got {filled[rows].tolist()}"
            )
    return filled


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
