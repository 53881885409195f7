"""Training of many workers on one device: those of several runs of one rule, as one batched array.

Axis R is that of the runs. They share a compiled program, and nothing else: a run's numbers do not
depend on its neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from persyn_jax import gossip
from persyn_jax.bench.methods import RULES, Knobs
from persyn_jax.bench.tasks import Task
from persyn_jax.gossip.base import Array
from persyn_jax.gossip.divergence import output_divergence
from persyn_jax.mesh import WORKER
from persyn_jax.streams import jax_stream
from persyn_jax.training.step import TrainState, init_state, make_train_step


@dataclass(frozen=True)
class Run:
    """All workers of one method, from one seed."""

    task: Task
    schedule: gossip.Schedule
    knobs: Knobs
    seed: int
    """Of the parameters that all workers start from."""


@dataclass(frozen=True)
class Curves:
    """What is measured of a run: an entry an evaluation, the first before any step; None where
    there is nothing to measure or it is not finite. `GridRow` says what each is."""

    train_loss: list[float | None]
    test_loss: list[float | None]
    accuracy: list[float | None]
    consensus_distance: list[float | None]
    output_divergence: list[float | None]
    sum_weight_spread: list[float | None]


def train(rule: str, runs: Sequence[Run], steps: int, evaluate_every: int) -> list[Curves]:
    """Trains runs of one rule at once. One program serves all calls with as many runs."""
    program = make_program(rule, runs[0].schedule.workers, runs[0].task.loss, runs[0].task.logits)
    knobs_R = Knobs(*np.array([run.knobs for run in runs], np.float32).T)
    start_R = [run.task.init(jax_stream(run.seed, "start")) for run in runs]
    tables = [run.schedule.dense().table() for run in runs]
    rounds_TR = jax.tree.map(lambda *columns: np.stack([c[:steps] for c in columns], 1), *tables)

    state = program.start(_stacked(start_R), knobs_R)
    points_R = [[point] for point in _measure(program, state, knobs_R, runs, 0, None)]
    for first in range(0, steps, evaluate_every):
        losses_TRW = []
        for step in range(first, first + evaluate_every):
            batch_RW = _stacked([run.task.batches(step) for run in runs])
            state, loss_RW = program.step(state, batch_RW, _row(rounds_TR, step), knobs_R)
            losses_TRW.append(loss_RW)
        loss_R = np.mean(np.asarray(losses_TRW, np.float64), axis=(0, 2))
        for points, point in zip(
            points_R, _measure(program, state, knobs_R, runs, step, loss_R), strict=True
        ):
            points.append(point)
    return [Curves(*map(list, zip(*points, strict=True))) for points in points_R]


class View(NamedTuple):
    """What a program measures of a run; NaN for what the rule or the task does not have."""

    model: Any
    """That the method would return."""
    consensus_distance: Array
    output_divergence: Array
    sum_weight_spread: Array


class Program(NamedTuple):
    """The compiled functions of a rule, for any number of runs. Leaves of a state: [R, W, ...]."""

    start: Callable[[Any, Knobs], TrainState]
    """(params [R, ...], knobs): the state before the first step."""
    step: jax.stages.Wrapped
    """(state, batches [R, W, ...], rounds [R, ...], knobs) -> (state, losses [R, W])."""
    view: Callable[[TrainState, Array, Any, Knobs], View]
    """(state, present [R, W], probe batch, knobs), each leaf of the view [R, ...]."""


@cache
def make_program(rule: str, workers: int, loss: Callable, logits: Callable | None) -> Program:
    """In the matrix mode, so that schedules are data, as are the knobs."""
    exchange = gossip.Exchange(gossip.Dense(workers), WORKER)

    def parts(knobs: Knobs):
        return optax.sgd(knobs.learning_rate), RULES[rule].make(exchange, knobs)

    def start(params, knobs):
        state = init_state(params, *parts(knobs))
        return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], workers, axis=0), state)

    def worker_step(state, batch, round, knobs):
        def with_weight(params, batch):
            return loss(params, batch), jnp.float32(1)

        state, metrics = make_train_step(with_weight, *parts(knobs))(state, batch, round)
        return state, metrics.loss

    def view(state, present_W, probe, knobs):
        _, mixing = parts(knobs)
        params_W = jax.vmap(mixing.evaluate_at)(state.params, state.mix_state)
        mean = jax.tree.map(lambda leaf_W: _mean(leaf_W, present_W), params_W)
        distances = jax.tree.map(
            lambda leaf_W, leaf: present_W @ _row_sums((leaf_W - leaf[None]) ** 2), params_W, mean
        )
        centre = _centre(state.mix_state)
        return View(
            mean if centre is None else centre,
            sum(jax.tree.leaves(distances), jnp.float32(0)),
            _divergence(logits, params_W, probe),
            _spread(state.mix_state, present_W),
        )

    step = jax.vmap(worker_step, in_axes=(0, 0, None, None), axis_name=WORKER)
    return Program(
        jax.jit(jax.vmap(start)),
        jax.jit(jax.vmap(step), donate_argnums=0),
        jax.jit(jax.vmap(view, in_axes=(0, 0, None, 0))),
    )


def _divergence(logits: Callable | None, params_W: Any, probe: Any) -> jax.Array:
    if logits is None:
        return jnp.float32(jnp.nan)
    logits_WBV = jax.vmap(logits, in_axes=(0, None))(params_W, probe)
    return output_divergence(logits_WBV)


def _spread(mix_state: Any, present_W: Array) -> jax.Array:
    """Of the sum weights, for the rules that have some."""
    weight_W = getattr(mix_state, "sum_weight", None)
    if weight_W is None:
        return jnp.float32(jnp.nan)
    mean = _mean(weight_W, present_W)
    return jnp.sqrt(_mean((weight_W - mean) ** 2, present_W)) / mean


def _centre(mix_state: Any) -> Any:
    """Of the rules that have one, of which every worker holds the same copy."""
    return jax.tree.map(lambda leaf_W: leaf_W[0], getattr(mix_state, "centre", None))


def _mean(leaf_W: Array, present_W: Array) -> jax.Array:
    return jnp.tensordot(present_W / present_W.sum(), leaf_W, 1)


def _row_sums(leaf_W: Array) -> jax.Array:
    return leaf_W.reshape(len(leaf_W), -1).sum(axis=1)


def _measure(
    program: Program,
    state: TrainState,
    knobs_R: Knobs,
    runs: Sequence[Run],
    step: int,
    train_loss_R: np.ndarray | None,
) -> list[tuple[float | None, ...]]:
    """An entry of `Curves` for each run, as it is after `step`."""
    present_RW = np.array([run.schedule.present_TW[step] for run in runs], np.float32)
    views = jax.device_get(program.view(state, present_RW, runs[0].task.probe, knobs_R))
    points = []
    for index, run in enumerate(runs):
        view = _row(views, index)
        scores = run.task.evaluate(view.model)
        values = (
            np.nan if train_loss_R is None else train_loss_R[index],
            scores["loss"],
            scores["accuracy"],
            *view[1:],
        )
        points.append(tuple(float(value) if np.isfinite(value) else None for value in values))
    return points


def _row(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
