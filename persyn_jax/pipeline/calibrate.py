"""Stage calibrate: every teacher answers every calibration prompt."""

from collections.abc import Sequence

from persyn_jax.pipeline.answers import Ask, Collected, OwnService, collect_answers
from persyn_jax.records import Prompt
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
    """All teachers' answers: prompt by prompt, within a prompt in the order of `teachers`."""
    asks = [
        Ask(prompt, teacher)
        for prompt in prompts
        if prompt.split == "calibration"
        for teacher in teachers
    ]
    return collect_answers(asks, own_weights, store, client, own_service, "calibrate")
