"""Stage score: the reward of every calibration answer, for this student."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from persyn_jax.models.weights import Model
from persyn_jax.pipeline.tokens import conversations
from persyn_jax.records import Answer, Prompt, Reward
from persyn_jax.routing.rewards import RewardConfig, make_rewards
from persyn_jax.sampling.scoring import mean_log_likelihoods


def score(
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    quality: Sequence[float | None],
    student: Model,
    config: RewardConfig,
    mesh: Mesh,
) -> list[Reward]:
    """One reward an answer: its quality, its learnability (PerSyn eq. 1), the total (eq. 2)."""
    usable = [index for index, answer in enumerate(answers) if answer.usable]
    rows = conversations(student.tokenizer, prompts, answers)
    learnability = np.full(len(answers), np.nan)
    learnability[usable] = mean_log_likelihoods(student, [rows[index] for index in usable], mesh)
    return make_rewards(
        answers,
        quality,
        learnability.tolist(),
        [len(row.response) for row in rows],
        config.alpha,
    )
