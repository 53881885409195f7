"""Stage score: the reward of every calibration answer, for this student.

A model's forward passes over an answer are made once and kept in the answer store: another alpha,
normalisation or scope runs no model, another metric only the passes that are missing.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from persyn_jax.config import ConfigError, fingerprint
from persyn_jax.models import spec, weights
from persyn_jax.models.rows import Conversation
from persyn_jax.models.spec import ModelConfig
from persyn_jax.models.tokenizer import Tokenizer
from persyn_jax.models.weights import Model
from persyn_jax.pipeline.progress import progress, say
from persyn_jax.pipeline.tokens import conversations
from persyn_jax.provenance import source_fingerprint
from persyn_jax.records import Answer, Measurement, Prompt, Reward
from persyn_jax.routing.learnability import METRICS, MetricName, TokenScores, metrics
from persyn_jax.routing.rewards import RewardConfig, fill_unusable_by_prompt, rewards_at
from persyn_jax.sampling import scoring
from persyn_jax.store import AnswerStore

_WHOLE = {"log_likelihood_T", "rank_T"}  # columns of one pass
_LOCAL = {"local_T", "step_T"}
_COUNTS = {"rank_T", "step_T"}
_TOGETHER = 256
"""Answers that are measured, and then committed, together: what a kill loses at most."""


class Scorer(NamedTuple):
    """A model that answers are measured by: the student, or another that judges them."""

    fingerprint: str
    """Of all that decides the numbers: weights, tokenizer, chat template and the code."""
    tokenizer: Tokenizer
    load: Callable[[], Model]
    """Called only when something is to be measured."""


def scorer(model: ModelConfig, seed: int) -> Scorer:
    """seed: of random weights. Raises ConfigError as `weights.load`."""
    drawn = seed if spec.locate(model) is None else None
    code = source_fingerprint(scoring.__name__)
    return Scorer(
        fingerprint([spec.fingerprint(model), drawn, code]),
        weights.load_tokenizer(model),
        lambda: weights.load(model, seed),
    )


class Scored(NamedTuple):
    """Everything in the order of the answers."""

    measurements: list[Measurement]
    rewards: list[Reward]
    measured_answers: int
    """Usable answers that something was measured of now; equal ones count once."""
    reused_answers: int
    """Usable answers of which all was known before; equal ones count once."""


def score(
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    quality: Sequence[float | None],
    student: Scorer,
    store: AnswerStore,
    config: RewardConfig,
    mesh: Mesh,
) -> Scored:
    """One measurement and one reward an answer: its quality, its learnability by the config's
    metric (PerSyn eq. 1), the total (eq. 2).

    Raises ConfigError where the store has measured another text under an answer's key, ValueError
    where a log-probability is not finite.
    """
    rows = conversations(student.tokenizer, prompts, answers)
    asked = _asked(answers, rows)
    columns = METRICS[config.learnability].columns
    measured = _measure(asked, student, columns, store, mesh)
    found = _read_metrics(asked, student, columns, store)
    measurements = [
        Measurement(
            key=answer.key,
            prompt_id=answer.prompt_id,
            teacher=answer.teacher,
            usable=answer.usable,
            response_tokens=len(row.response),
            **dict.fromkeys(METRICS) | (found[answer.key] if answer.usable else {}),
        )
        for answer, row in zip(answers, rows, strict=True)
    ]
    rewards = rewards_at(measurements, quality, config)
    return Scored(measurements, rewards, measured, len(asked) - measured)


def likelihood_quality(
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    model: Scorer,
    store: AnswerStore,
    mesh: Mesh,
) -> list[float]:
    """A quality that needs no reference answers: the mean log-likelihood of a response token under
    `model`, one larger than the student, in nats; in the order of the answers.

    An unusable answer lies below its prompt's worst usable one: see `fill_unusable`.
    """
    asked = _asked(answers, conversations(model.tokenizer, prompts, answers))
    columns = METRICS["mean_log_likelihood"].columns
    _measure(asked, model, columns, store, mesh)
    found = _read_metrics(asked, model, columns, store)
    known = [
        found[answer.key]["mean_log_likelihood"] if answer.usable else np.nan for answer in answers
    ]
    return fill_unusable_by_prompt(answers, known).tolist()


class _Asked(NamedTuple):
    """A usable answer, and as the model reads it."""

    answer: Answer
    row: Conversation


def _asked(answers: Sequence[Answer], rows: Sequence[Conversation]) -> dict[str, _Asked]:
    """The usable answers by their keys, which equal prompts share."""
    both = zip(answers, rows, strict=True)
    return {answer.key: _Asked(answer, row) for answer, row in both if answer.usable}


def _measure(
    asked: Mapping[str, _Asked],
    model: Scorer,
    columns: Sequence[str],
    store: AnswerStore,
    mesh: Mesh,
) -> int:
    """Puts into the store what it lacks of `columns`, and returns of how many answers it lacked it.

    Says what that costs before it begins.
    """
    known = store.measured(asked, model.fingerprint)
    lacking = {key: frozenset(columns) - known.get(key, set()) for key in asked}
    by_lack: dict[frozenset[str], list[str]] = {}
    for key in sorted(asked, key=lambda key: asked[key].row.length):  # alike in a batch
        if lacking[key]:
            by_lack.setdefault(lacking[key], []).append(key)
    missing = sum(map(len, by_lack.values()))
    tokens = sum(
        _tokens(asked[key], lack, model.tokenizer) for lack, keys in by_lack.items() for key in keys
    )
    say(
        f"  score: {len(asked)} usable answers, {len(asked) - missing} known; {missing} to measure:"
        f" {tokens} tokens to read"
    )
    if not missing:
        return 0
    loaded = scoring.on_mesh(model.load(), mesh)
    with progress("score", missing) as advance:
        for lack, keys in by_lack.items():
            for start in range(0, len(keys), _TOGETHER):
                some = keys[start : start + _TOGETHER]
                found = _pass(loaded, [asked[key] for key in some], lack, mesh)
                for named in found:
                    TokenScores(**named)  # raises before what cannot be is committed
                store.put_measurements(model.fingerprint, dict(zip(some, found, strict=True)))
                advance(len(some))
    return missing


def _pass(
    model: Model, asked: Sequence[_Asked], columns: Set[str], mesh: Mesh
) -> list[dict[str, np.ndarray]]:
    """These columns of each answer: see `TokenScores`."""
    found: list[dict[str, np.ndarray]] = [{} for _ in asked]
    rows = [one.row for one in asked]
    if columns & _WHOLE:
        whole = scoring.score_tokens(model, rows, mesh, ranks="rank_T" in columns)
        for named, scores in zip(found, whole, strict=True):
            named |= {k: values_T for k, values_T in scores._asdict().items() if k in columns}
    if "unconditional_T" in columns:
        alone = [scoring.without_prompt(model.tokenizer, row) for row in rows]
        for named, scores in zip(found, scoring.score_tokens(model, alone, mesh), strict=True):
            named["unconditional_T"] = scores.log_likelihood_T
    if columns & _LOCAL:
        steps = [_steps(one, model.tokenizer) for one in asked]
        split = [scoring.in_steps(row, step_T) for row, step_T in zip(rows, steps, strict=True)]
        scored = iter(scoring.score_tokens(model, [step for one in split for step in one], mesh))
        for named, step_T, own in zip(found, steps, split, strict=True):
            local = [next(scored).log_likelihood_T for _ in own]
            named |= {"local_T": np.concatenate(local), "step_T": step_T}
    return found


def _tokens(one: _Asked, columns: Set[str], tok: Tokenizer) -> int:
    """How many tokens `_pass` reads for an answer."""
    tokens = 0
    if columns & _WHOLE:
        tokens += one.row.length
    if "unconditional_T" in columns:
        tokens += scoring.without_prompt(tok, one.row).length
    if columns & _LOCAL:
        tokens += sum(step.length for step in scoring.in_steps(one.row, _steps(one, tok)))
    return tokens


def _steps(one: _Asked, tok: Tokenizer) -> np.ndarray:
    answer = one.answer
    return scoring.response_steps(tok, answer.text, ended=answer.finish_reason == "stop")


def _read_metrics(
    asked: Mapping[str, _Asked], model: Scorer, columns: Sequence[str], store: AnswerStore
) -> dict[str, dict[MetricName, float]]:
    """Every metric of these columns, by answer key."""
    keys, found = list(asked), {}
    for start in range(0, len(keys), _TOGETHER):  # the columns of all answers may be large
        some = keys[start : start + _TOGETHER]
        stored = store.get_measurements(some, model.fingerprint, columns)
        found |= {key: metrics(_token_scores(asked[key], stored[key])) for key in some}
    return found


def _token_scores(one: _Asked, columns: dict[str, np.ndarray]) -> TokenScores:
    """The store has all numbers as float32."""
    tokens = {len(values_T) for values_T in columns.values()}
    if tokens != {len(one.row.response)}:
        raise ConfigError(
            f"answer {one.answer.key} to prompt {one.answer.prompt_id!r} has "
            f"{len(one.row.response)} tokens, and the answer store has measured {tokens}: "
            "two texts have one key"
        )
    counts = {name: columns[name].astype(np.int32) for name in _COUNTS & columns.keys()}
    return TokenScores(**columns | counts)
