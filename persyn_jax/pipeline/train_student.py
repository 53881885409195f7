"""Stage train_student: fine-tuning on the routed answers, by workers that gossip."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from persyn_jax import gossip, mesh as meshes
from persyn_jax.models.decoder import Params
from persyn_jax.models.rows import Conversation
from persyn_jax.models.weights import Model
from persyn_jax.training import checkpoint
from persyn_jax.training.batches import batch_rows, first_fit, hold_out, make_plan, stack_workers
from persyn_jax.training.config import GossipConfig, TrainConfig
from persyn_jax.training.loop import make_optimiser, run_steps, uniform_mean
from persyn_jax.training.losses import response_loss
from persyn_jax.training.step import (
    TrainState,
    init_state,
    make_train_step,
    on_mesh,
    stack_on_mesh,
)


@dataclass(frozen=True)
class StudentTraining:
    """What the student's training needs to know."""

    training: TrainConfig
    gossip: GossipConfig
    seed: int


@dataclass(frozen=True)
class Trained:
    """A finished training: the uniform mean of the workers, and what was counted on the way."""

    params: Params
    compiled_programs: int
    held_out: list[int]
    """Indices of the conversations that were held out."""


def train_student(
    student: Model,
    conversations: Sequence[Conversation],
    config: StudentTraining,
    mesh: Mesh,
    checkpoints: Path,
    on_start: Callable[[int, int], None],
    on_metrics: Callable[[dict[str, Any]], None],
) -> Trained:
    """Trains from the newest intact checkpoint, or from the start.

    on_start(first step, steps) is called before the first step; on_metrics(row) after each.
    The student's parameters are given up as soon as the workers have theirs.
    """
    c = config.training
    train, held_out = hold_out(conversations, c.held_out, config.seed)
    examples = [conversations[index] for index in train]
    workers = config.gossip.workers
    plan = make_plan(examples, c, workers, config.seed)
    schedule = gossip.gosgd_schedule(
        workers, len(plan), config.gossip.exchange_probability, config.seed
    )
    messages_T = schedule.messages()
    optimiser = make_optimiser(c.optimiser, len(plan))
    mixing = gossip.gosgd(schedule.bank, meshes.WORKER)
    loss = functools.partial(response_loss, student.config, c.recompute)
    step = on_mesh(make_train_step(loss, optimiser, mixing), mesh, replicated=1, donate=True)
    measure = _make_measure(loss, [conversations[index] for index in held_out], c, mesh)

    state = on_mesh(lambda params: init_state(params, optimiser, mixing), mesh, donate=True)(
        stack_on_mesh(student.params, mesh)
    )
    first = 0
    if (restored := checkpoint.restore_newest(checkpoints, like=state)) is not None:
        first, state = restored
    on_start(first, len(plan))

    def batch_at(number: int):
        return stack_workers([batch_rows(examples, own, c) for own in plan[number]])

    for number, state, metrics in run_steps(
        step, state, batch_at, schedule, range(first, len(plan)), mesh
    ):
        last = number == len(plan) - 1
        row = {
            "step": number,
            "loss": metrics.loss.tolist(),
            "gradient_norm": metrics.gradient_norm.tolist(),
            "sum_weight": np.asarray(state.mix_state.sum_weight).tolist(),
            "pushes": int(messages_T[number]),
            "tokens": sum(examples[i].length for own in plan[number] for row in own for i in row),
        }
        if last or number % c.measure_every == 0:
            row |= measure(state)
        on_metrics(row)
        if not last and (number + 1) % c.checkpoint_every == 0:
            checkpoint.save(checkpoints, number + 1, state)
    compiled = step._cache_size()
    assert compiled <= 1, f"one batch shape must compile one program, compiled {compiled}"
    return Trained(uniform_mean(state.params), compiled, held_out)


def _make_measure(
    loss: Callable, held_out: list[Conversation], config: TrainConfig, mesh: Mesh
) -> Callable[[TrainState], dict[str, Any]]:
    """A function of the state: held-out loss by worker, and the consensus distance of the parameters."""
    packed = first_fit(held_out, list(range(len(held_out))), config)
    batch = jax.device_put(batch_rows(held_out, packed, config), meshes.replicated(mesh))

    def one_worker(params, batch):
        mean, _ = loss(params, batch)
        return mean, gossip.consensus_distance(params, meshes.WORKER)

    compiled = on_mesh(one_worker, mesh, replicated=1)

    def measure(state: TrainState) -> dict[str, Any]:
        loss_W, distance_W = jax.tree.map(np.asarray, compiled(state.params, batch))
        return {"held_out_loss": loss_W.tolist(), "consensus_distance": float(distance_W[0])}

    return measure

