"""What the page shows row by row: chosen answers, disagreements, stages."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

from persyn_jax.records import Answer, Prompt, Reward
from persyn_jax.reporting.run_records import RunRecords

T = TypeVar("T")

ROWS_TO_READ = 20
ASKED = ("answers", "failed", "requests", "retries", "prompt_tokens", "completion_tokens", "usd")
"""What `stages.<stage>.asked.<teacher>` counts."""


@dataclass(frozen=True)
class ReadingRow:
    """One prompt with all that the run made of it."""

    prompt: Prompt
    answer: Answer
    coefficients: dict[str, float]
    """By teacher."""
    rewards: dict[str, Reward]
    """By teacher; empty for a prompt that only the chosen teacher answered."""


@dataclass(frozen=True)
class Choice:
    """A teacher that was, or should have been, asked, and what its answer is worth."""

    who: str
    """`router` or `oracle`."""
    answer: Answer
    reward: Reward
    coefficient: float


@dataclass(frozen=True)
class DisagreementRow:
    """A held-out prompt on which router and oracle disagree."""

    prompt: Prompt
    loss: float
    choices: list[Choice]
    """The router's, then the oracle's."""


@dataclass(frozen=True)
class StageRow:
    """What a stage took. What it asked nobody for is None."""

    name: str
    seconds: float
    share: float
    """Of the time of all stages."""
    peak_memory_gb: float | None
    answers: int | None
    failed: int | None
    requests: int | None
    retries: int | None
    prompt_tokens: int | None
    completion_tokens: int | None
    usd: float | None
    """None, too, where any price is unknown."""


def choose_rows(records: RunRecords) -> list[ReadingRow]:
    """Twenty chosen answers to read, in turn over sources, then splits, then teachers."""
    prompt_of = {prompt.id: prompt for prompt in records.prompts}
    route_of = {route.prompt_id: route for route in records.routes}
    groups: dict[str, dict[str, dict[str, list[Answer]]]] = {}
    for answer in records.chosen_answers:
        prompt = prompt_of[answer.prompt_id]
        splits = groups.setdefault(prompt.source, {})
        splits.setdefault(prompt.split, {}).setdefault(answer.teacher, []).append(answer)
    in_turn = _in_turn(
        _in_turn(_in_turn(teachers.values()) for teachers in splits.values())
        for splits in groups.values()
    )
    rows = []
    for answer in in_turn[:ROWS_TO_READ]:
        route = route_of.get(answer.prompt_id)
        rewards = [reward for reward in records.rewards if reward.prompt_id == answer.prompt_id]
        rows.append(
            ReadingRow(
                prompt=prompt_of[answer.prompt_id],
                answer=answer,
                coefficients=dict(zip(records.teachers, route.coefficients, strict=True))
                if route
                else {},
                rewards={reward.teacher: reward for reward in rewards},
            )
        )
    return rows


def choose_disagreements(records: RunRecords, report: dict[str, Any]) -> list[DisagreementRow]:
    """The report's largest losses, with prompt, answers and rewards."""
    prompt_of = {prompt.id: prompt for prompt in records.prompts}
    route_of = {route.prompt_id: route for route in records.routes}
    answer_of = {(a.prompt_id, a.teacher): a for a in records.calibration_answers}
    reward_of = {(r.prompt_id, r.teacher): r for r in records.rewards}
    column_of = {teacher: column for column, teacher in enumerate(records.teachers)}

    def choice(who: str, prompt_id: str, teacher: str) -> Choice:
        return Choice(
            who=who,
            answer=answer_of[prompt_id, teacher],
            reward=reward_of[prompt_id, teacher],
            coefficient=route_of[prompt_id].coefficients[column_of[teacher]],
        )

    return [
        DisagreementRow(
            prompt=prompt_of[loss["prompt_id"]],
            loss=loss["loss"],
            choices=[choice(who, loss["prompt_id"], loss[who]) for who in ("router", "oracle")],
        )
        for loss in report["router"]["largest_losses"]
    ]


def stage_rows(stages: dict[str, dict[str, Any]]) -> list[StageRow]:
    """One row a stage: what was asked of all teachers, or judges, added up."""
    seconds = sum(stage["seconds"] for stage in stages.values())
    return [
        StageRow(
            name=name.replace("_", " "),
            seconds=stage["seconds"],
            share=stage["seconds"] / seconds if seconds else 0.0,
            peak_memory_gb=stage.get("peak_memory_gb"),
            **{key: _in_all(stage.get("asked", {}), key) for key in ASKED},
        )
        for name, stage in stages.items()
    ]


def _in_all(asked: dict[str, dict[str, Any]], key: str) -> Any:
    values = [counts[key] for counts in asked.values()]
    return None if not values or None in values else sum(values)


def _in_turn(lists: Iterable[Iterable[T]]) -> list[T]:
    """The first of each list, then the second of each, and so on."""
    missing: Any = object()
    return [
        item
        for turn in zip_longest(*lists, fillvalue=missing)
        for item in turn
        if item is not missing
    ]
