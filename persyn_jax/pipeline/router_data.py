"""Preferences and scores of others as router data: prompts and rewards that `train_router` reads.

No student is scored: learnability is NaN, and the total is the score standardised within its prompt
(PerSyn's eq. 2 with alpha = 0).

    p2l             rows of lmarena/p2l's data sets: `prompt` (a text, or the user's turns),
                    `model_a`, `model_b`, and `labels`: indices of winner and loser in the sorted
                    list of all models of the data set, then, if there is a third, 1 for a tie, 2
                    for a tie of two bad answers (p2l/dataset.py and p2l/model.py at a905fa5)
    routerbench     wide rows of withmartian/routerbench: `sample_id`, `prompt` (a text, or a list
                    of texts), `eval_name`, and for each model M its score in [0, 1] as `M`, its
                    cost as `M|total_cost`, its answer as `M|model_response`. What is published is
                    a pickle, which runs whatever it holds when it is read: turn it into Parquet
                    elsewhere first
    llmrouterbench  results of LLMRouterBench (OpenRouterBench), one JSON file a data set and model:
                    `records` with `index`, `origin_query`, `prompt`, `score`; beside them
                    `model_name`, `dataset_name`, or else both as folders of the file's path,
                    DATASET/SPLIT/MODEL/FILE.json (data_collector/storage.py at 46d48d4)
"""

import ast
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from persyn_jax import store
from persyn_jax.config import ConfigError, fingerprint
from persyn_jax.evaluation.contents import user_content
from persyn_jax.evaluation.rows import Row
from persyn_jax.pipeline.parallel_answers import read_rows
from persyn_jax.pipeline.run_files import PROMPTS, REWARDS
from persyn_jax.records import Message, Prompt, Reward
from persyn_jax.routing.normalisation import normalise

_COST = "|total_cost"


class Scored(NamedTuple):
    """How well one teacher did on one prompt; a vote between two makes two of these."""

    source: str
    turns: tuple[str, ...]
    """What the user says."""
    teacher: str
    score: float
    """In [0, 1]; of a vote 1 for the winner, 0 for the loser and two bad answers, 0.5 for a tie."""


def read_p2l(paths: Sequence[Path]) -> Iterator[Scored]:
    """Raises ConfigError, naming the row: a field that is missing, labels of other models."""
    rows = [(row, *_vote(row)) for row in read_rows(paths)]
    models = sorted({model for _, _, pair, _ in rows for model in pair})
    for row, turns, pair, labels in rows:
        if not all(0 <= label < len(models) for label in labels[:2]) or {
            models[label] for label in labels[:2]
        } != set(pair):
            raise ConfigError(
                f"{row.where}: labels {labels}: not the places of {' and '.join(pair)} in the "
                f"sorted list of the {len(models)} models met; give all files of the data set at "
                "once"
            )
        tie = labels[2] if len(labels) > 2 else 0
        for label, score in zip(labels[:2], _SCORES_OF_VOTE[tie], strict=True):
            yield Scored("p2l", turns, models[label], score)


_SCORES_OF_VOTE = {0: (1.0, 0.0), 1: (0.5, 0.5), 2: (0.0, 0.0)}


def _vote(row: Row) -> tuple[tuple[str, ...], tuple[str, str], list[int]]:
    """(the user's turns, the two models, labels) of a row."""
    values = row.values
    pair, labels = (values.get("model_a"), values.get("model_b")), values.get("labels")
    if not all(isinstance(model, str) for model in pair):
        raise ConfigError(f"{row.where}: model_a and model_b must be texts")
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise ConfigError(f"{row.where}: labels must be a list of whole numbers, got {labels!r}")
    if len(labels) < 2 or (len(labels) > 2 and labels[2] not in _SCORES_OF_VOTE):
        raise ConfigError(f"{row.where}: labels {labels}: must be winner, loser and 0, 1 or 2")
    return _turns(row.where, values.get("prompt")), pair, labels  # pyrefly: ignore


def read_routerbench(paths: Sequence[Path]) -> Iterator[Scored]:
    """Raises ConfigError, naming the row: no prompt, no model with a cost beside its score."""
    for row in read_rows(paths):
        models = [key.removesuffix(_COST) for key in row.values if key.endswith(_COST)]
        if not models:
            raise ConfigError(f"{row.where}: has no column that ends in {_COST}")
        prompt = row.values.get("prompt")
        if isinstance(prompt, str) and prompt.startswith("["):
            prompt = _literal(prompt)
        turns = _turns(row.where, prompt)
        source = str(row.values.get("eval_name") or "routerbench")
        for model in models:
            score = row.values.get(model)
            if score is not None and not math.isnan(score):
                yield Scored(source, ("\n\n".join(turns),), model, float(score))


def _literal(prompt: str) -> Any:
    """The list that a text writes out in Python's way, as some copies have it; else the text."""
    try:
        value = ast.literal_eval(prompt)
    except (ValueError, SyntaxError):
        return prompt
    return value if isinstance(value, list) else prompt


