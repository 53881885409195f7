"""Stage train_student: fine-tuning on the routed answers, by workers that gossip."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from persyn_jax import gossip
from persyn_jax import mesh as meshes
from persyn_jax.gossip.theory import contraction
from persyn_jax.models.decoder import Params
from persyn_jax.models.rows import Conversation, Rows
from persyn_jax.models.weights import Model
from persyn_jax.training import checkpoint
from persyn_jax.training.batches import (
    Row,
    batch_rows,
    first_fit,
    hold_out,
    make_plan,
    stack_workers,
)
from persyn_jax.training.config import GossipConfig, TrainConfig
from persyn_jax.training.loop import Taken, run_steps, uniform_mean
from persyn_jax.training.losses import response_loss
from persyn_jax.training.optimisers import make_optimiser
from persyn_jax.training.step import (
    LossFunction,
    TrainState,
    compiled_programs,
    init_state,
    make_train_step,
    on_mesh,
    placed_shapes,
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
    """A finished training, and what was counted on the way."""

    model: Model
    """The uniform mean of the workers."""
    compiled_programs: int
    """Of the train step."""
    held_out: list[int]
    """Indices of the conversations that were held out."""


def train_student(
    load_student: Callable[[], Model],
    conversations: Sequence[Conversation],
    config: StudentTraining,
    mesh: Mesh,
    checkpoints: Path,
    on_start: Callable[[int, int], None],
    on_metrics: Callable[[dict[str, Any]], None],
) -> Trained:
    """Trains from the newest intact checkpoint, or from the start.

    load_student: called when the parameters are needed; they are kept by the workers alone.
    on_start(first step, steps) is called before the first step, on_metrics(row) after each.

    Raises RuntimeError: too few conversations, no checkpoint intact; ValueError: a conversation
    that no row has room for.
    """
    c, workers = config.training, config.gossip.workers
    train, held_out = hold_out(conversations, c.held_out, config.seed)
    if not held_out or len(train) < workers:
        raise RuntimeError(
            f"{len(conversations)} usable answers: training needs one for each of {workers} "
            "workers and one for the held-out loss"
        )
    examples = [conversations[index] for index in train]
    plan = make_plan(examples, c, workers, config.seed)
    schedule = gossip.gosgd_schedule(
        workers, len(plan), config.gossip.exchange_probability, config.seed
    )

    student = load_student()
    loss = functools.partial(response_loss, student.config, c.recompute)
    optimiser = make_optimiser(c.optimiser, len(plan))
    mixing = _mixing(schedule, config.gossip.audit)
    predicted = contraction(schedule).mean_per_round
    start = on_mesh(lambda params: init_state(params, optimiser, mixing), mesh, (0,), donate=True)
    step = on_mesh(make_train_step(loss, optimiser, mixing), mesh, (0, 0, None), donate=True)
    measure = _make_measure(loss, [conversations[index] for index in held_out], c, mesh)

    first, state = _restore_or_start(checkpoints, start, student.params, mesh)
    student = replace(student, params={})
    on_start(first, len(plan))

    def batch_at(number: int) -> Rows:
        return stack_workers([batch_rows(examples, own, c) for own in plan[number]])

    for taken in run_steps(step, state, batch_at, schedule, range(first, len(plan)), mesh):
        number, last = taken.number, taken.number == len(plan) - 1
        tokens = _tokens(examples, plan[number])
        row = _metrics_row(taken, tokens) | _exchange_row(taken, schedule.round(number))
        if last or number % c.measure_every == 0:
            row |= measure(taken.state)
            row |= _contraction_row(row, predicted)
        on_metrics(row)
        if not last and (number + 1) % c.checkpoint_every == 0:
            checkpoint.save(checkpoints, number + 1, taken.state)
    compiled = compiled_programs(step)
    assert compiled == 1, f"one batch shape must compile one program, compiled {compiled}"
    return Trained(replace(student, params=uniform_mean(taken.state.params)), compiled, held_out)


def _mixing(schedule: gossip.Schedule, audit: bool) -> gossip.MixingTransformation:
    exchange = gossip.Exchange(schedule.bank, meshes.WORKER)
    rule = gossip.gosgd(exchange)
    return gossip.audited(rule, gossip.sum_weight_mass, exchange) if audit else rule


def _restore_or_start(
    checkpoints: Path, start: Callable, params: Params, mesh: Mesh
) -> tuple[int, TrainState]:
    """(steps taken, state of all workers): of the newest checkpoint, else of `params`."""
    params_W = stack_on_mesh(params, mesh)
    like = placed_shapes(jax.eval_shape(start, params_W), meshes.per_worker(mesh))
    return checkpoint.restore_newest(checkpoints, like) or (0, start(params_W))


def _metrics_row(taken: Taken, tokens: int) -> dict[str, Any]:
    """A line of metrics.jsonl; the loss of a worker is null where its batch was empty."""
    loss_W, weight_W, norm_W = (field.tolist() for field in taken.metrics)
    return {
        "step": taken.number,
        "loss": [loss if weight else None for loss, weight in zip(loss_W, weight_W, strict=True)],
        "gradient_norm": norm_W,
        "tokens": tokens,
    }


def _exchange_row(taken: Taken, round: gossip.Round) -> dict[str, Any]:
    """What a line of metrics.jsonl says of the exchange, bytes over all workers.

    In a permutation everyone sends, also those whose message has no weight: wire against useful.
    The estimate of the consensus distance is from the distances of those that heard something to
    what they heard, for free; null where nobody did.
    """
    mix_state, workers = taken.state.mix_state, round.weight_KW.shape[1]
    if isinstance(mix_state, gossip.AuditState):
        gossip.check_audit(mix_state)
        mix_state = mix_state.inner
    heard_W = (round.weight_KW > 0).sum(axis=0)
    pushes = int(heard_W.sum())
    model_bytes = sum(leaf.nbytes // workers for leaf in jax.tree.leaves(taken.state.params))
    estimate = None
    if pushes:
        distance_W = np.asarray(mix_state.pair_distance)
        estimate = float(gossip.divergence.estimated_consensus_distance(distance_W, heard_W))
    return {
        "sum_weight": np.asarray(mix_state.sum_weight).tolist(),
        "pushes": pushes,
        "wire_bytes": int(np.count_nonzero(round.branch_K)) * workers * model_bytes,
        "useful_bytes": pushes * model_bytes,
        "estimated_consensus_distance": estimate,
    }


def _contraction_row(row: dict[str, Any], predicted: float) -> dict[str, Any]:
    """The factor of the consensus distance in this step's exchange: that of the exact distance
    after it to the free estimate of that before, beside the schedule's expected one."""
    before = row["estimated_consensus_distance"]
    measured = row["consensus_distance"] / before if before else None
    return {"predicted_contraction": predicted, "measured_contraction": measured}


