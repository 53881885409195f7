"""The quality of answers, measured as the config's `quality` section says.

Higher is better. It is null where it is not known; the rewards then count it as average. An answer
that is unusable (empty, cut off, failed) is never asked about: a verifier's word on it is 0, and
where quality has no such floor it gets UNUSABLE_GAP below its prompt's worst usable answer.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from persyn_jax.config import ConfigError
from persyn_jax.evaluation.verifiers import Case, one_answer, verify
from persyn_jax.models.decoder import DecoderConfig
from persyn_jax.models.reward_model import conversation_ids, load_reward_model, rewards
from persyn_jax.models.spec import ModelConfig
from persyn_jax.models.weights import load_config
from persyn_jax.pipeline.answers import Ask, Collected
from persyn_jax.pipeline.config import (
    JudgeQuality,
    LikelihoodQuality,
    QualityConfig,
    RewardModelQuality,
    VerifierQuality,
)
from persyn_jax.pipeline.score import likelihood_quality, scorer
from persyn_jax.pipeline.tokens import conversations
from persyn_jax.records import Answer, Message, Prompt
from persyn_jax.routing.rewards import fill_unusable
from persyn_jax.sampling.scoring import pooled_states
from persyn_jax.store import AnswerStore


class Quality(NamedTuple):
    """The qualities of some answers."""

    values: list[float | None]
    """One an answer, in order."""
    counts: dict[str, int]
    """What a reader must know of them: answers whose quality is not known (`unknown`), and what
    the way of measuring counts (`evaluation.verifiers`; `judge_unreadable`)."""
    measured: dict[str, Any]
    """What asking a judge came to, as in `answers.Collected.summary`."""


def measure(
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    config: QualityConfig,
    store: AnswerStore,
    mesh: Mesh,
    seed: int,
    ask: Callable[[list[Ask]], Collected],
) -> Quality:
    """The quality of each answer.

    store: keeps what a larger model says of an answer. seed: of a model with random weights. ask:
    gets a judge's replies, stored or new.
    Raises ConfigError for a model that cannot be loaded, or with too short a context; and what
    `ask` raises.
    """
    prompt_of = {prompt.id: prompt for prompt in prompts}
    asked = [prompt_of[answer.prompt_id] for answer in answers]
    match config:
        case VerifierQuality():
            return by_verifier(asked, answers)
        case RewardModelQuality():
            return by_reward_model(asked, answers, config.model, mesh)
        case LikelihoodQuality():
            return by_likelihood(prompts, answers, config.model, store, mesh, seed)
        case JudgeQuality():
            return by_judge(asked, answers, config, ask)


def by_verifier(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Quality:
    """The score of each prompt's verifier, in [0, 1].

    0 if the answer is unusable; null, usable or not, if its prompt has no reference answer.
    `prompts` runs parallel to `answers`, here and below.
    """
    values: list[float | None] = [None if prompt.answer is None else 0.0 for prompt in prompts]
    rows = [row for row, value in enumerate(values) if value == 0.0 and answers[row].usable]
    verified = verify(
        [Case(prompts[row].verifier, answers[row].text, prompts[row].answer or "") for row in rows]
    )
    for row, score in zip(rows, verified.scores, strict=True):
        values[row] = score
    return _quality(values, verified.counts)


def by_reward_model(
    prompts: Sequence[Prompt], answers: Sequence[Answer], model: ModelConfig, mesh: Mesh
) -> Quality:
    """The scalar that a reward model makes of prompt and answer."""
    rows = [row for row, answer in enumerate(answers) if answer.usable]
    loaded = load_reward_model(model)
    tokens = [
        tuple(conversation_ids(loaded.backbone.tokenizer, _whole(prompts[row], answers[row])))
        for row in rows
    ]
    _check_room([len(read) for read in tokens], rows, answers, loaded.backbone.config)
    state_ND = pooled_states(loaded.backbone, tokens, mesh)
    return _unbounded(answers, rows, rewards(state_ND, loaded.head_D).tolist())


def by_likelihood(
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    model: ModelConfig,
    store: AnswerStore,
    mesh: Mesh,
    seed: int,
) -> Quality:
    """The mean log-likelihood of a response token under the model, in nats; `prompts` are all."""
    judge = scorer(model, seed)
    rows = [row for row, answer in enumerate(answers) if answer.usable]
    read = conversations(judge.tokenizer, prompts, [answers[row] for row in rows])
    _check_room([one.length for one in read], rows, answers, load_config(model))
    return _quality([*likelihood_quality(prompts, answers, judge, store, mesh)], {})


def by_judge(
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    config: JudgeQuality,
    ask: Callable[[list[Ask]], Collected],
) -> Quality:
    """The score that a judge gives; null where its reply holds none."""
    needs_reference = "{reference}" in config.template
    rows = [
        row
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        if answer.usable and not (needs_reference and _reference(prompt) is None)
    ]
    collected = ask(
        [Ask(judge_prompt(prompts[row], answers[row], config), config.judge) for row in rows]
    )
    scores = [read_score(reply, config) for reply in collected.answers]
    quality = _unbounded(answers, rows, scores)
    return quality._replace(
        counts=quality.counts | {"judge_unreadable": scores.count(None)},
        measured=collected.summary["measured"],
    )


def judge_prompt(prompt: Prompt, answer: Answer, config: JudgeQuality) -> Prompt:
    """What the judge is asked about an answer."""
    words = {
        "{question}": _question(prompt.messages),
        "{answer}": answer.text,
        "{reference}": _reference(prompt) or "",
    }
    # At once, so that an answer that spells a placeholder stays as it is.
    text = re.sub(
        "|".join(map(re.escape, words)), lambda found: words[found.group()], config.template
    )
    return dataclasses.replace(prompt, messages=[{"role": "user", "content": text}], answer=None)


def _question(messages: Sequence[Message]) -> str:
    """A single user message as it is, a longer conversation with its roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _reference(prompt: Prompt) -> str | None:
    return None if prompt.answer is None else one_answer(prompt.verifier, prompt.answer)


