"""Stage route: a strategy chooses one teacher for every prompt within limits, and what the answers
will cost is known before they are asked for."""

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from persyn_jax.pipeline.config import RoutingConfig
from persyn_jax.records import Answer, Prompt, Route
from persyn_jax.routing.optimal_cost import expected_usd, pareto_curve, thin
from persyn_jax.routing.selection import Limits, keep_limits, licence_gate, scores
from persyn_jax.routing.strategies import Asked, Calibration, score_by_source
from persyn_jax.sampling.config import TeacherConfig
from persyn_jax.sampling.spending import price

CURVE_POINTS = 6
DRAWN = ("random", "mix")
"""Strategies whose scores are drawn: no reward is expected of them."""
BY_FEATURE = ("knn", "clusters")
"""Strategies that compare the prompts' states."""
_CHUNK = 10_000  # prompts looked at together, so that what is computed on the way stays small


class Outline(NamedTuple):
    """All that routing looks at in the N prompts: not their text, which need not be in memory.

    Calibration prompts come first.
    """

    id_N: list[str]
    source_N: list[str]
    characters_N: np.ndarray
    """float64: of all messages together."""
    calibration: int
    """How many there are of them."""


class Expected(NamedTuple):
    """What is expected to be paid for each answer: nothing on calibration prompts, whose answers
    are there."""

    tokens_NM: np.ndarray
    """float64: of prompt and answer together."""
    usd_NM: np.ndarray | None
    """float64; None where the price of some teacher is not known."""


class Routed(NamedTuple):
    """The routes of the prompts, in their order, and what they come to."""

    routes: Iterator[Route]
    """Made as they are taken."""
    summary: dict[str, Any]


def outline(prompts: Iterable[Prompt]) -> Outline:
    """Raises ValueError where a calibration prompt follows another one."""
    ids, sources, characters, calibration = [], [], array("d"), 0
    for prompt in prompts:
        if prompt.split == "calibration":
            if calibration != len(ids):
                raise ValueError(f"calibration prompt {prompt.id!r} must come before the others")
            calibration += 1
        ids.append(prompt.id)
        sources.append(sys.intern(prompt.source))
        characters.append(sum(len(message["content"]) for message in prompt.messages))
    return Outline(ids, sources, np.array(characters), calibration)


def route(
    prompts: Outline,
    asked: Asked,
    seen: Calibration,
    expected: Expected,
    teachers: Sequence[TeacherConfig],
    config: RoutingConfig,
    seed: int,
) -> Routed:
    """One teacher for each prompt: that of the highest score of `config.strategy` (ties to the
    first), or another where a limit forbids it.

    asked, expected: of `prompts`, row by row. seen: of the calibration prompts that the router
    learnt from. All have the columns of `teachers`. Raises ConfigError as `selection.select`.

    The summary's keys are stable:

        routes, strategy
        moved            prompts that a limit took from the teacher which the strategy prefers
        by_teacher       teacher -> share of the routes; to_ask: answers still to be asked for;
                         expected_tokens and expected_usd of those, null if a price is not known
        expected_tokens, expected_usd    of all teachers
        pareto           null for the strategies in DRAWN, or if nobody is to be asked; else unit
                         (usd, or tokens if a price is not known) and points: budget, and
                         expected_reward, the most that it buys: the chosen teachers' mean score on
                         the prompts still to be asked, above that of a teacher drawn at random
    """
    names = [teacher.name for teacher in teachers]
    limits = make_limits(config, teachers, expected)
    score_NM = scores(config.strategy, seen, asked, names, config, limits.allowed_M, seed)
    chosen_N = keep_limits(score_NM, seen, limits)
    summary = {
        "routes": len(prompts.id_N),
        "strategy": config.strategy,
        "moved": int((chosen_N != score_NM.argmax(axis=1)).sum()),
        **_cost(prompts, chosen_N, expected, names),
        "pareto": _pareto(config, prompts, score_NM, expected),
    }
    assert asked.coefficient_NM is not None
    return Routed(make_routes(prompts.id_N, asked.coefficient_NM, chosen_N, names), summary)