def _tokens(examples: Sequence[Conversation], rows_by_worker: list[list[Row]]) -> int:
    """Tokens of one step's rows, prompts and answers, over all workers."""
    return sum(examples[i].length for own in rows_by_worker for row in own for i in row)


def _make_measure(
    loss: LossFunction, held_out: list[Conversation], config: TrainConfig, mesh: Mesh
) -> Callable[[TrainState], dict[str, Any]]:
    """A function of the state: held-out loss by worker, and the parameters' consensus distance,
    in all and by group (the top level of the tree)."""
    packed = first_fit(held_out, list(range(len(held_out))), config)
    batch = jax.device_put(batch_rows(held_out, packed, config), meshes.replicated(mesh))

    def one_worker(params, batch):
        mean, _ = loss(params, batch)
        return mean, {
            group: gossip.consensus_distance(part, meshes.WORKER) for group, part in params.items()
        }

    compiled = on_mesh(one_worker, mesh, (0, None))

    def measure(state: TrainState) -> dict[str, Any]:
        loss_W, distances_W = jax.tree.map(np.asarray, compiled(state.params, batch))
        by_group = {group: float(distance_W[0]) for group, distance_W in distances_W.items()}
        return {
            "held_out_loss": loss_W.tolist(),
            "consensus_distance": sum(by_group.values()),
            "consensus_distance_by_group": by_group,
        }

    return measure