def read_score(reply: Answer, config: JudgeQuality) -> float | None:
    """The last score in a judge's reply; None if there is none on the scale, or it was cut off."""
    found = re.findall(config.pattern, reply.text) if reply.usable else []
    try:
        score = float(found[-1]) if found else None
    except ValueError:  # the pattern is the user's, and may match words
        return None
    return score if score is not None and config.lowest <= score <= config.highest else None


def _whole(prompt: Prompt, answer: Answer) -> list[Message]:
    return [*prompt.messages, {"role": "assistant", "content": answer.text}]


def _check_room(
    lengths: list[int], rows: list[int], answers: Sequence[Answer], config: DecoderConfig
) -> None:
    for length, row in zip(lengths, rows, strict=True):
        if length > config.max_positions:
            raise ConfigError(
                f"quality.model: context too long: prompt {answers[row].prompt_id!r} with the "
                f"answer of teacher {answers[row].teacher!r} has {length} tokens; the model reads "
                f"{config.max_positions}"
            )


def _unbounded(
    answers: Sequence[Answer], rows: list[int], scores: Sequence[float | None]
) -> Quality:
    """`scores` of the answers at `rows`; unusable ones below their prompt's worst, others null."""
    known = np.full(len(answers), np.nan)
    known[rows] = [np.nan if score is None else score for score in scores]
    rows_of: dict[str, list[int]] = {}
    for row, answer in enumerate(answers):
        rows_of.setdefault(answer.prompt_id, []).append(row)
    for members in rows_of.values():
        filled = fill_unusable(known[members], ~np.isnan(known[members]))
        unusable = np.array([not answers[row].usable for row in members])
        known[members] = np.where(unusable, filled, known[members])
    return _quality([None if np.isnan(value) else float(value) for value in known], {})


def _quality(values: list[float | None], counts: dict[str, int]) -> Quality:
    return Quality(values, {"unknown": values.count(None)} | counts, {})
