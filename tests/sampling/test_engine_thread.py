"""How answers get from the engine's thread to coroutines, around an engine that does as told."""

import asyncio
import contextlib
import threading
import time
from collections import deque

import pytest
from service_cases import service_config

from persyn_jax.sampling import engine_thread
from persyn_jax.sampling.engine_thread import EngineThread
from persyn_jax.sampling.requests import Piece, Request, ScoreRequest, Scores

FOREVER = 10**6


class FakeEngine:
    """Answers with one token a step; a step waits until the test lets it go on."""

    def __init__(self, model, config):
        self.steps = 0
        self.allowed = threading.Semaphore(0)
        self.left: dict[int, int] = {}
        self.log: deque[tuple[str, int, int]] = deque()
        self._tickets = 0

    @property
    def busy(self) -> bool:
        return bool(self.left)

    def submit(self, request) -> int:
        self._tickets += 1
        self.left[self._tickets] = 1 if isinstance(request, ScoreRequest) else request.max_tokens
        self.log.append(("submit", self._tickets, self.steps))
        return self._tickets

    def cancel(self, ticket) -> None:
        del self.left[ticket]
        self.log.append(("cancel", ticket, self.steps))

    def step(self):
        self.allowed.acquire()
        self.steps += 1
        pieces = {}
        for ticket in list(self.left):
            self.left[ticket] -= 1
            ended = self.left[ticket] == 0
            pieces[ticket] = Piece(f"{ticket}.", (5,), None, 1, "length" if ended else None)
            if ended:
                del self.left[ticket]
        return pieces


@pytest.fixture
def thread(monkeypatch):
    monkeypatch.setattr(engine_thread, "Engine", FakeEngine)
    made = EngineThread(service_config(), loaded=lambda model: None)
    while made.engine is None:
        time.sleep(0.01)
    yield made
    made.engine.allowed.release(FOREVER)
    assert made.stop(10)


def request(max_tokens: int) -> Request:
    return Request(tokens=(5,), max_tokens=max_tokens)


async def texts(thread, *lengths: int) -> list[str]:
    found = [""] * len(lengths)
    async for place, piece in thread.stream([request(length) for length in lengths]):
        assert isinstance(piece, Piece)
        found[place] += piece.text
    return found


def test_every_piece_arrives_in_order_at_the_one_who_asked(thread):
    async def together():
        return await asyncio.gather(*(texts(thread, n, n + 1) for n in range(1, 20)))

    thread.engine.allowed.release(FOREVER)
    found = asyncio.run(together())
    for n, (first, second) in enumerate(found, start=1):
        tickets = {first.split(".")[0], second.split(".")[0]}
        assert len(tickets) == 2
        assert first.count(".") == n
        assert second.count(".") == n + 1
        assert set(first.split(".")[:-1]) | set(second.split(".")[:-1]) == tickets
    assert not thread.engine.busy


@pytest.mark.parametrize("how", ["close", "cancel", "exception"])
def test_who_leaves_is_forgotten_before_the_next_step(thread, how):
    """So the slot is free within two steps: the one on its way, and none after it."""

    async def leave():
        async def ask():
            async with contextlib.aclosing(thread.stream([request(FOREVER)] * 2)) as pieces:
                async for _ in pieces:
                    began.set()
                    if how == "exception":
                        raise ZeroDivisionError
                    if how == "close":
                        return

        began = asyncio.Event()
        asking = asyncio.ensure_future(ask())
        thread.engine.allowed.release(1)
        await began.wait()
        if how == "cancel":
            asking.cancel()
        with contextlib.suppress(asyncio.CancelledError, ZeroDivisionError):
            await asking
        left_at = thread.engine.steps
        thread.engine.allowed.release(1)  # the step that is on its way
        while thread.engine.busy:
            await asyncio.sleep(0)
        return left_at

    left_at = asyncio.run(leave())
    cancelled = [step for what, _, step in thread.engine.log if what == "cancel"]
    assert len(cancelled) == 2
    assert max(cancelled) <= left_at + 1


def test_one_hand_over_a_step(thread):
    """However many answers a step feeds."""

    async def count():
        loop = asyncio.get_running_loop()
        calls, call = [], loop.call_soon_threadsafe

        def counted(callback, *arguments):
            if callback is engine_thread._deliver:
                calls.append(callback)
            return call(callback, *arguments)

        loop.call_soon_threadsafe = counted
        asking = asyncio.gather(*(texts(thread, 10) for _ in range(50)))
        while len(thread.engine.log) < 1:
            await asyncio.sleep(0)
        thread.engine.allowed.release(FOREVER)
        await asking
        return len(calls)

    assert asyncio.run(count()) <= thread.engine.steps


def test_a_loop_that_is_gone_stops_nobody(thread):
    async def begin():
        pieces = thread.stream([request(3)])
        asking = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0.01)
        return pieces, asking

    loop = asyncio.new_event_loop()
    _, asking = loop.run_until_complete(begin())
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        loop.run_until_complete(asking)
    loop.close()
    thread.engine.allowed.release(FOREVER)
    assert asyncio.run(texts(thread, 2))[0].count(".") == 2


def test_scores_come_in_the_order_of_the_requests(thread, monkeypatch):
    def step(engine):
        tickets = sorted(engine.left, reverse=True)
        engine.left.clear()
        return {ticket: Scores((None,) * ticket) for ticket in tickets}

    monkeypatch.setattr(FakeEngine, "step", step)
    found = asyncio.run(thread.scores([ScoreRequest((5,)), ScoreRequest((5,))]))
    assert [len(scores.logprobs) for scores in found] == [1, 2]
