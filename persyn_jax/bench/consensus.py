"""GoSGD's consensus experiment: how far apart are workers that only ever make random steps?

Gradients are replaced by independent noise, the worst case for consensus: in each unit of time (a
round) every worker adds v ~ N(0, I_D) to its parameters, all start at 0, and one looks at

    eps = sum_m ||x_m - xbar||^2,    here always divided by D,

with x_m the parameters that worker m holds when the unit is over (a message that its receiver has
not merged yet does not count). Every rule here is linear: given who sends to whom, x <- W (x + v).
So C, the covariance of one coordinate of all workers, is known exactly,

    C <- W (C + I) W',    E[eps / D] = trace(C) - sum(C) / M,

and stands beside what the rule's own code makes of real noise.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from pydantic import Field

from persyn_jax import gossip
from persyn_jax.config import config_class
from persyn_jax.gossip import compose, simulate, topologies
from persyn_jax.gossip.banks import is_power_of_two
from persyn_jax.gossip.theory import predicted_consensus_of_table
from persyn_jax.mesh import WORKER
from persyn_jax.streams import jax_stream

CHUNK = 50
"""Units of time in one call of a compiled program: so one program serves runs of any length."""
BATCHES = 20
"""Of a run, for the standard error of its mean. Long against the memory of eps: 2 / p units."""
STARTUP = 15
"""1 / this of a run is not counted: there eps still rises from 0."""
LOCAL_SGD = "local SGD"


@config_class
class ConsensusConfig:
    """One consensus experiment."""

    workers: Annotated[int, Field(ge=2)] = 8
    dimension: Annotated[int, Field(ge=1)] = 64
    """Of each worker's parameters."""
    exchange_probabilities: list[Annotated[float, Field(gt=0, le=1)]]
    rounds_per_exchange: Annotated[int, Field(ge=100)] = 1500
    """A run takes this many rounds / exchange probability; ten times as many if it has none."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """Of the asynchronous run. Schedules in lock step take the first."""


@dataclass(frozen=True)
class ConsensusRow:
    """One run. All values of eps are divided by the dimension, as means over the run's time."""

    schedule: str
    rule: str
    M: int
    """Number of workers."""
    p: float | None
    """Exchange probability; null for a schedule that has none."""
    seed: int
    rounds: int
    """Units of time."""
    bytes: int
    """Sent by all workers in the whole run, as float32; of an exact mean, what a ring all-reduce
    sends."""
    predicted: float
    """eps, expected given the schedule."""
    measured: float
    """eps."""
    standard_error: float
    """Of `measured`, as an estimate of what an endless run would give."""
    difference_error: float
    """Standard error of `measured` - `predicted`. They share the schedule, so it is smaller."""
    deviation: float
    """Standard deviation of eps over time."""


class Series(NamedTuple):
    """eps / D over time."""

    measured_T: np.ndarray
    predicted_T: np.ndarray
    """Expected given the schedule."""


def run_consensus(config: ConsensusConfig) -> Iterator[ConsensusRow]:
    """Every run of the experiment, as soon as it is done."""
    first = config.seeds[0]
    for p in config.exchange_probabilities:
        rounds = round(config.rounds_per_exchange / p)
        for seed in config.seeds:
            yield from event_driven_rows(config, p, rounds, seed)
        for name, (rule, schedule) in schedules_with_p(config.workers, rounds, p, first).items():
            yield from lock_step_rows(name, rule, schedule, config, p, first)
    rounds = 10 * config.rounds_per_exchange
    for name, schedule in schedules_without_p(config.workers, rounds, first).items():
        yield from lock_step_rows(name, "d_psgd", schedule, config, None, first)


def schedules_with_p(
    workers: int, rounds: int, p: float, seed: int
) -> dict[str, tuple[str, gossip.Schedule]]:
    """(rule, schedule) of those that exchange with a probability, or every 1 / p rounds."""
    period = max(round(1 / p), 1)
    return {
        "GoSGD lock step": ("gosgd", topologies.gosgd_schedule(workers, rounds, p, seed)),
        "GoSGD common coin": ("gosgd", topologies.common_coin(workers, rounds, p, seed)),
        LOCAL_SGD: ("d_psgd", topologies.local_sgd_schedule(workers, rounds, period)),
    }


