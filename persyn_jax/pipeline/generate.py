"""Stage generate: the routed teacher, and no other, answers each prompt.

Calibration answers are reused.
"""

from collections.abc import Sequence

from persyn_jax.pipeline.answers import Ask, Collected, OwnService, collect_answers
from persyn_jax.records import Answer, Example, Prompt, Route
from persyn_jax.sampling.config import ClientConfig, TeacherConfig
from persyn_jax.store import AnswerStore


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


def to_examples(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[Example]:
    """Training rows from the usable answers; empty and cut-off answers are never trained on."""
    prompt_of = {prompt.id: prompt for prompt in prompts}
    return [
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
    ]


def check_cost(
    prompts: Sequence[Prompt],
    teachers: int,
    calibration: Sequence[Answer],
    chosen: Sequence[Answer],
) -> int:
    """How many answers the run asked for: |X| + |X_cal| (|M| - 1), or RuntimeError is raised.

    X are the calibration and train prompts, X_cal the calibration prompts, M the teachers.
    """
    asked = {(answer.prompt_id, answer.teacher) for answer in (*calibration, *chosen)}
    in_calibration = sum(prompt.split == "calibration" for prompt in prompts)
    routed = sum(prompt.split != "eval" for prompt in prompts)
    needed = routed + in_calibration * (teachers - 1)
    if len(asked) != needed:
        raise RuntimeError(
            f"{len(asked)} answers were asked for; |X| + |X_cal| (|M| - 1) is {needed}"
        )
    return needed
