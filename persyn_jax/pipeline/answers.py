"""Getting answers: what the store has is reused, the rest is asked for, committed as it arrives."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from persyn_jax.config import fingerprint, to_values
from persyn_jax.pipeline.progress import progress
from persyn_jax.records import Answer, Prompt
from persyn_jax.sampling.client import Question, Reply, ask_all, price
from persyn_jax.sampling.config import ClientConfig, TeacherConfig, teacher_messages
from persyn_jax.store import AnswerStore, StoredAnswer, answer_key

OwnService = Callable[[], tuple[str, str]]
"""Starts the run's own sampling service if need be; returns (base URL, model name)."""


class Ask(NamedTuple):
    """A prompt for a teacher."""

    prompt: Prompt
    teacher: TeacherConfig


def teacher_fingerprint(teacher: TeacherConfig, own_weights: str | None) -> str:
    """What decides the teacher's answers: model, what stands before the prompt, sampling.

    Not its name, not its URL. own_weights: fingerprint of the own service's weights, for a teacher
    that it serves.
    """
    model = own_weights if teacher.base_url is None else teacher.model
    examples = [to_values(example) for example in teacher.examples]
    return fingerprint([model, teacher.system, examples, to_values(teacher.sampling)])


def collect_answers(
    asks: Sequence[Ask],
    own_weights: str | None,
    store: AnswerStore,
    client: ClientConfig,
    own_service: OwnService,
    label: str,
) -> list[Answer]:
    """One answer for each ask, in order. Equal prompts of one teacher share an answer.

    Raises ConfigError or EndpointError as `sampling.client.ask_all`; what has been answered is
    committed by then. A failure that stands in the store is asked again.
    """
    teacher_of = {ask.teacher.name: ask.teacher for ask in asks}
    marks = {name: teacher_fingerprint(t, own_weights) for name, t in teacher_of.items()}
    questions = [_question(ask, marks[ask.teacher.name]) for ask in asks]
    keys = [question.key for question in questions]
    known = store.get(keys)
    missing = {q.key: q for q in questions if q.key not in known or _failed(known[q.key])}
    if missing:
        needs_own = any(question.teacher.base_url is None for question in missing.values())
        service = own_service() if needs_own else None
        with progress(label, len(missing)) as advance:

            def on_reply(question: Question, reply: Reply) -> None:
                store.put(_stored(question, marks[question.teacher.name], reply))
                advance()

            ask_all(list(missing.values()), client, service, on_reply)
        known = store.get(keys)
    return [known[q.key].for_prompt(q.prompt_id, q.teacher.name) for q in questions]


def _failed(answer: StoredAnswer) -> bool:
    return answer.finish_reason == "error"


def _question(ask: Ask, mark: str) -> Question:
    key = answer_key(ask.prompt.messages, mark, sample_index=0)
    return Question(
        key=key,
        prompt_id=ask.prompt.id,
        teacher=ask.teacher,
        messages=teacher_messages(ask.teacher, ask.prompt.messages),
        seed=int(key[:8], 16) >> 1,  # from the key: the same wherever and whenever it is asked
    )


def _stored(question: Question, mark: str, reply: Reply) -> StoredAnswer:
    return StoredAnswer(
        key=question.key,
        teacher=question.teacher.name,
        teacher_fingerprint=mark,
        sample_index=0,
        text=reply.text,
        token_ids=reply.token_ids,
        finish_reason=reply.finish_reason,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        usd=price(question.teacher, reply),
        licence=question.teacher.licence,
        error=None,
        server=reply.server,
        latency_seconds=reply.latency_seconds,
    )