def schedules_without_p(workers: int, rounds: int, seed: int) -> dict[str, gossip.Schedule]:
    """All others that the number of workers allows."""
    rings = 2 if workers % 2 == 0 else 1
    ring = topologies.ring(workers, rounds)
    schedules = {
        "complete": topologies.complete(workers, rounds),
        "complete by edges": topologies.complete_by_edges(workers, rounds),
        "star": topologies.star(workers, rounds),
        "ring": ring,
        "ring + mean every 10": compose.periodic_average(ring, 10),
        "torus": topologies.torus(rings, workers // rings, rounds),
        "static exponential": topologies.static_exponential(workers, rounds),
        "one-peer exponential": topologies.one_peer_exponential(workers, rounds),
        "base 2": topologies.base_k_plus_1(workers, rounds, degree=1),
        "base 4": topologies.base_k_plus_1(workers, rounds, degree=3),
        "D-EquiStatic": topologies.d_equi_static(workers, rounds, 4, seed),
        "U-EquiStatic": topologies.u_equi_static(workers, rounds, 4, seed),
        "random shift": topologies.random_shift(workers, rounds, seed),
        "random matching": topologies.random_matching(workers, rounds, seed),
        "OU-EquiDyn": topologies.ou_equi_dyn(workers, rounds, seed),
        "random pull": topologies.random_pull(workers, rounds, seed),
    }
    if is_power_of_two(workers):
        schedules["random XOR"] = topologies.random_xor(workers, rounds, seed)
        schedules["hypercube"] = topologies.hypercube(workers, rounds)
    if rings == 2:
        between = topologies.random_shift(workers // 2, rounds // 2, seed)
        schedules["pairs, random shift"] = compose.hierarchical(between, slice_size=2)
    return schedules


# The asynchronous run.

CLOCKS = {
    "GoSGD round": simulate.constant(1.0),  # all act once in a unit of time, one after the other
    "GoSGD tick": simulate.exponential(1.0),  # random awakenings, on average one each in a unit
}


def event_driven_rows(
    config: ConsensusConfig, p: float, rounds: int, seed: int
) -> Iterator[ConsensusRow]:
    for name, compute_time in CLOCKS.items():
        events = simulate.asynchronous_run(
            config.workers, p, rounds, seed, compute_time, simulate.constant(0.0)
        )
        series = event_driven(events, config.dimension, seed)
        sent = int(events.pushes.sum()) * 4 * (config.dimension + 1)
        yield _row(name, "gosgd", config.workers, p, seed, sent, series)


def event_driven(events: simulate.Events, dimension: int, seed: int) -> Series:
    """eps after every W-th awakening: with equal paces, at the end of every unit of time.

    For runs without delay, where a worker needs at most one mailbox.
    """
    plan, workers = simulate.make_plan(events), events.workers
    units = len(events.time_E) // workers
    moves_TW = jax.tree.map(lambda leaf: leaf[: units * workers].reshape(-1, workers), plan.moves)
    places = 2 * workers + 2  # one size for all runs: one program
    assert len(plan.sum_weight_P) <= places
    with jax.enable_x64(True):
        carry = jnp.zeros((places, dimension), jnp.float32), jnp.zeros((places, places))
        run = partial(_event_program(workers), jax_stream(seed, "consensus noise"))
        return Series(*_in_chunks(run, carry, moves_TW))


@cache
def _event_program(workers: int):
    """Compiled: runs awakenings [T, W] on noise and on the covariance, side by side."""

    def wake(key, carry, move):
        x_PD, covariance_PP = carry

        def add_noise(x_D, state, worker, event):
            noise_D = jax.random.normal(jax.random.fold_in(key, event), x_D.shape, x_D.dtype)
            return x_D + noise_D, state

        def without_noise(x_P, state, worker, event):
            return x_P, state

        x_PD, _ = simulate.awaken(x_PD, (), move, add_noise)
        # The covariance: merge and push are linear, first on its rows, then on its columns.
        covariance_PP, _ = simulate.awaken(covariance_PP, (), move, without_noise)
        covariance_PP, _ = simulate.awaken(covariance_PP.T, (), move, without_noise)
        noise_P = jnp.zeros(len(x_PD)).at[move.worker].set(1.0).at[move.target].add(move.share)
        return (x_PD, covariance_PP + jnp.outer(noise_P, noise_P)), None

    def unit(key, carry, moves_W):
        x_PD, covariance_PP = lax.scan(partial(wake, key), carry, moves_W)[0]
        expected = expected_spread(covariance_PP[:workers, :workers])
        return (x_PD, covariance_PP), (spread(x_PD[:workers]), expected)

    return jax.jit(lambda key, carry, moves_TW: lax.scan(partial(unit, key), carry, moves_TW))


# The library's rules on its schedules.

RULES = {"gosgd": gossip.gosgd, "d_psgd": gossip.d_psgd}


def lock_step_rows(
    name: str,
    rule: str,
    schedule: gossip.Schedule,
    config: ConsensusConfig,
    p: float | None,
    seed: int,
) -> Iterator[ConsensusRow]:
    """A row for eps after the exchange; of local SGD one for eps before it, too."""
    before, after = lock_step(schedule, rule, config.dimension, seed)
    models = schedule.messages().sum() + 2 * (config.workers - 1) * schedule.average_T.sum()
    sent = int(models) * 4 * (config.dimension + (rule == "gosgd"))
    if name == LOCAL_SGD:
        yield _row(f"{name}, before", rule, config.workers, p, seed, sent, before)
    yield _row(name, rule, config.workers, p, seed, sent, after)


def lock_step(
    schedule: gossip.Schedule, rule: str, dimension: int, seed: int
) -> tuple[Series, Series]:
    """eps in every round: (after the local step and before the exchange, after the exchange)."""
    workers = schedule.workers
    run, start = _lock_step_program(rule, workers)
    run = partial(run, jax_stream(seed, "consensus noise"))
    before_T, after_T = _in_chunks(run, start(dimension), schedule.dense().table())
    expected_T = predicted_consensus_of_table(schedule, sum_weights=rule == "gosgd")
    rounds = len(after_T)
    return (
        Series(before_T, expected_T[:rounds] + workers - 1),  # fresh noise, independent of the rest
        Series(after_T, expected_T[1 : rounds + 1]),
    )


@cache
def _lock_step_program(rule: str, workers: int):
    """(compiled: runs rounds [T] of the rule on noise; its start for parameters of a dimension).

    In the matrix mode: one program for all schedules.
    """
    mixing = RULES[rule](gossip.Exchange(gossip.Dense(workers), WORKER))
    update = jax.vmap(mixing.update, in_axes=(0, 0, 0, None), axis_name=WORKER)

    def round(key, carry, row):
        x_WD, state_W = carry
        noise_WD = jax.random.normal(jax.random.fold_in(key, row.index), x_WD.shape)
        after_WD, state_W = update(noise_WD, state_W, x_WD, row)
        return (after_WD, state_W), (spread(x_WD + noise_WD), spread(after_WD))

    def start(dimension: int):
        x_WD = jnp.zeros((workers, dimension))
        return x_WD, jax.vmap(mixing.init)(x_WD)

    return jax.jit(lambda key, carry, rows: lax.scan(partial(round, key), carry, rows)), start


# What both need.


def spread(x_WD):
    """eps / D."""
    return ((x_WD - x_WD.mean(axis=0, keepdims=True)) ** 2).sum() / x_WD.shape[1]


def expected_spread(covariance_WW):
    """The expectation of `spread`, from the covariance of one coordinate of all workers."""
    return covariance_WW.trace() - covariance_WW.sum() / len(covariance_WW)


def equal_weights_level(workers: int, p: float) -> float:
    """What eps / D would settle at if all sum weights were always equal: a lone push then moves the
    receiver by beta = 1/3, and eps falls by the factor 1 - 2 beta / (M - 1) + 2 beta^2 / M."""
    beta = 1 / 3
    fall = 2 * beta / (workers - 1) - 2 * beta**2 / workers
    return (workers - 1) / (workers * p * fall)


def standard_error(series_T: np.ndarray) -> float:
    """Of the mean of a series with memory: from the means of `BATCHES` batches of it."""
    means = [batch.mean() for batch in np.array_split(series_T, BATCHES)]
    return float(np.std(means, ddof=1) / np.sqrt(BATCHES))


def _row(
    schedule: str, rule: str, workers: int, p: float | None, seed: int, sent: int, series: Series
) -> ConsensusRow:
    rounds = len(series.measured_T)
    measured_T, predicted_T = (column[rounds // STARTUP :].astype(float) for column in series)
    return ConsensusRow(
        schedule=schedule,
        rule=rule,
        M=workers,
        p=p,
        seed=seed,
        rounds=rounds,
        bytes=sent,
        predicted=float(predicted_T.mean()),
        measured=float(measured_T.mean()),
        standard_error=standard_error(measured_T),
        difference_error=standard_error(measured_T - predicted_T),
        deviation=float(measured_T.std()),
    )


def _in_chunks(run, carry, table) -> list[np.ndarray]:
    """The outputs of `run(carry, rows) -> (carry, outputs)` over the whole chunks of the table."""
    outputs = []
    for first in range(0, len(jax.tree.leaves(table)[0]) - CHUNK + 1, CHUNK):
        rows = jax.tree.map(lambda column, first=first: column[first : first + CHUNK], table)
        carry, output = run(carry, rows)
        outputs.append(output)
    return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]
