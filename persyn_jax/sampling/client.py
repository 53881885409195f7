"""The client of any OpenAI-compatible endpoint: many questions at once, retries where it helps.

One dispatcher starts a task for each try while an endpoint of the teacher has room (see `limiter`).
A question is under way until its reply is committed, so a kill loses no more than the endpoints'
limits allow at once, and memory does not grow with the number of questions.
"""

import asyncio
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from persyn_jax.config import ConfigError
from persyn_jax.sampling import limiter, spending
from persyn_jax.sampling.config import ClientConfig, TeacherConfig
from persyn_jax.sampling.limiter import Limit
from persyn_jax.sampling.question import Connections, Question, Target, ask_once, read_api_key
from persyn_jax.sampling.replies import (
    HopelessError,
    PassingError,
    RefusedError,
    Reply,
    failed_reply,
)
from persyn_jax.sampling.spending import Cost, Tally

# Before the second try; doubles to the most. A try waits for a random part of it ("full jitter"),
# so that requests that failed together come apart.
_FIRST_WAIT_SECONDS = 1.0
_MOST_WAIT_SECONDS = 30.0
_FEW_ANSWERS = 20  # before these the share of failed ones says little


class EndpointError(RuntimeError):
    """A teacher's endpoints kept failing. One line. Answers that were committed stay."""


class BudgetError(RuntimeError):
    """The budget is spent. One line. Answers that were committed stay."""


Commit = Callable[[list[tuple[Question, Reply]]], None]
"""Puts replies where a kill does not reach them. Called in a thread of its own, never twice at
once."""


@dataclass(eq=False)
class _Endpoint:
    """Where teachers are asked. Teachers with a URL in common share it."""

    base_url: str
    limit: Limit
    begun: int = 0


@dataclass(frozen=True, eq=False)
class _Attempt:
    """A question's next try."""

    question: Question
    most_cost: Cost
    answers_before: int
    """Answers that the teacher had given when the question was first asked."""
    number: int = 1
    """Of this try, from 1."""
    due: float = -math.inf
    failed_at: _Endpoint | None = None


@dataclass
class _Asking:
    """One teacher's questions, and how far they are."""

    teacher: TeacherConfig
    model: str
    api_key: str | None
    endpoints: list[_Endpoint]
    questions: Iterator[Question]
    tally: Tally
    ahead: Question | None = None
    """Read from `questions`, not asked yet."""
    waiting: list[_Attempt] = field(default_factory=list)
    """Tries after the first."""
    last_failure: str = ""
    """URL and reason of the last question that failed."""

    def where(self, endpoint: _Endpoint) -> str:
        return f"teacher {self.teacher.name!r} at {endpoint.base_url}"


class _Arrival(NamedTuple):
    question: Question
    reply: Reply
    endpoint: _Endpoint


@dataclass
class _Work:
    """Everything that is under way."""

    connections: Connections
    config: ClientConfig
    commit: Callable[[list[_Arrival]], Future[None]]
    spent: Cost
    """On answers that have arrived, those of earlier runs included."""
    promised: Cost = spending.NOTHING
    """The most that the questions under way, and those that wait for another try, may cost."""
    over_budget: str | None = None
    """The budget that the next question could exceed if all those under way cost the most."""
    arrived: list[_Arrival] = field(default_factory=list)
    """Waits to be committed."""
    arrival: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Something is no longer under way."""


def ask_all(
    asked: Sequence[tuple[TeacherConfig, Iterable[Question]]],
    config: ClientConfig,
    own_service: tuple[str, str] | None,
    commit: Commit,
    spent: Cost = spending.NOTHING,
) -> dict[str, Tally]:
    """Asks every teacher its questions; hands replies to `commit` as they arrive, in any order.

    own_service: (base URL, model name) for teachers that name no endpoint. spent: what counts
    towards the budget before anything is asked. Returns what each teacher's answers came to.

    A question that is refused, or fails at its last try, gets a reply with an error. Raises

    - ConfigError: an endpoint that refuses every prompt (401, 403, 404), a text that is not valid
      Unicode, an API key that is not in the environment, a budget with an unknown price;
    - EndpointError: no endpoint of a teacher answers anything while one question has all its tries,
      or too large a share of its answers failed;
    - BudgetError: the next question could exceed the budget. What is under way is waited for.

    The other requests are given up then; all replies that had arrived are committed.
    """
    spending.check_prices([teacher for teacher, _ in asked], config)
    endpoints: dict[str, _Endpoint] = {}
    askings = [
        _asking(teacher, questions, own_service, endpoints, config) for teacher, questions in asked
    ]
    asyncio.run(_ask_all(askings, config, commit, spent))
    return {asking.teacher.name: asking.tally for asking in askings}


def _asking(
    teacher: TeacherConfig,
    questions: Iterable[Question],
    own_service: tuple[str, str] | None,
    endpoints: dict[str, _Endpoint],
    config: ClientConfig,
) -> _Asking:
    """Adds the teacher's URLs to `endpoints`."""
    if teacher.base_urls:
        urls, model = teacher.base_urls, teacher.model
    elif own_service is not None:
        urls, model = [own_service[0]], teacher.model or own_service[1]
    else:
        raise ConfigError(f"teacher {teacher.name!r}: no base_url, and no service to ask instead")
    for url in urls:
        endpoints.setdefault(url, _Endpoint(url, limiter.fresh(config.concurrency)))
    return _Asking(
        teacher=teacher,
        model=str(model),
        api_key=read_api_key(teacher),
        endpoints=[endpoints[url] for url in urls],
        questions=iter(questions),
        tally=Tally(usd=spending.price(teacher, 0, 0)),
    )


