"""Stage score: the reward of every calibration answer, for this student."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from persyn_jax.evaluation.verifiers import VERIFIERS
from persyn_jax.models.weights import Model
from persyn_jax.pipeline.tokens import conversations
from persyn_jax.records import Answer, Prompt, Reward
from persyn_jax.routing.rewards import RewardConfig, make_rewards, measure_quality
from persyn_jax.sampling.scoring import mean_log_likelihoods


def score(
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    student: Model,
    config: RewardConfig,
    mesh: Mesh,
) -> list[Reward]:
    """One reward an answer: quality by verifier, learnability (PerSyn eq. 1), total (eq. 2)."""
    usable = [index for index, answer in enumerate(answers) if answer.usable]
    rows = conversations(student.tokenizer, prompts, answers)
    learnability = np.full(len(answers), np.nan)
    learnability[usable] = mean_log_likelihoods(student, [rows[index] for index in usable], mesh)
    return make_rewards(
        answers,
        measure_quality(prompts, answers, VERIFIERS),
        learnability.tolist(),
        [len(row.response) for row in rows],
        config.alpha,
    )
