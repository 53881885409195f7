"""The gossip grid: methods compared on one learning task, at equal steps, bytes, and modelled time.

All workers of several seeds run as one batched array on one device, in the matrix mode: one
compiled program a rule serves all its schedules, faults, learning rates, parameters and seeds.
Learning rates are chosen per method, from equally many, on the tuning seeds; the results are those
of other seeds.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from itertools import product
from typing import Annotated, Literal

import jax
import numpy as np
from pydantic import Field

from persyn_jax.bench.methods import RULES, Faults, Knobs, Method, make_schedule
from persyn_jax.bench.replicas import Curves, Run, train
from persyn_jax.bench.tasks import Task
from persyn_jax.config import config_class, fingerprint
from persyn_jax.gossip.costs import LinkModel, costs
from persyn_jax.gossip.theory import contraction
from persyn_jax.gossip.wire import wire_bytes
from persyn_jax.mesh import Platform
from persyn_jax.streams import jax_stream

Rate = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]
Split = Literal["same", "dirichlet", "one_class"]
Purpose = Literal["tuning", "result"]


@config_class
class Links:
    """The modelled links: see `LinkModel`. The defaults are those of hosts on one 10 Gb network."""

    inside_bandwidth: Annotated[float, Field(gt=0)] = 1.25e9
    inside_latency: Annotated[float, Field(ge=0)] = 50e-6
    between_bandwidth: Annotated[float, Field(gt=0)] = 1.25e9
    between_latency: Annotated[float, Field(ge=0)] = 50e-6
    workers_per_slice: Annotated[int, Field(ge=1)] = 1


@config_class
class GridConfig:
    """One comparison."""

    platform: Platform = "cpu"
    task: Literal["images", "language", "teachers"]
    data: str | None = None
    """Folder or file of the task's data; without it, what the task finds on this machine.
    `teachers` makes its own."""
    workers: Annotated[int, Field(ge=2)]
    steps: Annotated[int, Field(ge=1)]
    batch: Annotated[int, Field(ge=1)]
    """Examples of one worker in one step."""
    evaluate_every: Annotated[int, Field(ge=1)]
    """Steps; a divisor of `steps`."""
    splits: Annotated[tuple[Split, ...], Field(min_length=1)] = ("same",)
    concentration: Annotated[float, Field(gt=0)] = 0.3
    """Of the Dirichlet split: the smaller, the less alike are the workers' data."""
    learning_rates: Annotated[tuple[Rate, ...], Field(min_length=1)]
    """Of SGD. With a single one there is nothing to choose, and no tuning."""
    tuning_seeds: Annotated[list[Seed], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """These run at once, and tuning runs in batches of as many."""
    step_seconds: Annotated[float, Field(gt=0)]
    """Of a local step, in the model of time."""
    links: Links = Links()
    faults: Annotated[tuple[Faults, ...], Field(min_length=1)] = (Faults(),)
    methods: Annotated[list[Method], Field(min_length=1)]

    def __post_init__(self):
        if self.steps % self.evaluate_every:
            raise ValueError(
                f"evaluate_every must divide steps ({self.steps}), got {self.evaluate_every}"
            )
        both = sorted(set(self.seeds) & set(self.tuning_seeds))
        if both:
            raise ValueError(f"seeds and tuning_seeds must differ, both have {both}")
        for key in ("learning_rates", "tuning_seeds", "seeds", "splits"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ValueError(f"{key}: each once, got {getattr(self, key)}")
        for key, named in (("methods", self.methods), ("faults", self.faults)):
            names = [entry.name for entry in named]
            if len(set(names)) < len(names):
                raise ValueError(f"{key}: each once, got {max(names, key=names.count)!r} twice")
        for fault in self.faults:
            if fault.dead_workers >= self.workers:
                raise ValueError(
                    f"faults: of {self.workers} workers {fault.dead_workers} cannot die"
                )
        for method in self.methods:
            self._check(method)
        LinkModel(**vars(self.links)).slices(self.workers)

    def _check(self, method: Method) -> None:
        trials = len(self.learning_rates)
        if len(self.learning_rates_of(method)) != trials:
            raise ValueError(f"{method.name}: learning_rates must be {trials}, as for all methods")
        for fault in self.faults:
            make_schedule(method, fault, self.workers, 2, seed=0)

    def learning_rates_of(self, method: Method) -> tuple[float, ...]:
        return method.learning_rates or self.learning_rates

    @property
    def row_count(self) -> int:
        rates = len(self.learning_rates)
        trials = rates * len(self.tuning_seeds) if rates > 1 else 0
        settings = len(self.splits) * len(self.faults)
        return settings * len(self.methods) * (trials + len(self.seeds))


@dataclass(frozen=True)
class Cell:
    """One run: everything that its result depends on."""

    method: Method
    fault: Faults
    split: Split
    learning_rate: float
    seed: int


@config_class
class GridRow:
    """The result of one cell. Lists have an entry an evaluation, the first before any step; null
    where there is nothing to measure or it is not finite."""

    key: str
    """Fingerprint of what the result depends on; a row with this key is never run again."""
    purpose: Purpose
    """Whether it serves to choose the learning rate."""
    task: str
    """And its data."""
    method: str
    """Rule, schedule and parameters, in short."""
    rule: str
    schedule: str
    M: int
    """Number of workers."""
    p: float | None
    """Exchange probability; null for a schedule that has none."""
    parameters: dict[str, float]
    """Of rule and schedule, as the config has them; p is among them, if there is one."""
    split: str
    """Of the data among the workers."""
    faults: str
    learning_rate: float
    seed: int
    contraction: float
    """Predicted for the schedule with its faults: the factor of the consensus distance in a round,
    if x <- W x, W being its pull matrix, and nobody learns. Rules with sum weights or a centre mix
    otherwise."""
    steps: list[int]
    wire_bytes: list[float]
    """What a worker has sent so far, in lock step: all move when one does."""
    useful_bytes: list[float]
    """The part of it that somebody took in, exact means included."""
    seconds: list[float]
    """Modelled: local steps and exchanges, one after the other."""
    train_loss: list[float | None]
    """Mean over the workers and the steps since the last evaluation."""
    test_loss: list[float | None]
    """Of the model that the method would return: the centre of `easgd` and `downpour`, else the
    uniform mean of the workers that are there."""
    accuracy: list[float | None]
    """Of the same model, between 0 and 1."""
    consensus_distance: list[float | None]
    """sum_m ||x_m - xbar||^2 over the workers that are there."""
    output_divergence: list[float | None]
    """Jensen-Shannon divergence between what all workers, the dead too, answer to a batch of test
    data; in nats."""
    sum_weight_spread: list[float | None]
    """Standard deviation of the sum weights of the workers that are there, over their mean; null
    for rules without."""
    wall_seconds: float
    """What its batch took here, compiling included, divided by the number of runs in it."""


MakeTask = Callable[..., Task]
"""As `persyn_jax.bench.tasks.make_task`."""
TaskOf = Callable[[Split, int], Task]
"""The task of a seed: the same data, dealt out to the workers anew."""


def run_grid(
    config: GridConfig, make_task: MakeTask, finished: Mapping[str, GridRow]
) -> Iterator[list[GridRow]]:
    """All rows of the comparison, in batches, as soon as they are there.

    Of each method under each split and fault all learning rates run on the tuning seeds, and then
    the best of them, by final test loss, on the others.

    finished: rows by key. Such a cell is not run again, only its costs are computed anew.
    """
    task_of = cache(partial(_task, config, make_task))
    for split, fault, method in product(config.splits, config.faults, config.methods):
        cell_of = partial(Cell, method, fault, split)
        rates = config.learning_rates_of(method)
        trials = []
        if len(rates) > 1:
            cells = [cell_of(rate, seed) for rate in rates for seed in config.tuning_seeds]
            for rows in _batches(config, cells, "tuning", task_of, finished):
                yield rows
                trials += rows
        best = best_learning_rate(trials) if trials else rates[0]
        cells = [cell_of(best, seed) for seed in config.seeds]
        yield from _batches(config, cells, "result", task_of, finished)


def best_learning_rate(rows: Sequence[GridRow]) -> float:
    """The one with the smallest mean of the final test losses; a run that diverged has none."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        last = row.test_loss[-1]
        losses.setdefault(row.learning_rate, []).append(np.inf if last is None else last)
    return min(losses, key=lambda rate: (np.mean(losses[rate]), rate))


def _batches(
    config: GridConfig,
    cells: Sequence[Cell],
    purpose: Purpose,
    task_of: TaskOf,
    finished: Mapping[str, GridRow],
) -> Iterator[list[GridRow]]:
    """The rows of cells of one method, as many at once as there are seeds."""
    size = len(config.seeds)
    for first in range(0, len(cells), size):
        runs = {cell: _run(config, cell, task_of) for cell in cells[first : first + size]}
        keys = {cell: _key(config, cell, run.task) for cell, run in runs.items()}
        results = {cell: _result_of(finished[key]) for cell, key in keys.items() if key in finished}
        missing = [cell for cell in runs if cell not in results]
        if missing:
            started = time.monotonic()
            # Filled up with copies, so that one program serves all batches.
            batch = [runs[cell] for cell in missing + missing[-1:] * (size - len(missing))]
            curves = train(missing[0].method.rule, batch, config.steps, config.evaluate_every)
            share = (time.monotonic() - started) / len(missing)
            results |= {cell: (curve, share) for cell, curve in zip(missing, curves, strict=False)}
        yield [
            _row(config, cell, run, keys[cell], purpose, *results[cell])
            for cell, run in runs.items()
        ]


def _result_of(row: GridRow) -> tuple[Curves, float]:
    """What took time: the curves, and how much."""
    return Curves(**{field.name: getattr(row, field.name) for field in fields(Curves)}), (
        row.wall_seconds
    )


def _run(config: GridConfig, cell: Cell, task_of: TaskOf) -> Run:
    method = cell.method
    return Run(
        task=task_of(cell.split, cell.seed),
        schedule=make_schedule(method, cell.fault, config.workers, config.steps, cell.seed),
        knobs=Knobs(cell.learning_rate, method.rate or 0.0, method.momentum or 0.0),
        seed=cell.seed,
    )


def _row(
    config: GridConfig,
    cell: Cell,
    run: Run,
    key: str,
    purpose: Purpose,
    curves: Curves,
    wall_seconds: float,
) -> GridRow:
    method = cell.method
    cost = costs(run.schedule, _message_bytes(run, method.rule), LinkModel(**vars(config.links)))

    def so_far(per_round_T: np.ndarray) -> list[float]:
        total_T = np.concatenate([[0.0], per_round_T[: config.steps].cumsum()])
        return total_T[:: config.evaluate_every].tolist()

    return GridRow(
        key=key,
        purpose=purpose,
        task=run.task.name,
        method=method.name,
        rule=method.rule,
        schedule=method.schedule_key,
        M=config.workers,
        p=method.exchange_probability,
        parameters=method.parameters,
        split=cell.split,
        faults=cell.fault.name,
        learning_rate=cell.learning_rate,
        seed=cell.seed,
        contraction=contraction(run.schedule).mean_per_round,
        steps=list(range(0, config.steps + 1, config.evaluate_every)),
        wire_bytes=so_far(cost.inside_T + cost.between_T),
        useful_bytes=so_far(cost.useful_inside_T + cost.useful_between_T),
        seconds=so_far(config.step_seconds + cost.seconds_T),
        wall_seconds=round(wall_seconds, 1),
        **vars(curves),
    )


def _message_bytes(run: Run, rule: str) -> int:
    """What one model takes on its way."""
    params = jax.eval_shape(run.task.init, jax_stream(run.seed, "start"))
    sizes = (
        wire_bytes(leaf.shape, leaf.dtype, RULES[rule].travels_as)
        for leaf in jax.tree.leaves(params)
    )
    return sum(sizes) + RULES[rule].weight_bytes


def _task(config: GridConfig, make_task: MakeTask, split: Split, seed: int) -> Task:
    return make_task(
        config.task,
        config.data,
        workers=config.workers,
        batch=config.batch,
        split=split,
        concentration=config.concentration,
        seed=seed,
    )


def _key(config: GridConfig, cell: Cell, task: Task) -> str:
    """Of all that the curves depend on, and of nothing else."""
    values = {
        name: getattr(config, name)
        for name in ("data", "workers", "steps", "batch", "evaluate_every")
    }
    if cell.split == "dirichlet":
        values["concentration"] = config.concentration
    return fingerprint(
        {
            **values,
            "task": task.name,
            "rule": cell.method.rule,
            "schedule": cell.method.schedule_key,
            "parameters": cell.method.parameters,
            "fault": vars(cell.fault),
            "split": cell.split,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
        }
    )
