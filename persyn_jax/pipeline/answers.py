"""Getting answers: what a file or the store has is taken, the rest is asked for, committed as it
arrives."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from persyn_jax.config import fingerprint, to_values
from persyn_jax.pipeline.answer_files import answers_of_file, file_fingerprint
from persyn_jax.pipeline.progress import Advance, progress, say
from persyn_jax.records import Answer, Prompt
from persyn_jax.sampling import spending
from persyn_jax.sampling.client import Commit, ask_all
from persyn_jax.sampling.config import ClientConfig, TeacherConfig, teacher_messages
from persyn_jax.sampling.question import Question
from persyn_jax.sampling.replies import Reply
from persyn_jax.sampling.spending import Tally
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
    that it serves. Of a teacher with a file of answers: the file's bytes.
    """
    if teacher.answers is not None:
        return file_fingerprint(teacher.answers)
    model = own_weights if teacher.base_url is None else teacher.model
    examples = [to_values(example) for example in teacher.examples]
    return fingerprint([model, teacher.system, examples, to_values(teacher.sampling)])


class Collected(NamedTuple):
    """Answers, and what asking for those that the store did not have came to."""

    answers: list[Answer]
    tallies: dict[str, Tally]
    """By teacher; none for a teacher that was not asked."""

    @property
    def summary(self) -> dict[str, Any]:
        """For a stage's summary. What was asked depends on what the store had."""
        return {
            "answers": len(self.answers),
            "failed_answers": sum(answer.finish_reason == "error" for answer in self.answers),
            "measured": {
                "asked": {name: dataclasses.asdict(tally) for name, tally in self.tallies.items()}
            },
        }


