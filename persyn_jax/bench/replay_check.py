"""Whether an engine's answers can be replayed: bitwise, whatever else it is asked and when."""

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from persyn_jax.config import config_class
from persyn_jax.models.spec import ModelConfig
from persyn_jax.models.weights import Model
from persyn_jax.sampling.config import EngineConfig
from persyn_jax.sampling.engine import Engine
from persyn_jax.sampling.requests import Completion, Piece, Request, join


@config_class
class ReplayConfig:
    """What is asked, and how often in another order."""

    model: ModelConfig
    engine: EngineConfig = EngineConfig()
    requests: Annotated[int, Field(ge=1)] = 96
    """With prompts of up to 96 tokens, half of them with a common beginning; every kind of
    sampling; each token with its log-probability."""
    new_tokens: Annotated[int, Field(ge=1)] = 24
    orders: Annotated[int, Field(ge=1)] = 3
    """Random orders of arrival, the last after a restart."""
    alone: Annotated[int, Field(ge=0)] = 4
    """Requests that are also answered with nobody beside them."""
    seed: Annotated[int, Field(ge=0)] = 0


class Replay(NamedTuple):
    """One round of answers against the first."""

    name: str
    answers: int
    changed: int
    """Answers that differ in a token, or in a bit of a log-probability."""
    reused_tokens: int
    """Prompt tokens that came from the prefix pool."""


def replay(config: ReplayConfig, model: Model) -> Iterator[Replay]:
    """All requests at once first; then each round beside it."""
    rng = np.random.default_rng(config.seed)
    requests = make_requests(config, model.config.vocab_size, rng)
    engine = Engine(model, config.engine)
    expected = dict(enumerate(engine.generate(requests)))
    for order in range(config.orders):
        if order == config.orders - 1:
            del engine
            engine = Engine(model, config.engine)
        before = engine.counters.reused_tokens
        found = _in_random_order(engine, requests, rng)
        restarted = ", after a restart" if order == config.orders - 1 else ""
        reused = engine.counters.reused_tokens - before
        yield _compare(f"random order {order}{restarted}", expected, found, reused)
    engine.load_params(model.params)  # nothing is reused
    found = {index: engine.generate([requests[index]])[0] for index in range(config.alone)}
    yield _compare("alone", expected, found, 0)


def make_requests(config: ReplayConfig, vocab_size: int, rng: np.random.Generator) -> list[Request]:
    """Prompts of random token ids, some with a common beginning."""
    common = rng.integers(3, vocab_size, 64).tolist()
    requests = []
    for number in range(config.requests):
        begin = common[: int(rng.integers(65))] if number % 2 else []
        own = rng.integers(3, vocab_size, int(rng.integers(1, 33))).tolist()
        requests.append(
            Request(
                tokens=(*begin, *own),
                max_tokens=config.new_tokens,
                temperature=float(rng.choice([0.0, 0.7, 1.3])),
                top_p=float(rng.choice([0.8, 1.0])),
                top_k=int(rng.choice([0, 40])),
                seed=int(rng.integers(2**32)),
                logprobs=0,
            )
        )
    return requests


def _in_random_order(
    engine: Engine, requests: list[Request], rng: np.random.Generator
) -> dict[int, Completion]:
    """Requests arrive a few at a time while others are under way."""
    waiting = rng.permutation(len(requests)).tolist()
    index_of: dict[int, int] = {}
    pieces: dict[int, list[Piece]] = {}
    while waiting or engine.busy:
        for _ in range(min(len(waiting), int(rng.geometric(0.1)))):
            index = waiting.pop()
            index_of[engine.submit(requests[index])] = index
        for ticket, piece in engine.step().items():
            assert isinstance(piece, Piece)
            pieces.setdefault(index_of[ticket], []).append(piece)
    return {i: join(own, len(requests[i].tokens)) for i, own in pieces.items()}


def _compare(
    name: str, expected: dict[int, Completion], found: dict[int, Completion], reused: int
) -> Replay:
    changed = sum(found[index] != expected[index] for index in found)
    return Replay(name, len(found), changed, reused)