def make_routes(
    prompt_ids: Sequence[str],
    coefficient_NM: np.ndarray,
    chosen_N: np.ndarray,
    teachers: Sequence[str],
) -> Iterator[Route]:
    """The records: the router's coefficients on each prompt, whatever the strategy, and the index
    of the teacher that was chosen."""
    for rows in _chunks(len(prompt_ids)):
        top_N2 = -np.sort(-coefficient_NM[rows], axis=1)[:, :2]
        margin_N = top_N2[:, 0] - top_N2[:, 1]
        columns = coefficient_NM[rows].tolist(), chosen_N[rows].tolist(), margin_N.tolist()
        for prompt_id, coefficients, chosen, margin in zip(prompt_ids[rows], *columns, strict=True):
            yield Route(prompt_id, coefficients, teachers[chosen], margin)


def _chunks(prompts: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, prompts, _CHUNK))


def make_limits(
    config: RoutingConfig, teachers: Sequence[TeacherConfig], expected: Expected
) -> Limits:
    """The config's limits for `selection`. Raises ConfigError where all licences are refused."""
    share_M = np.array([config.most_share.get(teacher.name, 1.0) for teacher in teachers])
    in_usd = config.budget_usd is not None
    return Limits(
        allowed_M=licence_gate([t.licence for t in teachers], config.refuse_licences),
        least_margin=config.least_margin,
        most_share_M=share_M if config.most_share else None,
        budget=config.budget_usd if in_usd else config.budget_tokens,
        cost_NM=expected.usd_NM if in_usd else expected.tokens_NM,
    )


def expect_cost(
    prompts: Outline, answers: Iterable[Answer], teachers: Sequence[TeacherConfig]
) -> Expected:
    """By what the calibration answers took: of a prompt, with all that a teacher puts before it,
    the tokens of the straight line through tokens over characters; of an answer, the mean length
    of that teacher's on the same source.

    answers: of every teacher to every calibration prompt among `prompts`.
    """
    paid = prompts.calibration
    row_of = {prompt_id: row for row, prompt_id in enumerate(prompts.id_N[:paid])}
    column_of = {teacher.name: column for column, teacher in enumerate(teachers)}
    prompt_NM, answer_NM = np.zeros((2, len(row_of), len(column_of)))
    for answer in answers:
        cell = row_of[answer.prompt_id], column_of[answer.teacher]
        prompt_NM[cell], answer_NM[cell] = answer.prompt_tokens, answer.completion_tokens
    seen = Calibration(answer_NM, prompts.source_N[:paid], np.empty(0))
    tokens_NM = np.zeros((len(prompts.id_N), len(column_of)))
    known = all(price(teacher, 0, 0) is not None for teacher in teachers)
    usd_NM = np.zeros_like(tokens_NM) if known else None
    for rows in _chunks(len(prompts.id_N)):
        read_NM = _on_a_line(prompts.characters_N[:paid], prompt_NM, prompts.characters_N[rows])
        answered_NM = score_by_source(seen, prompts.source_N[rows])
        tokens_NM[rows] = read_NM + answered_NM
        if usd_NM is not None:
            usd_NM[rows] = expected_usd(
                read_NM,
                answered_NM,
                [price(teacher, 10**6, 0) for teacher in teachers],
                [price(teacher, 0, 10**6) for teacher in teachers],
                list(column_of),
            )
    for cost_NM in (tokens_NM, usd_NM):
        if cost_NM is not None:
            cost_NM[:paid] = 0
    return Expected(tokens_NM, usd_NM)


