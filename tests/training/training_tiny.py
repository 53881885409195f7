"""Two small trainings for the tests of this folder: of a language model, and of a router's head."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from persyn_jax import gossip
from persyn_jax.mesh import WORKER, make_mesh
from persyn_jax.models import decoder
from persyn_jax.models.rows import Conversation
from persyn_jax.models.weights import RANDOM_TINY
from persyn_jax.streams import numpy_stream
from persyn_jax.training.batches import batch_rows, make_plan, stack_workers
from persyn_jax.training.config import TrainConfig
from persyn_jax.training.losses import Pairs, bradley_terry_loss, response_loss
from persyn_jax.training.step import (
    LossFunction,
    TrainState,
    init_state,
    make_train_step,
    on_mesh,
    stack_on_mesh,
)

CONFIG = TrainConfig(epochs=2, rows=2, row_tokens=24, row_response_tokens=10)
LOSS = functools.partial(response_loss, RANDOM_TINY, "nothing")
TEACHERS, WIDTH = 5, 3


@dataclass(frozen=True)
class Training:
    """A loss, its batches by step, and what mixes the workers."""

    params: Any
    loss: LossFunction
    batch_at: Callable[[int], Any]
    schedule: gossip.Schedule
    optimiser: optax.GradientTransformation
    mixing: gossip.MixingTransformation

    @property
    def workers(self) -> int:
        return self.schedule.bank.workers

    @property
    def steps(self) -> range:
        return range(self.schedule.rounds)

    @functools.cached_property
    def mesh(self):
        return make_mesh(self.workers)

    @functools.cached_property
    def one_step(self):
        """Of one worker, to be laid out."""
        return make_train_step(self.loss, self.optimiser, self.mixing)

    @functools.cached_property
    def mesh_step(self):
        return on_mesh(self.one_step, self.mesh, (0, 0, None))

    def start(self, params: Any) -> TrainState:
        return init_state(params, self.optimiser, self.mixing)

    def mesh_start(self) -> TrainState:
        return on_mesh(self.start, self.mesh, (0,))(stack_on_mesh(self.params, self.mesh))


def language_training(workers: int, probability: float) -> Training:
    """A tiny decoder on random conversations; each worker has its own."""
    examples = make_conversations(8 * workers)
    plan = make_plan(examples, CONFIG, workers, seed=5)
    schedule = gossip.gosgd_schedule(workers, len(plan), probability, seed=3)

    def batch_at(number: int):
        return stack_workers([batch_rows(examples, own, CONFIG) for own in plan[number]])

    return Training(
        params=tiny_params(),
        loss=LOSS,
        batch_at=batch_at,
        schedule=schedule,
        optimiser=optax.adamw(1e-2, weight_decay=0.01),
        mixing=gossip.gosgd(gossip.Exchange(schedule.bank, WORKER)),
    )


def head_training(
    workers: int, probability: float, rounds: int = 40, learning_rate: float = 0.1
) -> Training:
    """A router's head on random preferences, other ones for every worker and step."""
    schedule = gossip.gosgd_schedule(workers, rounds, probability, seed=3)

    def batch_at(number: int) -> Pairs:
        return Pairs(
            *map(
                np.stack,
                zip(*[make_pairs(number, worker) for worker in range(workers)], strict=True),
            )
        )

    return Training(
        params=make_head(0),
        loss=bradley_terry_loss,
        batch_at=batch_at,
        schedule=schedule,
        optimiser=optax.adamw(learning_rate, weight_decay=0.01),
        mixing=gossip.gosgd(gossip.Exchange(schedule.bank, WORKER)),
    )


def tiny_params() -> dict:
    """Random parameters, the embedding ten times its usual size, so that tokens differ a lot."""
    params = decoder.init(RANDOM_TINY, jax.random.key(0))
    return params | {"embed": jax.tree.map(lambda leaf: 10 * leaf, params["embed"])}


def make_conversations(count: int) -> list[Conversation]:
    """Conversations of 4 to 12 tokens, 1 to 5 of them response."""
    draw = numpy_stream(0, "conversations")

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.integers(3, RANDOM_TINY.vocab_size, draw.integers(low, high)).tolist())

    return [Conversation(tokens(3, 8), tokens(1, 6)) for _ in range(count)]


def make_pairs(*seed: int, count: int = 7) -> Pairs:
    draw = np.random.default_rng(seed)
    winner = draw.integers(0, TEACHERS, count)
    loser = (winner + draw.integers(1, TEACHERS, count)) % TEACHERS
    return Pairs(
        pooled=draw.normal(size=(count, WIDTH)).astype(np.float32),
        winner=winner.astype(np.int32),
        loser=loser.astype(np.int32),
        weights=np.ones(count, np.float32),
    )


def make_head(seed: int) -> dict:
    draw = np.random.default_rng(seed)
    return {
        "kernel": draw.normal(size=(TEACHERS, WIDTH)).astype(np.float32),
        "bias": draw.normal(size=TEACHERS).astype(np.float32),
    }


def stacked(tree: Any, workers: int) -> Any:
    """`tree` with W equal copies along a new leading axis, as NumPy."""
    return jax.tree.map(lambda leaf: np.stack([np.asarray(leaf)] * workers), tree)


def assert_bitwise_equal(one: Any, other: Any) -> None:
    """Same tree, and every leaf with the same shape, dtype and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())
