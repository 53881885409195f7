"""Stage generate: the routed teacher, and no other, answers each prompt.

Calibration answers are reused.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from persyn_jax.pipeline.answers import Ask, Collected, OwnService, collect_answers
from persyn_jax.records import Answer, Example, Prompt, Route
from persyn_jax.sampling.config import ClientConfig, TeacherConfig
from persyn_jax.store import AnswerStore

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


def in_chunks(routes: Sequence[Route], client: ClientConfig) -> Iterator[Sequence[Route]]:
    """Routes that are asked for together: no more answers than these need be in memory.

    All of them, where the client has a budget, which is for the whole stage.
    """
    limited = client.budget_usd is not None or client.budget_tokens is not None
    size = max(len(routes), 1) if limited else _CHUNK
    for start in range(0, len(routes), size):
        yield routes[start : start + size]


def to_examples(prompts: Sequence[Prompt], answers: Iterable[Answer]) -> Iterator[Example]:
    """Training rows from the usable answers; empty and cut-off answers are never trained on."""
    prompt_of = {prompt.id: prompt for prompt in prompts}
    return (
        Example(
            id=answer.prompt_id,
            messages=[
                *prompt_of[answer.prompt_id].messages,
                {"role": "assistant", "content": answer.text},
            ],
            teacher=answer.teacher,
            source=prompt_of[answer.prompt_id].source,
            teacher_licence=answer.licence,
            source_licence=prompt_of[answer.prompt_id].source_licence,
        )
        for answer in answers
        if answer.usable
    )


def check_cost(
    prompts: Sequence[Prompt],
    teachers: int,
    calibration: Iterable[Answer],
    chosen: Iterable[Answer],
) -> int:
    """How many answers the run asked for: |X| + |X_cal| (|M| - 1), or RuntimeError is raised.

    X are the calibration and train prompts, X_cal the calibration prompts, M the teachers.
    """
    asked = {(answer.prompt_id, answer.teacher) for answer in chain(calibration, chosen)}
    in_calibration = sum(prompt.split == "calibration" for prompt in prompts)
    routed = sum(prompt.split != "eval" for prompt in prompts)
    needed = routed + in_calibration * (teachers - 1)
    if len(asked) != needed:
        raise RuntimeError(
            f"{len(asked)} answers were asked for; |X| + |X_cal| (|M| - 1) is {needed}"
        )
    return needed