def _on_a_line(seen_N: np.ndarray, value_NM: np.ndarray, asked_N: np.ndarray) -> np.ndarray:
    """Least squares, one line a column; the mean where all seen are equal. Never below 0."""
    centred_N = seen_N - seen_N.mean()
    spread = (centred_N**2).sum()
    slope_M = centred_N @ value_NM / spread if spread else np.zeros(value_NM.shape[1])
    line_NM = value_NM.mean(axis=0) + np.multiply.outer(asked_N - seen_N.mean(), slope_M)
    return np.maximum(line_NM, 0)


def _cost(
    prompts: Outline, chosen_N: np.ndarray, expected: Expected, names: list[str]
) -> dict[str, Any]:
    share_M = np.bincount(chosen_N, minlength=len(names)) / len(chosen_N)
    to_ask_M = np.bincount(chosen_N[prompts.calibration :], minlength=len(names))
    tokens_M = _by_teacher(expected.tokens_NM, chosen_N)
    usd_M = None if expected.usd_NM is None else _by_teacher(expected.usd_NM, chosen_N)
    return {
        "by_teacher": {
            name: {
                "share": float(share_M[column]),
                "to_ask": int(to_ask_M[column]),
                "expected_tokens": float(tokens_M[column]),
                "expected_usd": None if usd_M is None else float(usd_M[column]),
            }
            for column, name in enumerate(names)
        },
        "expected_tokens": float(tokens_M.sum()),
        "expected_usd": None if usd_M is None else float(usd_M.sum()),
    }


def _by_teacher(cost_NM: np.ndarray, chosen_N: np.ndarray) -> np.ndarray:
    """float64[M]: of the answers that each teacher is to give."""
    paid_N = cost_NM[np.arange(len(chosen_N)), chosen_N]
    return np.bincount(chosen_N, weights=paid_N, minlength=cost_NM.shape[1])


def _pareto(
    config: RoutingConfig, prompts: Outline, score_NM: np.ndarray, expected: Expected
) -> dict[str, Any] | None:
    if config.strategy in DRAWN or prompts.calibration == len(score_NM):
        return None
    cost_NM = expected.tokens_NM if expected.usd_NM is None else expected.usd_NM
    open_NM = score_NM[prompts.calibration :]
    drawn = np.mean(open_NM, axis=1, where=open_NM > -np.inf).sum()
    points = thin(pareto_curve(open_NM, cost_NM[prompts.calibration :]), CURVE_POINTS)
    return {
        "unit": "tokens" if expected.usd_NM is None else "usd",
        "points": [
            {
                "budget": point["cost"],
                "expected_reward": float((point["reward"] - drawn) / len(open_NM)),
            }
            for point in points
        ],
    }


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The summary as a person reads it, before anything is spent."""
    moved = f", {summary['moved']} moved by limits" if summary["moved"] else ""
    width = max(map(len, ("teacher", *summary["by_teacher"])))
    lines = [
        f"  strategy {summary['strategy']}: {summary['routes']} prompts{moved}; expected of those "
        "still to be asked:",
        f"  {'teacher':<{width}}  share  to ask      tokens  US dollars",
    ]
    lines += [
        f"  {name:<{width}}  {row['share']:5.2f}{row['to_ask']:8,}{row['expected_tokens']:12,.0f}"
        f"  {_usd(row['expected_usd']):>10}"
        for name, row in summary["by_teacher"].items()
    ]
    to_ask = sum(row["to_ask"] for row in summary["by_teacher"].values())
    lines.append(
        f"  {'all':<{width}}  {1:5.2f}{to_ask:8,}{summary['expected_tokens']:12,.0f}"
        f"  {_usd(summary['expected_usd']):>10}"
    )
    if (pareto := summary["pareto"]) is not None:
        as_text = _usd if pareto["unit"] == "usd" else "{:,.0f}".format
        lines.append("  budget and the mean score that it buys, above a teacher drawn at random:")
        lines += [
            f"  {as_text(point['budget']):>12} {pareto['unit']}  {point['expected_reward']:+.3f}"
            for point in pareto["points"]
        ]
    return lines


def _usd(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
