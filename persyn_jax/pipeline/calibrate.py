"""Stage calibrate: every teacher answers every calibration prompt."""

from collections.abc import Sequence

from persyn_jax.config import ConfigError
from persyn_jax.pipeline.answer_files import MATCHED_BY
from persyn_jax.pipeline.answers import Ask, Collected, OwnService, collect_answers
from persyn_jax.records import Answer, Prompt
from persyn_jax.sampling.config import ClientConfig, TeacherConfig
from persyn_jax.store import AnswerStore


def calibrate(
    prompts: Sequence[Prompt],
    teachers: Sequence[TeacherConfig],
    own_weights: str | None,
    store: AnswerStore,
    client: ClientConfig,
    own_service: OwnService,
) -> Collected:
    """All teachers' answers: prompt by prompt, within a prompt in the order of `teachers`.

    Raises ConfigError as `collect_answers`, and for a file of answers that has none of them.
    """
    asks = [
        Ask(prompt, teacher)
        for prompt in prompts
        if prompt.split == "calibration"
        for teacher in teachers
    ]
    found = collect_answers(asks, own_weights, store, client, own_service, "calibrate")
    for teacher in teachers:
        if teacher.answers is not None:
            own = [answer for answer in found.answers if answer.teacher == teacher.name]
            _check_file(teacher, own)
    return found


def _check_file(teacher: TeacherConfig, answers: Sequence[Answer]) -> None:
    if answers and all(answer.error for answer in answers):
        raise ConfigError(
            f"{teacher.answers}: answers none of the {len(answers)} calibration prompts: "
            f"{MATCHED_BY}"
        )
