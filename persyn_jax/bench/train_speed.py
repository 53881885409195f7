"""How fast and how large a full fine-tuning step is, as ratios in one run of several processes.

Contenders take turns on the same rows, so that a busy machine slows all of them alike. What does
not count: the first turn of each, which compiles, and the step that begins a turn. Training does
not wait for others between its steps, and a process that has waited some seconds may have to ask
the system for its memory again (a tenth of a step, on a virtual machine). Each is a process of its
own (see `bench.peer`), so each has a peak memory of its own.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from persyn_jax.bench.peer import Peer
from persyn_jax.config import config_class
from persyn_jax.models.recompute import Recompute
from persyn_jax.models.spec import ModelConfig


@config_class
class TrainSpeedConfig:
    """What is timed, and how often."""

    model: ModelConfig
    turns: Annotated[int, Field(ge=2)] = 11
    """Of each contender, the first not counted."""
    steps: Annotated[int, Field(ge=2)] = 2
    """Of a turn, the first not counted."""
    rows: Annotated[int, Field(ge=1)] = 8
    """Of a step, over all workers."""
    row_tokens: Annotated[int, Field(ge=2)] = 128
    """All but the first token of a row are targets."""
    recompute: Recompute = "dots"
    gossip_workers: Annotated[int, Field(ge=2)] = 2
    """Of the comparison with and without gossip."""
    seed: Annotated[int, Field(ge=0)] = 0


class Contender(NamedTuple):
    """One of our own: M workers, and whether they exchange in every step."""

    workers: int
    exchange: bool

    @property
    def name(self) -> str:
        with_gossip = ", gossip every step" if self.exchange else ""
        return f"persyn_jax, M = {self.workers}{with_gossip}"


class Row(NamedTuple):
    """A contender: medians over the turns."""

    contender: str
    tokens_per_second: float
    peak_memory_gb: float
    """The largest resident set of its process, in units of 2**30 bytes."""
    first_loss: float
    all_tokens_per_second: list[float]


def comparisons(config: TrainSpeedConfig) -> list[list[Contender]]:
    """One worker, for the peers to be compared with; then several, without and with gossip.

    One after the other, so that no more models are in memory than are compared.
    """
    workers = config.gossip_workers
    return [[Contender(1, False)], [Contender(workers, False), Contender(workers, True)]]


def make_rows(config: TrainSpeedConfig, vocab_size: int, turn: int, step: int) -> list[list[int]]:
    """Random token ids, others in each step."""
    rng = np.random.default_rng([config.seed, turn, step])
    return rng.integers(3, vocab_size, (config.rows, config.row_tokens)).tolist()


def measure(config: TrainSpeedConfig, vocab_size: int, peers: Sequence[Peer]) -> Iterator[Row]:
    """All peers in turn, on each step's rows; then a row for each."""
    steps: dict[str, list[list[dict[str, Any]]]] = {peer.name: [] for peer in peers}
    for turn in range(config.turns):
        lines = [
            json.dumps({"kind": "train", "rows": make_rows(config, vocab_size, turn, step)}) + "\n"
            for step in range(config.steps)
        ]
        for peer in peers:
            steps[peer.name].append([peer.run(line) for line in lines])
    for name, turns in steps.items():
        rates = [
            sum(reply["tokens"] for reply in counted) / sum(reply["seconds"] for reply in counted)
            for _, *counted in turns[1:]
        ]
        memory, loss = turns[-1][-1]["peak_memory_gb"], turns[0][0]["loss"]
        yield Row(name, statistics.median(rates), memory, loss, rates)


def serve(config: TrainSpeedConfig, contender: Contender, folder: Path) -> None:
    """One of our contenders, for `Peer`: the student's own train step on the model in `folder`.

    Reads tasks on standard input until it ends.
    """
    import resource
    import sys
    import time

    from persyn_jax import mesh as meshes

    meshes.start_platform("cpu", contender.workers)
    step = _Steps(config, contender, folder)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        rows = json.loads(line)["rows"]
        started = time.perf_counter()
        loss = step.take(rows)
        reply = {
            "seconds": time.perf_counter() - started,
            "tokens": sum(map(len, rows)),
            "loss": loss,
            "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        print(json.dumps(reply), flush=True)


class _Steps:
    """The train step of `pipeline.train_student`, on batches as they come."""

    def __init__(self, config: TrainSpeedConfig, contender: Contender, folder: Path):
        import functools

        import jax

        from persyn_jax import gossip
        from persyn_jax import mesh as meshes
        from persyn_jax.models import weights
        from persyn_jax.training import sharded
        from persyn_jax.training.config import OptimiserConfig
        from persyn_jax.training.losses import response_loss
        from persyn_jax.training.optimisers import make_optimiser
        from persyn_jax.training.step import init_state

        workers, steps = contender.workers, config.turns * config.steps
        self._config, self._workers, self._taken = config, workers, 0
        self._mesh = mesh = meshes.make_mesh(workers)
        model = weights.load(ModelConfig(weights=str(folder)))
        self._schedule = gossip.gosgd_schedule(
            workers, steps, float(contender.exchange), config.seed
        )
        specs = sharded.parameter_specs(model.params, mesh)
        layout = sharded.chip_layout(specs, mesh)
        loss = functools.partial(response_loss, model.config, config.recompute, layout=layout)
        optimiser = make_optimiser(OptimiserConfig(learning_rate=1e-5, clip_norm=None), steps)
        mixing = gossip.gosgd(
            gossip.Exchange(self._schedule.bank, meshes.WORKER, sharded.INNER_AXES)
        )

        def start(params):
            return jax.vmap(lambda own: init_state(own, optimiser, mixing))(params)

        params = meshes.place_copies(model.params, sharded.all_workers(specs, mesh), workers)
        del model
        shardings = sharded.state_shardings(jax.eval_shape(start, params), mesh, specs)
        self._state = jax.jit(start, out_shardings=shardings, donate_argnums=(0,))(params)
        step = sharded.make_sharded_step(loss, optimiser, mixing, mesh, specs)
        self._step = sharded.on_sharded_mesh(step, mesh, self._state, specs)

    def take(self, rows: list[list[int]]) -> float:
        """The mean loss over the workers; returns when the step is done."""
        import jax
        from jax.sharding import NamedSharding

        from persyn_jax import mesh as meshes
        from persyn_jax.models.rows import Conversation, pack
        from persyn_jax.training.sharded import batch_spec

        c = self._config
        shares = np.split(np.array(rows), self._workers)

        def own(worker: int):
            talks = [
                [Conversation((int(row[0]),), tuple(row[1:].tolist()))] for row in shares[worker]
            ]
            return pack(talks, c.row_tokens, c.row_tokens - 1)

        spec = NamedSharding(self._mesh, batch_spec(self._mesh))
        batch = meshes.place_workers(own, spec, self._workers)
        round = meshes.place(self._schedule.round(self._taken), meshes.replicated(self._mesh))
        self._state, metrics = self._step(self._state, batch, round)
        self._taken += 1
        jax.block_until_ready(self._state)
        return float(np.mean(meshes.read(metrics.loss, self._mesh)))


class Ratio(NamedTuple):
    """A contender against another."""

    contender: str
    reference: str
    speed: float
    """Tokens a second over the reference's."""
    memory: float
    """Peak memory over the reference's."""


def ratio(mine: Row, reference: Row) -> Ratio:
    return Ratio(
        mine.contender,
        reference.contender,
        mine.tokens_per_second / reference.tokens_per_second,
        mine.peak_memory_gb / reference.peak_memory_gb,
    )