def in_all(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The summaries of several `Collected` as that of one."""
    asked: dict[str, dict[str, Any]] = {}
    for summary in summaries:
        for name, tally in summary["measured"]["asked"].items():
            before = asked.get(name, {})
            asked[name] = {key: _plus(before.get(key, 0), value) for key, value in tally.items()}
    return {
        "answers": sum(summary["answers"] for summary in summaries),
        "failed_answers": sum(summary["failed_answers"] for summary in summaries),
        "measured": {"asked": asked},
    }


def _plus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def collect_answers(
    asks: Sequence[Ask],
    own_weights: str | None,
    store: AnswerStore,
    client: ClientConfig,
    own_service: OwnService,
    label: str,
) -> Collected:
    """One answer for each ask, in order: from the teacher's file if it has one, or asked for.

    Equal prompts of one teacher share an answer. An answer that failed, or that the file does not
    have, is there too, with finish reason `error`: it is never trained on, and whoever asks for it
    next asks, or reads, again.

    Replies are committed together, those that arrive during one commit with the next. A kill loses
    what was under way: questions whose reply had not come, or was not committed yet; together at
    most `client.concurrency` an endpoint.

    Raises ConfigError, EndpointError or BudgetError as `sampling.client.ask_all`; what has been
    answered is committed by then. Raises ConfigError as `answers_of_file`.
    """
    on_file = iter(_from_files([ask for ask in asks if ask.teacher.answers], label))
    asked = _ask_endpoints(
        [ask for ask in asks if not ask.teacher.answers],
        own_weights,
        store,
        client,
        own_service,
        label,
    )
    by_asking = iter(asked.answers)
    answers = [next(on_file if ask.teacher.answers else by_asking) for ask in asks]
    return Collected(answers, asked.tallies)


def _from_files(asks: Sequence[Ask], label: str) -> list[Answer]:
    """The answers of teachers with a file, in the order of `asks`; one file is read at a time."""
    of_teacher: dict[str, Iterator[Answer]] = {}
    for teacher in {ask.teacher.name: ask.teacher for ask in asks}.values():
        prompts = [ask.prompt for ask in asks if ask.teacher.name == teacher.name]
        answers = answers_of_file(teacher, prompts)
        there = sum(answer.error is None for answer in answers)
        say(f"  {label}: teacher {teacher.name!r}: {there} of {len(answers)} in {teacher.answers}")
        of_teacher[teacher.name] = iter(answers)
    return [next(of_teacher[ask.teacher.name]) for ask in asks]


def _ask_endpoints(
    asks: Sequence[Ask],
    own_weights: str | None,
    store: AnswerStore,
    client: ClientConfig,
    own_service: OwnService,
    label: str,
) -> Collected:
    """`collect_answers` of teachers that have an endpoint."""
    teacher_of = {ask.teacher.name: ask.teacher for ask in asks}
    spending.check_prices(teacher_of.values(), client)
    marks = {name: teacher_fingerprint(t, own_weights) for name, t in teacher_of.items()}
    questions = [_question(ask, marks[ask.teacher.name]) for ask in asks]
    keys = [question.key for question in questions]
    known = store.get(keys)
    missing = {q.key: q for q in questions if q.key not in known or _failed(known[q.key])}
    tallies: dict[str, Tally] = {}
    if missing:
        spent = _spent(questions, known)
        asked = [
            (teacher, [q for q in missing.values() if q.teacher.name == teacher.name])
            for teacher in teacher_of.values()
        ]
        asked = [(teacher, share) for teacher, share in asked if share]
        needs_own = any(teacher.base_url is None for teacher, _ in asked)
        service = own_service() if needs_own else None
        with progress(label, len(missing)) as advance:
            commit = _committing(store, marks, advance)
            tallies = ask_all(asked, client, service, commit, spent)
        for name, tally in tallies.items():
            say(f"  {label}: teacher {name!r}: {_in_words(tally)}")
        known = store.get(keys)
    answers = [known[q.key].for_prompt(q.prompt_id, q.teacher.name) for q in questions]
    return Collected(answers, tallies)


def stored_answers(
    asks: Sequence[Ask], own_weights: str | None, store: AnswerStore
) -> list[Answer | None]:
    """What there is for each ask without asking anybody, failures too: in the teacher's file if it
    has one, or in the store. None where nobody has been asked."""
    asked = [ask for ask in asks if not ask.teacher.answers]
    marks = {
        name: teacher_fingerprint(teacher, own_weights)
        for name, teacher in {ask.teacher.name: ask.teacher for ask in asked}.items()
    }
    keys = [answer_key(ask.prompt.messages, marks[ask.teacher.name], 0) for ask in asked]
    known = store.get(keys)
    in_store = iter(
        known[key].for_prompt(ask.prompt.id, ask.teacher.name) if key in known else None
        for key, ask in zip(keys, asked, strict=True)
    )
    on_file = iter(_from_files([ask for ask in asks if ask.teacher.answers], "look up"))
    return [next(on_file if ask.teacher.answers else in_store) for ask in asks]


def _failed(answer: StoredAnswer) -> bool:
    return answer.finish_reason == "error"


def _spent(questions: Iterable[Question], known: dict[str, StoredAnswer]) -> spending.Cost:
    """What the stored answers count towards the budget, at this run's prices."""
    teacher_of = {question.key: question.teacher for question in questions}
    spent = spending.NOTHING
    for key, answer in known.items():
        spent += spending.cost(teacher_of[key], answer.prompt_tokens, answer.completion_tokens)
    return spent


def _committing(store: AnswerStore, marks: dict[str, str], advance: Advance) -> Commit:
    """Commits replies, and tells how it goes."""
    started = time.monotonic()
    done, cost = 0, spending.NOTHING

    def commit(replies: list[tuple[Question, Reply]]) -> None:
        nonlocal done, cost
        rows = [
            _stored(question, marks[question.teacher.name], reply) for question, reply in replies
        ]
        store.put_all(rows)
        done += len(rows)
        for row in rows:
            cost += spending.Cost(row.completion_tokens, row.usd)
        seconds = max(time.monotonic() - started, 1e-9)
        word = f"{done / seconds:.1f} answers/s, {cost.tokens / seconds:.0f} tokens/s"
        advance(len(rows), word if cost.usd is None else f"{word}, $ {cost.usd:.4f}")

    return commit


def _in_words(tally: Tally) -> str:
    usd = "price unknown" if tally.usd is None else f"$ {tally.usd:.4f}"
    return (
        f"{tally.answers} answers, {tally.failed} failed, {tally.requests} requests of which "
        f"{tally.retries} retries, {tally.prompt_tokens} prompt and {tally.completion_tokens} "
        f"answer tokens, {usd}"
    )


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
        usd=spending.price(question.teacher, reply.prompt_tokens, reply.completion_tokens),
        licence=question.teacher.licence,
        error=reply.error,
        server=reply.server,
        latency_seconds=reply.latency_seconds,
    )
