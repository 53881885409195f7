"""How fast the sampling engine and its service are, as ratios against peers, in one run.

The engine and each peer take turns on every task, so that a busy machine slows all of them alike;
the first turn of each, which warms up, is not counted. A peer is a command that reads tasks as
`transformers_peer` does.
"""

import asyncio
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import httpx
import numpy as np
from pydantic import Field

from persyn_jax import mesh as meshes
from persyn_jax.bench.peer import Peer
from persyn_jax.config import config_class
from persyn_jax.models.rows import Conversation
from persyn_jax.models.spec import ModelConfig
from persyn_jax.models.weights import Model
from persyn_jax.sampling import scoring
from persyn_jax.sampling.config import EngineConfig, ServiceConfig
from persyn_jax.sampling.engine import Engine, Request
from persyn_jax.sampling.process import running_service

Kind = Literal["generate", "score", "engine", "http", "stream"]


@config_class
class SpeedConfig:
    """What is timed, and how often."""

    model: ModelConfig
    turns: Annotated[int, Field(ge=2)] = 6
    """Of each contender on each task, the first not counted."""
    batches: tuple[Annotated[int, Field(ge=1)], ...] = (1, 8, 32)
    """Of the generation tasks, and the slots of the engines that do them."""
    prompt_tokens: Annotated[int, Field(ge=1)] = 64
    new_tokens: Annotated[int, Field(ge=1)] = 64
    score_rows: Annotated[int, Field(ge=1)] = 8
    score_tokens: Annotated[int, Field(ge=2)] = 128
    requests: Annotated[int, Field(ge=0)] = 64
    """Concurrent requests of the mixed task: prompts of 16 to 256 tokens, answers of 8 to 128."""
    slots: Annotated[int, Field(ge=1)] = 32
    """Of the engine behind the mixed task, and the peers' batch."""
    seed: Annotated[int, Field(ge=0)] = 0


class Task(NamedTuple):
    """Something to do, the same for all contenders."""

    name: str
    kind: Kind
    prompts: list[list[int]]
    new_tokens: list[int]
    batch: int

    def line(self) -> str:
        """For a peer: the mixed task is to generate, however it is asked."""
        kind = "score" if self.kind == "score" else "generate"
        return json.dumps(self._asdict() | {"kind": kind}) + "\n"


class Row(NamedTuple):
    """A contender on a task: medians over the turns."""

    task: str
    contender: str
    tokens_per_second: float
    ratio: float | None
    """Ours over this contender's; None for our own."""
    all_tokens_per_second: list[float]


def make_tasks(config: SpeedConfig, vocab_size: int, turn: int) -> list[Task]:
    """Random token ids, others in each turn: nothing can be reused."""
    rng = np.random.default_rng([config.seed, turn])

    def ids(length: int) -> list[int]:
        return rng.integers(3, vocab_size, length).tolist()

    tasks = [
        Task(
            f"generate, batch {batch}",
            "generate",
            [ids(config.prompt_tokens) for _ in range(batch)],
            [config.new_tokens] * batch,
            batch,
        )
        for batch in config.batches
    ]
    scored = [ids(config.score_tokens) for _ in range(config.score_rows)]
    tasks.append(Task("score", "score", scored, [], config.score_rows))
    if config.requests:
        prompts = [ids(int(length)) for length in rng.integers(16, 257, config.requests)]
        new = rng.integers(8, 129, config.requests).tolist()
        kinds: tuple[Kind, ...] = ("engine", "http", "stream")
        tasks += [Task(f"mixed, {kind}", kind, prompts, new, config.slots) for kind in kinds]
    return tasks


class _NeverEnds:
    """A tokenizer without EOS, and without text: everybody generates what was asked for."""

    eos_token_id = -1

    def decode(self, *_: Any, **__: Any) -> str:
        return ""