async def _ask_all(
    askings: list[_Asking], config: ClientConfig, commit: Commit, spent: Cost
) -> None:
    with ThreadPoolExecutor(1) as committer:

        def submit(arrivals: list[_Arrival]) -> Future[None]:
            return committer.submit(commit, [(a.question, a.reply) for a in arrivals])

        async with Connections(config) as connections:
            work = _Work(connections, config, submit, spent)
            try:
                async with asyncio.TaskGroup() as group:
                    committing = group.create_task(_commit_arrivals(work))
                    await _dispatch(askings, work, group)
                    committing.cancel()
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None
            finally:
                if work.arrived:
                    submit(work.arrived).result()
    for asking in askings:
        _check_failed_share(asking, config, at_least=1)


async def _commit_arrivals(work: _Work) -> None:
    """What arrives during one commit is the batch of the next."""
    while True:
        await work.arrival.wait()
        work.arrival.clear()
        batch, work.arrived = work.arrived, []
        await asyncio.shield(asyncio.wrap_future(work.commit(batch)))  # whatever else ends
        for arrival in batch:
            arrival.endpoint.limit = limiter.ended(arrival.endpoint.limit)
        work.changed.set()


async def _dispatch(askings: list[_Asking], work: _Work, group: asyncio.TaskGroup) -> None:
    """Starts tries, each when it may be; returns when every question has its reply."""
    while True:
        work.changed.clear()
        now = time.monotonic()
        work.over_budget = None
        while sum(_start_one(asking, work, group, now) for asking in askings):  # each in its turn
            pass
        if work.over_budget and not work.promised.tokens:
            raise BudgetError(_budget_line(askings, work))
        if all(_finished(asking) for asking in askings):
            return
        await _change(work.changed, _next_moment(askings, now))


def _finished(asking: _Asking) -> bool:
    if asking.waiting or any(endpoint.limit.under_way for endpoint in asking.endpoints):
        return False
    return _look_ahead(asking) is None


def _look_ahead(asking: _Asking) -> Question | None:
    """The next question, which stays the next; None after the last."""
    if asking.ahead is None:
        asking.ahead = next(asking.questions, None)
    return asking.ahead


async def _change(changed: asyncio.Event, moment: float) -> None:
    """Waits until something changed, or until the moment."""
    loop = asyncio.get_running_loop()
    timer = None if moment == math.inf else loop.call_at(moment, changed.set)
    await changed.wait()
    if timer is not None:
        timer.cancel()


def _next_moment(askings: list[_Asking], now: float) -> float:
    """When a try is due or an endpoint has rested, whichever is next after `now`."""
    moments = [attempt.due for asking in askings for attempt in asking.waiting]
    moments += [endpoint.limit.rest_until for a in askings for endpoint in a.endpoints]
    return min((moment for moment in moments if moment > now), default=math.inf)


def _start_one(asking: _Asking, work: _Work, group: asyncio.TaskGroup, now: float) -> bool:
    """Starts a try of this teacher, if there is one to make and an endpoint for it."""
    free = [endpoint for endpoint in asking.endpoints if limiter.has_room(endpoint.limit, now)]
    if not free:
        return False
    due = [attempt for attempt in asking.waiting if attempt.due <= now]
    # Those with the fewest tries left first: whether a teacher is down shows at the last try.
    for attempt in sorted(due, key=lambda attempt: -attempt.number):
        if (endpoint := _place(asking, attempt, free)) is not None:
            asking.waiting.remove(attempt)
            break
    else:
        if (attempt := _new_attempt(asking, work)) is None:
            return False
        endpoint = min(free, key=_load)
    endpoint.limit = limiter.begun(endpoint.limit)
    endpoint.begun += 1
    group.create_task(_try(work, asking, endpoint, attempt))
    return True


def _place(asking: _Asking, attempt: _Attempt, free: list[_Endpoint]) -> _Endpoint | None:
    """A free endpoint, but not the one where it failed while another one is well."""
    others = [endpoint for endpoint in asking.endpoints if endpoint is not attempt.failed_at]
    if any(endpoint.limit.rests == 0 for endpoint in others):
        free = [endpoint for endpoint in free if endpoint is not attempt.failed_at]
    return min(free, key=_load, default=None)