def read_llmrouterbench(paths: Sequence[Path]) -> Iterator[Scored]:
    """Trial results (`demo`) are left aside. Raises ConfigError, naming the file: no records, no
    name of a model, a record without prompt or score."""
    for path in paths:
        result = store.read_json(path)
        if not isinstance(result, dict) or not isinstance(result.get("records"), list):
            raise ConfigError(f"{path}: must hold an object with a list of `records`")
        if result.get("demo"):
            continue
        folders = path.absolute().parent.parts
        model = result.get("model_name") or folders[-1]
        source = result.get("dataset_name") or (folders[-3] if len(folders) > 3 else "")
        for record in result["records"]:
            where = f"{path}: record {record.get('index')}"
            turns = _turns(where, record.get("origin_query") or record.get("prompt"))
            if (score := record.get("score")) is not None:  # null: could not be graded
                if not isinstance(score, int | float):
                    raise ConfigError(f"{where}: score must be a number, got {score!r}")
                yield Scored(str(source), turns, str(model), float(score))


READERS: dict[str, Callable[[Sequence[Path]], Iterator[Scored]]] = {
    "p2l": read_p2l,
    "routerbench": read_routerbench,
    "llmrouterbench": read_llmrouterbench,
}


def _turns(where: str, prompt: Any) -> tuple[str, ...]:
    turns = (prompt,) if isinstance(prompt, str) else prompt
    if (
        not isinstance(turns, list | tuple)
        or not turns
        or not all(isinstance(turn, str) and turn.strip() for turn in turns)
    ):
        raise ConfigError(f"{where}: prompt must be a text, or a list of texts, and not empty")
    return tuple(turns)


def to_records(scores: Iterable[Scored]) -> tuple[list[Prompt], list[Reward]]:
    """Calibration prompts in the order met, and a reward for each teacher that a prompt has.

    Equal prompts of one source are one; a teacher scored several times on it has the mean.
    """
    scores_of: dict[tuple[str, str], dict[str, list[float]]] = {}
    turns_of: dict[tuple[str, str], tuple[str, ...]] = {}
    for scored in scores:
        key = scored.source, user_content(_messages(scored.turns))
        turns_of.setdefault(key, scored.turns)
        scores_of.setdefault(key, {}).setdefault(scored.teacher, []).append(scored.score)
    prompts, rewards = [], []
    for number, (key, of_teacher) in enumerate(scores_of.items()):
        prompt = _prompt(f"{key[0]}-{number:06d}", key[0], turns_of[key])
        prompts.append(prompt)
        means = {teacher: sum(given) / len(given) for teacher, given in of_teacher.items()}
        rewards += _rewards(prompt, means)
    return prompts, rewards


def _messages(turns: Sequence[str]) -> list[Message]:
    return [{"role": "user", "content": turn} for turn in turns]


def _prompt(prompt_id: str, source: str, turns: Sequence[str]) -> Prompt:
    return Prompt(
        id=prompt_id,
        messages=_messages(turns),
        source=source,
        split="calibration",
        answer=None,
        verifier="exact_match",
        source_licence="unknown",
    )


def _rewards(prompt: Prompt, score_of: dict[str, float]) -> list[Reward]:
    standardised = normalise(list(score_of.values()), [prompt.id] * len(score_of))
    return [
        Reward(
            key=store.answer_key(prompt.messages, fingerprint(["imported", teacher]), 0),
            prompt_id=prompt.id,
            teacher=teacher,
            usable=True,
            quality=score,
            learnability=math.nan,
            response_tokens=0,
            quality_standardised=float(value),
            learnability_standardised=0.0,
            total=float(value),
        )
        for (teacher, score), value in zip(score_of.items(), standardised, strict=True)
    ]


def write_run(folder: Path, prompts: Sequence[Prompt], rewards: Sequence[Reward]) -> None:
    """Makes `folder` a run folder whose next stage is train_router.

    Raises ConfigError where stages have been run there.
    """
    store.prepare(folder)
    if any((folder / "stages").iterdir()):
        raise ConfigError(f"{folder}: is a run folder in use: choose another")
    store.write_records(folder / PROMPTS, list(prompts), Prompt)
    store.write_records(folder / REWARDS, list(rewards), Reward)
    with store.writing_jsonl(folder / "prompts.jsonl") as write:
        for prompt in prompts:
            write({"id": prompt.id, "messages": prompt.messages, "split": prompt.split})


def config_lines(folder: Path, rewards: Sequence[Reward]) -> list[str]:
    """What to put into a config for it, as YAML; `teachers` may get endpoints, to be asked by
    serve_router, and licences are left to fill in."""
    path = json.dumps(str(folder / "prompts.jsonl"))
    names = [json.dumps(name) for name in dict.fromkeys(reward.teacher for reward in rewards)]
    return [
        f"run: {{folder: {json.dumps(str(folder.parent))}, name: {json.dumps(folder.name)}}}",
        f"sources: {{imported: {{kind: file, path: {path}}}}}",
        "teachers:",
        *(f"  - {{name: {name}, model: {name}, base_url: , licence: }}" for name in names),
    ]
