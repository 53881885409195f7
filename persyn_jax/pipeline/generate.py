"""Stage generate: the routed teacher, and no other, answers each prompt.

Calibration answers are reused.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TypeVar

from persyn_jax.pipeline.answers import Ask, Collected, OwnService, collect_answers
from persyn_jax.records import Answer, Example, Prompt, Route
from persyn_jax.sampling.config import ClientConfig, TeacherConfig
from persyn_jax.store import AnswerStore

Item = TypeVar("Item")
Each = TypeVar("Each", Route, Answer)

_CHUNK = 10_000


def generate(
    prompts: Sequence[Prompt],
    routes: Sequence[Route],
    teachers: Sequence[TeacherConfig],
    own_weights: str | None,
    store: AnswerStore,
    client: ClientConfig,
    own_service: OwnService,
) -> Collected:
    """The chosen teacher's answer to each routed prompt, in the order of `routes`."""
    prompt_of = {prompt.id: prompt for prompt in prompts}
    teacher_of = {teacher.name: teacher for teacher in teachers}
    asks = [Ask(prompt_of[route.prompt_id], teacher_of[route.teacher]) for route in routes]
    return collect_answers(asks, own_weights, store, client, own_service, "generate")


def in_chunks(routes: Iterable[Item], client: ClientConfig) -> Iterator[list[Item]]:
    """Routes that are asked for together: no more answers than these need be in memory.

    All of them, where the client has a budget, which is for the whole stage.
    """
    limited = client.budget_usd is not None or client.budget_tokens is not None
    rest = iter(routes)
    while chunk := list(islice(rest, None if limited else _CHUNK)):
        yield chunk


def beside(prompts: Iterable[Prompt], found: Iterable[Each]) -> Iterator[tuple[Prompt, Each]]:
    """Each route or answer with its prompt; both come in the same order.

    Raises RuntimeError where they do not.
    """
    for prompt, each in zip(prompts, found, strict=True):
        if prompt.id != each.prompt_id:
            raise RuntimeError(f"prompt {prompt.id!r} meets what belongs to {each.prompt_id!r}")
        yield prompt, each


def to_examples(prompts: Iterable[Prompt], answers: Iterable[Answer]) -> Iterator[Example]:
    """Training rows from the usable answers; empty and cut-off answers are never trained on.

    answers: one to each prompt, in the same order.
    """
    return (
        Example(
            id=prompt.id,
            messages=[*prompt.messages, {"role": "assistant", "content": answer.text}],
            teacher=answer.teacher,
            source=prompt.source,
            teacher_licence=answer.licence,
            source_licence=prompt.source_licence,
        )
        for prompt, answer in beside(prompts, answers)
        if answer.usable
    )


def check_cost(
    prompts: Iterable[Prompt],
    teachers: int,
    calibration: Iterable[Answer],
    chosen: Iterable[Answer],
) -> int:
    """How many answers the run asked for: |X| + |X_cal| (|M| - 1), or RuntimeError is raised.

    X are the calibration and train prompts, X_cal the calibration prompts, M the teachers.
    """
    asked: dict[str, set[str]] = {}  # prompt ids by teacher: a set of pairs takes twice the memory
    for answer in chain(calibration, chosen):
        asked.setdefault(answer.teacher, set()).add(answer.prompt_id)
    found = sum(map(len, asked.values()))
    split = Counter(prompt.split for prompt in prompts)
    needed = split.total() - split["eval"] + split["calibration"] * (teachers - 1)
    if found != needed:
        raise RuntimeError(f"{found} answers were asked for; |X| + |X_cal| (|M| - 1) is {needed}")
    return needed
