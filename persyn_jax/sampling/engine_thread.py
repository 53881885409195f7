"""The thread that drives the engine, and how the event loop's coroutines get answers from it."""

import asyncio
import os
import queue
import sys
import threading
import traceback
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from persyn_jax.config import ConfigError
from persyn_jax.models import weights
from persyn_jax.models.weights import Model
from persyn_jax.sampling.config import ServiceConfig
from persyn_jax.sampling.engine import Engine
from persyn_jax.sampling.requests import Piece, Request, ScoreRequest, Scores


@dataclass(frozen=True, eq=False)
class _Sink:
    """Where the engine's thread puts what comes of one request."""

    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[tuple[int, Piece | Scores]]
    place: int


class EngineThread:
    """Loads the engine and drives it in a thread of its own.

    What a step yields for all requests of an event loop is handed over in one call.
    loaded: called in that thread with the model, before anything is compiled.
    """

    def __init__(self, config: ServiceConfig, loaded: Callable[[Model], None]):
        self._config = config
        self._loaded = loaded
        self.engine: Engine | None = None
        """None until it is ready."""
        self._inbox: queue.SimpleQueue[tuple[_Sink, Request | ScoreRequest | None] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, daemon=True, name="engine")
        self._thread.start()

    async def stream(
        self, requests: Sequence[Request | ScoreRequest]
    ) -> AsyncGenerator[tuple[int, Piece | Scores]]:
        """What comes of requests that have passed `Engine.check`, with each one's place.

        Ends when all have ended. Closing the iterator frees their slots.
        """
        pieces: asyncio.Queue[tuple[int, Piece | Scores]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        under_way = {place: _Sink(loop, pieces, place) for place in range(len(requests))}
        for place, request in enumerate(requests):
            self._inbox.put((under_way[place], request))
        try:
            while under_way:
                place, piece = await pieces.get()
                if isinstance(piece, Scores) or piece.finish_reason is not None:
                    del under_way[place]
                yield place, piece
        finally:
            for sink in under_way.values():
                self._inbox.put((sink, None))

    async def scores(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """The scores of requests that have passed `Engine.check`, in their order."""
        found: dict[int, Scores] = {}
        async for place, scores in self.stream(requests):
            assert isinstance(scores, Scores)
            found[place] = scores
        return [found[place] for place in range(len(requests))]

    def stop(self, seconds: float) -> bool:
        """Ends the thread after its step. Returns False if it takes longer than `seconds`."""
        self._inbox.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            model = weights.load(self._config.model)
            self._loaded(model)
            self.engine = Engine(model, self._config.engine)
            del model  # the engine has its own copy, in another form
            _drive(self.engine, self._inbox)
        except ConfigError as error:
            _exit_process(str(error), 2)
        except Exception as error:  # a dead engine must not look like a slow one
            traceback.print_exc()
            _exit_process(f"the engine failed: {type(error).__name__}: {error}", 1)


def _drive(engine: Engine, inbox: queue.SimpleQueue) -> None:
    sinks: dict[int, _Sink] = {}
    tickets: dict[_Sink, int] = {}
    while True:
        while not engine.busy or not inbox.empty():
            message = inbox.get()
            if message is None:
                return
            sink, request = message
            if request is not None:
                tickets[sink] = engine.submit(request)
                sinks[tickets[sink]] = sink
            elif sink in tickets:  # else it has just ended
                engine.cancel(tickets[sink])
                del sinks[tickets.pop(sink)]
        pieces = {sinks[ticket]: piece for ticket, piece in engine.step().items()}
        for sink, piece in pieces.items():
            if isinstance(piece, Scores) or piece.finish_reason is not None:
                del sinks[tickets.pop(sink)]
        for loop in {sink.loop for sink in pieces}:
            mine = [(sink, piece) for sink, piece in pieces.items() if sink.loop is loop]
            try:
                loop.call_soon_threadsafe(_deliver, mine)
            except RuntimeError:  # that loop is closed: nobody is left to tell
                continue


def _deliver(pieces: list[tuple[_Sink, Piece | Scores]]) -> None:
    for sink, piece in pieces:
        sink.pieces.put_nowait((sink.place, piece))


def _exit_process(reason: str, code: int) -> None:
    print("error: " + " ".join(reason.split()), file=sys.stderr, flush=True)
    os._exit(code)
