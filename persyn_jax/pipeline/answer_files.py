"""Answers that exist already: a teacher's file, matched to prompts.

A row of the file is any of these, told apart by their keys:

    custom_id, response      output of OpenAI's batch API, of vLLM's or of scripts/run_batch.py
    messages                 a conversation that ends with the assistant's turn
    conversations            the same as `from` and `value` (ShareGPT)
    prompt, completion       texts, or lists of messages (TRL)
    text, answer, response   the answer alone (or `output`); beside it `id`, or the question as
                             `prompt`, `question`, or `instruction` with or without `input`

A row belongs to the prompt whose id it has (`id`, `prompt_id` or `uuid`; of a batch, `custom_id`),
or else to the prompt with the same user turns, compared as `evaluation.contents` does. It may hold
`finish_reason`; without one the answer is taken to be complete.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from persyn_jax.config import ConfigError, fingerprint
from persyn_jax.evaluation.contents import normalise, user_content
from persyn_jax.evaluation.rows import Row, read_file
from persyn_jax.records import Answer, Prompt
from persyn_jax.sampling.config import TeacherConfig
from persyn_jax.store import answer_key, sha256_of

MATCHED_BY = "a row is matched by the prompt's id, or by its user turns"

_ID_KEYS = ("id", "prompt_id", "uuid")
_TEXT_KEYS = ("text", "answer", "response", "output")
_QUESTION_KEYS = (("prompt",), ("question",), ("instruction", "input"))
_ROLE_OF = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Found(NamedTuple):
    """An answer as a row has it."""

    where: str
    """For messages about it: `answers.jsonl:3`."""
    id: str | None
    question: str | None
    """The user's turns, normalised; null where the row has only an id."""
    text: str
    finish_reason: str
    error: str | None


def file_fingerprint(path: Path) -> str:
    """What decides the answers of a teacher with a file: its bytes, wherever it lies."""
    return fingerprint(["answers", sha256_of(path)])


def answers_of_file(teacher: TeacherConfig, prompts: Sequence[Prompt]) -> list[Answer]:
    """The teacher's answer to each prompt, in order; they cost nothing and count no tokens.

    Where the file has none, or a failed one, the answer has finish reason `error` and says so.

    Raises ConfigError: no such file, a row that is none of the forms above, an id with another
    prompt's text, two answers to one prompt (one that failed does not count: a batch that is run
    again appends the later answer).
    """
    assert teacher.answers is not None, "the caller sorts out who has a file"
    found = _match(read_file(teacher.answers, "answers"), prompts)
    mark = file_fingerprint(teacher.answers)
    return [_answer(teacher, prompt, mark, found.get(prompt.id)) for prompt in prompts]


def _match(rows: Iterable[Row], prompts: Sequence[Prompt]) -> dict[str, Found]:
    """The row of each prompt that has one, by the prompt's id."""
    content_of = {prompt.id: user_content(prompt.messages) for prompt in prompts}
    id_of = {content: prompt_id for prompt_id, content in content_of.items()}
    matched: dict[str, Found] = {}
    for row in rows:
        found = read_answer(row)
        prompt_id = _prompt_of(found, content_of, id_of)
        if prompt_id is None:
            continue
        before = matched.get(prompt_id)
        if before is not None and before.error is None:
            if found.error is None:
                raise ConfigError(
                    f"{found.where}: a second answer to prompt {prompt_id!r}, after {before.where}"
                )
            continue
        matched[prompt_id] = found
    return matched


def _prompt_of(found: Found, content_of: Mapping[str, str], id_of: Mapping[str, str]) -> str | None:
    if found.id is not None and found.id in content_of:
        if found.question not in (None, content_of[found.id]):
            raise ConfigError(
                f"{found.where}: has the id of prompt {found.id!r}, and another text as its prompt"
            )
        return found.id
    return None if found.question is None else id_of.get(found.question)


