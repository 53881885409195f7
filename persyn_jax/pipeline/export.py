"""A run's training rows as a data set for other trainers, with its card."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

import persyn_jax
from persyn_jax import store
from persyn_jax.config import ConfigError, fingerprint
from persyn_jax.evaluation.contamination import Overlap
from persyn_jax.evaluation.contents import user_content
from persyn_jax.evaluation.rows import read_file
from persyn_jax.pipeline.answers import teacher_fingerprint
from persyn_jax.pipeline.config import RunConfig
from persyn_jax.pipeline.run import Run
from persyn_jax.pipeline.run_files import ANSWERS, PROMPTS, REWARDS, ROUTES
from persyn_jax.records import Answer, Prompt, PublishedRow, Reward, Route
from persyn_jax.reporting.card import CardFacts, card, strictest
from persyn_jax.sampling.config import TeacherConfig

Format = Literal["trl", "llama_factory", "axolotl", "jsonl"]
PARQUET, JSONL = "train.parquet", "train.jsonl"
_WRITTEN = ("README.md", PARQUET, JSONL, "dataset_info.json", "axolotl.yaml", ".cache")
_PROMPT_KEYS = ("prompt", "question", "instruction", "problem", "text")


class RunOutputs(NamedTuple):
    """What the stages up to generate wrote."""

    prompts: Sequence[Prompt]
    rewards: Sequence[Reward]
    routes: Sequence[Route]
    answers: Sequence[Answer]


class Exported(NamedTuple):
    """Rows that go out, and how many stay behind."""

    rows: list[PublishedRow]
    unusable: int
    """Answers that failed, were cut off or are empty."""
    contaminated: int
    """Rows whose prompt repeats one of an evaluation set."""


def export(
    config: RunConfig, wanted: Format, folder: Path, against: Sequence[Path]
) -> dict[str, Any]:
    """Reads the finished run, writes the data set, returns the summary that the script prints.

    Raises ConfigError as `store.read_records`, `make_rows`, `read_texts` and `write_data_set`.
    """
    run = Run(config)
    outputs = RunOutputs(
        prompts=run.read(PROMPTS, Prompt),
        rewards=run.read(REWARDS, Reward),
        routes=run.read(ROUTES, Route),
        answers=run.read(ANSWERS, Answer),
    )
    texts = [text for path in against for text in read_texts(path)]
    exported = make_rows(outputs, config, run.own_weights(), texts)
    facts = CardFacts(
        run=config.run.name,
        config_fingerprint=fingerprint(config),
        student=_name_of(config.student.weights),
        alpha=config.rewards.alpha,
        version=persyn_jax.__version__,
        unusable=exported.unusable,
        contaminated=exported.contaminated,
        against=tuple(path.name for path in against),
    )
    write_data_set(folder, wanted, exported, facts)
    return {
        "rows": len(exported.rows),
        "unusable": exported.unusable,
        "contaminated": exported.contaminated,
        "teachers": dict(Counter(row.teacher_id for row in exported.rows)),
        "strictest_licence": strictest(exported.rows),
    }


def make_rows(
    outputs: RunOutputs, config: RunConfig, own_weights: str | None, against: Sequence[str]
) -> Exported:
    """One row for each usable answer, but for those whose prompt repeats an eval prompt of the run
    or a text of `against` (see `evaluation.contamination`).

    own_weights: fingerprint of the run's own service.
    Raises ConfigError where no row is left, and where an answer is not of the config's teacher.
    """
    prompt_of = {prompt.id: prompt for prompt in outputs.prompts}
    reward_of = {reward.key: reward for reward in outputs.rewards}
    margin_of = {route.prompt_id: route.margin for route in outputs.routes}
    teacher_of = {teacher.name: teacher for teacher in config.teachers}
    marks = {name: teacher_fingerprint(t, own_weights) for name, t in teacher_of.items()}
    models = {name: _model(teacher, config) for name, teacher in teacher_of.items()}
    evaluated = [user_content(p.messages) for p in outputs.prompts if p.split == "eval"]
    overlap = Overlap([*evaluated, *against])
    rows, contaminated = [], 0
    usable = [answer for answer in outputs.answers if answer.usable]
    for answer in usable:
        prompt, reward = prompt_of[answer.prompt_id], reward_of.get(answer.key)
        mark = marks.get(answer.teacher, "")
        if answer.key != store.answer_key(prompt.messages, mark, answer.sample_index):
            raise ConfigError(
                f"{config.run_folder}: teacher {answer.teacher!r} of the config is not the one "
                "that answered; export with the config of the run"
            )
        if overlap.found(user_content(prompt.messages)):
            contaminated += 1
            continue
        row = PublishedRow(
            id=prompt.id,
            messages=[*prompt.messages, {"role": "assistant", "content": answer.text}],
            teacher_id=answer.teacher,
            quality=reward.quality if reward else None,
            learnability=_known(reward.learnability) if reward else None,
            total=_known(reward.total) if reward else None,
            margin=_known(margin_of.get(prompt.id)),
            source=prompt.source,
            teacher_licence=answer.licence,
            source_licence=prompt.source_licence,
            finish_reason=answer.finish_reason,
            run=config.run.name,
            answer_key=answer.key,
            teacher_model=models[answer.teacher],
            teacher_fingerprint=mark,
        )
        rows.append(row)
    if not rows:
        raise ConfigError(
            f"{config.run_folder}: no row is left: of {len(outputs.answers)} answers {len(usable)} "
            f"are usable, and {contaminated} of them answer a prompt of an evaluation set"
        )
    return Exported(rows, len(outputs.answers) - len(usable), contaminated)


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _model(teacher: TeacherConfig, config: RunConfig) -> str | None:
    """Whose words they are; of a model on the disk the name alone, without the way there."""
    if not teacher.needs_service or config.service is None:
        return teacher.model
    return _name_of(config.service.model.weights)


def _name_of(weights: str) -> str:
    return Path(weights).name if Path(weights).exists() else weights


def read_texts(path: Path) -> list[str]:
    """The user's words of every row of a .jsonl or .parquet file: `messages`, or a text under
    prompt, question, instruction, problem or text.

    Raises ConfigError as `evaluation.rows.read_file`, and for a row that holds none of them.
    """
    texts = []
    for row in read_file(path, "evaluation prompts"):
        values = row.values
        if (messages := values.get("messages")) is not None:
            try:
                texts.append(user_content(messages))
            except (KeyError, TypeError):
                raise ConfigError(f"{row.where}: messages must have `role` and `content`") from None
            continue
        text = next((values[key] for key in _PROMPT_KEYS if isinstance(values.get(key), str)), None)
        if text is None:
            raise ConfigError(
                f"{row.where}: holds no prompt: neither messages nor {', '.join(_PROMPT_KEYS)}"
            )
        texts.append(text)
    return texts


def write_data_set(folder: Path, wanted: Format, exported: Exported, facts: CardFacts) -> None:
    """Writes the rows, what the trainer wants beside them, and README.md, into `folder`.

    trl            train.parquet; SFTTrainer takes `messages`
    llama_factory  train.jsonl, dataset_info.json
    axolotl        train.jsonl, axolotl.yaml: the `datasets` section of its config
    jsonl          train.jsonl

    Raises ConfigError: `folder` holds anything else, disk full.
    """
    _prepare(folder)
    if wanted == "trl":
        store.write_records(folder / PARQUET, exported.rows, PublishedRow)
    else:
        with store.writing_jsonl(folder / JSONL) as write:
            for row in exported.rows:
                write(vars(row))
    if wanted == "llama_factory":
        store.write_json(folder / "dataset_info.json", {facts.run: _LLAMA_FACTORY})
    if wanted == "axolotl":
        section: Mapping[str, Any] = {"datasets": [{"path": str(folder / JSONL), **_AXOLOTL}]}
        store.write_text(folder / "axolotl.yaml", yaml.safe_dump(section, sort_keys=False))
    data_file = PARQUET if wanted == "trl" else JSONL
    store.write_text(folder / "README.md", card(exported.rows, facts, data_file))


def _prepare(folder: Path) -> None:
    """Makes the folder; files of another export go, for a push would take them along."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in _WRITTEN)
        if foreign:
            raise ConfigError(f"{folder}: holds {foreign[0]!r}, which is not of an export")
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}") from None


_LLAMA_FACTORY = {
    "file_name": JSONL,
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}
_AXOLOTL = {
    "ds_type": "json",
    "type": "chat_template",
    "field_messages": "messages",
    "message_property_mappings": {"role": "role", "content": "content"},
    "roles_to_train": ["assistant"],
}


def push_to_hub(folder: Path, repository: str, token: str | None) -> str:
    """Uploads the folder to a data set repository of the Hugging Face hub, which is made, private,
    if it is not there. Returns its address.

    Raises ConfigError without a token, RuntimeError when the hub refuses.
    """
    if not token:
        raise ConfigError("--push-to-hub: needs a token in the environment variable HF_TOKEN")
    from huggingface_hub import HfApi

    try:
        hub = HfApi(token=token)
        address = hub.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, repo_type="dataset", folder_path=folder)
    except Exception as error:  # network, rights and names each raise their own
        reason = " ".join(str(error).split()).replace(token, "***")
        raise RuntimeError(f"{repository}: the hub refuses: {reason}") from None
    return str(address)