def _load(endpoint: _Endpoint) -> tuple[float, int]:
    return endpoint.limit.under_way / endpoint.limit.allowed, endpoint.begun


def _new_attempt(asking: _Asking, work: _Work) -> _Attempt | None:
    """The first try of the next question, if there is one and the budget has room for it.

    None while all that can be known from those that wait for another try is not known yet: too many
    of them, or one while every endpoint is in trouble.
    """
    in_trouble = all(endpoint.limit.rests for endpoint in asking.endpoints)
    most_waiting = 1 if in_trouble else work.config.concurrency * len(asking.endpoints)
    if len(asking.waiting) >= most_waiting:
        return None
    if (question := _look_ahead(asking)) is None:
        return None
    most = spending.most_cost(asking.teacher, question.messages)
    if budget := spending.exceeded(work.spent + work.promised + most, work.config):
        work.over_budget = budget
        return None
    asking.ahead = None
    work.promised += most
    return _Attempt(question, most, answers_before=asking.tally.answers)


def _budget_line(askings: list[_Asking], work: _Work) -> str:
    missing = sum(
        (asking.ahead is not None) + sum(1 for _ in asking.questions) for asking in askings
    )
    usd = "" if work.spent.usd is None else f" and $ {work.spent.usd:.4f}"
    return (
        f"{work.over_budget}: the next answer could exceed it; spent {work.spent.tokens} tokens"
        f"{usd}; {missing} answers are missing; the same command with a larger budget goes on "
        "from here"
    )


async def _try(work: _Work, asking: _Asking, endpoint: _Endpoint, attempt: _Attempt) -> None:
    """One try, and what follows from it: a reply, another try, or the end of everything."""
    era = endpoint.limit.era
    asking.tally.requests += 1
    try:
        reply = await ask_once(
            work.connections,
            attempt.question,
            Target(endpoint.base_url, asking.model, asking.api_key),
        )
    except PassingError as error:
        now = time.monotonic()
        endpoint.limit = limiter.failed(endpoint.limit, era, now, error.overload, error.retry_after)
        if attempt.number < work.config.attempts:
            _try_again(work, asking, endpoint, attempt, now)
            return
        reason = f"failed {attempt.number} times, last: {error}"
        if error.overload and asking.tally.answers == attempt.answers_before:
            raise EndpointError(f"{asking.where(endpoint)}: {reason}") from None
        reply = failed_reply(reason, endpoint.base_url)
    except RefusedError as error:
        endpoint.limit = limiter.answered(endpoint.limit)
        reply = failed_reply(f"refused with {error}", endpoint.base_url)
    except HopelessError as error:
        prompt = attempt.question.prompt_id
        raise ConfigError(
            f"{asking.where(endpoint)}: refused prompt {prompt!r} with {error}"
        ) from None
    else:
        endpoint.limit = limiter.answered(endpoint.limit)
    _count(work, asking, attempt, reply)
    work.arrived.append(_Arrival(attempt.question, reply, endpoint))
    work.arrival.set()
    _check_failed_share(asking, work.config, at_least=_FEW_ANSWERS)


def _try_again(
    work: _Work, asking: _Asking, endpoint: _Endpoint, attempt: _Attempt, now: float
) -> None:
    asking.tally.retries += 1
    most = min(_FIRST_WAIT_SECONDS * 2.0 ** (attempt.number - 1), _MOST_WAIT_SECONDS)
    again = replace(
        attempt, due=now + random.uniform(0, most), number=attempt.number + 1, failed_at=endpoint
    )
    asking.waiting.append(again)
    endpoint.limit = limiter.ended(endpoint.limit)
    work.changed.set()


def _count(work: _Work, asking: _Asking, attempt: _Attempt, reply: Reply) -> None:
    tally = asking.tally
    cost = spending.cost(asking.teacher, reply.prompt_tokens, reply.completion_tokens)
    work.promised -= attempt.most_cost
    work.spent += cost
    tally.prompt_tokens += reply.prompt_tokens
    tally.completion_tokens += reply.completion_tokens
    if tally.usd is not None and cost.usd is not None:
        tally.usd += cost.usd
    if reply.error is None:
        tally.answers += 1
    else:
        tally.failed += 1
        asking.last_failure = f"{reply.server}: {reply.error}"


def _check_failed_share(asking: _Asking, config: ClientConfig, at_least: int) -> None:
    failed, done = asking.tally.failed, asking.tally.failed + asking.tally.answers
    if done >= at_least and failed > config.max_failed_share * done:
        raise EndpointError(
            f"teacher {asking.teacher.name!r} at {asking.last_failure} ({failed} of {done} answers "
            f"failed; client.max_failed_share is {config.max_failed_share:g})"
        )