def _answer(teacher: TeacherConfig, prompt: Prompt, mark: str, found: Found | None) -> Answer:
    if found is None:
        found = Found("", None, None, "", "error", f"{teacher.answers}: has no answer to it")
    return Answer(
        key=answer_key(prompt.messages, mark, sample_index=0),
        prompt_id=prompt.id,
        teacher=teacher.name,
        sample_index=0,
        text=found.text,
        finish_reason=found.finish_reason,
        prompt_tokens=0,
        completion_tokens=0,
        usd=0.0,
        licence=teacher.licence,
        error=found.error,
    )


def read_answer(row: Row) -> Found:
    """The answer that a row holds. Raises ConfigError, naming the row, for any other row."""
    values = row.values
    if "custom_id" in values and "response" in values:
        return _of_batch(row)
    if values.get("messages") is not None:
        return _of_turns(row, _messages(row, values["messages"], "role", "content"))
    if values.get("conversations") is not None:
        return _of_turns(row, _messages(row, values["conversations"], "from", "value"))
    if values.get("completion") is not None:
        return _of_turns(
            row, [*_turns(row, "prompt", "user"), *_turns(row, "completion", "assistant")]
        )
    key = next((key for key in _TEXT_KEYS if values.get(key) is not None), None)
    if key is None:
        raise ConfigError(
            f"{row.where}: holds no answer: none of messages, conversations, completion, "
            f"{', '.join(_TEXT_KEYS)}, nor custom_id with response"
        )
    names = next((n for n in _QUESTION_KEYS if values.get(n[0]) is not None), ())
    question = [turn for name in names for turn in _turns(row, name, "user")]
    return _of_turns(row, [*question, *_turns(row, key, "assistant")])


def _of_batch(row: Row) -> Found:
    """A row of a batch's output; one that failed has an `error`, or a status other than 200."""
    custom_id, response = str(row.values["custom_id"]), row.values["response"] or {}
    try:
        if row.values.get("error") or response.get("status_code") != 200:
            reason = row.values.get("error") or f"status {response.get('status_code')}"
            return Found(row.where, custom_id, None, "", "error", f"{row.where}: {reason}")
        choice = response["body"]["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        finish_reason = choice.get("finish_reason") or "stop"
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ConfigError(
            f"{row.where}: response: has no body with a choice and its text"
        ) from None
    return Found(row.where, custom_id, None, text or "", str(finish_reason), None)


def _of_turns(row: Row, turns: Sequence[tuple[str, str]]) -> Found:
    """turns: (role, text) of the whole conversation, the answer last."""
    if not turns or turns[-1][0] != "assistant":
        raise ConfigError(f"{row.where}: the last turn must be the assistant's")
    question = [text for role, text in turns[:-1] if role == "user"]
    given = next((row.values[key] for key in _ID_KEYS if row.values.get(key) is not None), None)
    if given is None and not question:
        raise ConfigError(
            f"{row.where}: says not what it answers: neither {', '.join(_ID_KEYS)}, nor a prompt"
        )
    return Found(
        where=row.where,
        id=None if given is None else str(given),
        question=normalise("\n".join(question)) if question else None,
        text=turns[-1][1],
        finish_reason=str(row.values.get("finish_reason") or "stop"),
        error=None,
    )


def _turns(row: Row, key: str, role: str) -> list[tuple[str, str]]:
    """The turns under `key`: a text said by `role`, a list of messages, or nothing."""
    value = row.values.get(key)
    if value is None:
        return []
    if isinstance(value, str):
        return [(role, value)]
    return _messages(row, value, "role", "content")


def _messages(row: Row, messages: Any, role: str, content: str) -> list[tuple[str, str]]:
    turns = []
    for message in messages if isinstance(messages, list) else [messages]:
        said, text = (
            (message.get(role), message.get(content)) if isinstance(message, dict) else (None, None)
        )
        if not (isinstance(said, str) and isinstance(text, str)):
            raise ConfigError(f"{row.where}: a turn must have `{role}` and `{content}`, both texts")
        turns.append((_ROLE_OF.get(said, said), text))
    return turns