class Ours:
    """The engine in this process, an engine a batch size."""

    def __init__(self, model: Model, config: SpeedConfig):
        self._config = config
        self._mesh = meshes.make_mesh(1)
        self._model = scoring.on_mesh(model, self._mesh)
        self._endless = dataclasses.replace(model, tokenizer=_NeverEnds())
        self._engines: dict[EngineConfig, Engine] = {}

    def run(self, task: Task) -> int:
        """Does it; returns how many tokens count."""
        if task.kind == "score":
            return self._score(task)
        shapes = mixed_engine(self._config) if task.kind == "engine" else self._shapes(task.batch)
        if shapes not in self._engines:
            self._engines[shapes] = Engine(self._endless, shapes)
        requests = [
            Request(tuple(prompt), new)
            for prompt, new in zip(task.prompts, task.new_tokens, strict=True)
        ]
        return sum(c.generated_tokens for c in self._engines[shapes].generate(requests))

    def _shapes(self, batch: int) -> EngineConfig:
        c = self._config
        chunk = 16
        length = -(-(c.prompt_tokens + c.new_tokens) // chunk) * chunk
        rows = min(batch, 8) * -(-c.prompt_tokens // chunk)
        return EngineConfig(
            slots=batch,
            cache_length=length,
            prefill_rows=rows,
            prefill_chunk=chunk,
            decode_steps=8,
            prefix_blocks=rows,
            score_rows=0,
        )

    def _score(self, task: Task) -> int:
        half = len(task.prompts[0]) // 2
        rows = [Conversation(tuple(row[:half]), tuple(row[half:])) for row in task.prompts]
        scoring.mean_log_likelihoods(self._model, rows, self._mesh)
        return sum(len(row) for row in task.prompts)


def mixed_engine(config: SpeedConfig) -> EngineConfig:
    """The engine behind the mixed task."""
    return EngineConfig(
        slots=config.slots,
        cache_length=384,
        prefill_rows=16,
        prefill_chunk=16,
        decode_steps=4,
        prefix_blocks=64,
        score_rows=0,
    )


def _ask_service(url: str, task: Task) -> int:
    return asyncio.run(_ask_all(url, task))


async def _ask_all(url: str, task: Task) -> int:
    """All requests at once, as prompts of token ids; the tokens that came back."""
    limits = httpx.Limits(max_connections=len(task.prompts))
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as http:

        async def ask(prompt: list[int], new: int) -> int:
            body: dict[str, Any] = {"model": "model", "prompt": prompt, "max_tokens": new}
            body |= {"temperature": 0}
            if task.kind == "http":
                reply = await http.post(f"{url}/completions", json=body)
                return reply.raise_for_status().json()["usage"]["completion_tokens"]
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            usage = 0
            async with http.stream("POST", f"{url}/completions", json=body) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        told = json.loads(line.removeprefix("data: ")).get("usage")
                        usage = told["completion_tokens"] if told else usage
            return usage

        asked = [ask(p, n) for p, n in zip(task.prompts, task.new_tokens, strict=True)]
        return sum(await asyncio.gather(*asked))


def measure(config: SpeedConfig, model: Model, peers: Sequence[Peer]) -> Iterator[list[Row]]:
    """Task by task: our row, then a row a peer."""
    vocab = model.config.vocab_size
    numbers: dict[bool, list[int]] = {False: [], True: []}  # by whether the service is asked
    for number, task in enumerate(make_tasks(config, vocab, 0)):
        numbers[task.kind in ("http", "stream")].append(number)
    ours = Ours(model, config)
    for number in numbers[False]:
        yield _compare(config, vocab, number, ours.run, peers)
    del ours  # the service needs the memory
    if numbers[True]:
        service = ServiceConfig(model=config.model, engine=mixed_engine(config))
        with running_service(service, "cpu") as url:
            for number in numbers[True]:
                yield _compare(config, vocab, number, partial(_ask_service, url), peers)


def _compare(
    config: SpeedConfig,
    vocab: int,
    number: int,
    run: Callable[[Task], int],
    peers: Sequence[Peer],
) -> list[Row]:
    rates: list[list[float]] = [[] for _ in range(1 + len(peers))]
    name = ""
    for turn in range(config.turns):
        task = make_tasks(config, vocab, turn)[number]
        name = task.name
        started = time.perf_counter()
        tokens = run(task)
        rates[0].append(tokens / (time.perf_counter() - started))
        for peer, own in zip(peers, rates[1:], strict=True):
            reply = peer.run(task.line())
            own.append(reply["tokens"] / reply["seconds"])
    medians = [statistics.median(own[1:]) for own in rates]
    return [
        Row(name, who, median, medians[0] / median if index else None, own[1:])
        for index, (who, median, own) in enumerate(
            zip(["persyn_jax", *[peer.name for peer in peers]], medians, rates, strict=True)
        )
    ]
