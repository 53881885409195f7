"""Random schedules, and the table of all rules that the contract tests go through."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from persyn_jax import gossip
from persyn_jax.gossip import Bank, Exchange, MixingTransformation, Rows, Schedule, cycle
from persyn_jax.gossip.audit import Mass
from persyn_jax.gossip.contrib import d2
from persyn_jax.gossip.schedules import packed

WORKERS, ROUNDS = 8, 50


def random_schedule(
    bank: Bank,
    rounds: int,
    slots: int,
    seed: int,
    *,
    uniform: bool = False,
    idle: float = 0.2,
    dropped: float = 0.0,
    average: float = 0.0,
    absent: float = 0.0,
    late: float = 0.0,
) -> Schedule:
    """Random permutations and weights of at most 1 / slots, each fault with its probability.

    uniform: all messages of a slot have one weight, so that the matrices are doubly stochastic.
    Half of the rounds have `sync`, whatever else is in them.
    """
    rng = np.random.default_rng(seed)
    shape = (rounds, slots, bank.workers)
    shuffled_TB = rng.permuted(np.tile(np.arange(bank.branches), (rounds, 1)), axis=1)
    branches_TK = shuffled_TB[:, :slots].astype(np.int32)
    present_TW = rng.random((rounds, bank.workers)) >= absent
    senders_TKW = bank.senders_BW[branches_TK]
    present_sender_TKW = present_TW[np.arange(rounds)[:, None, None], senders_TKW]
    weights_TKW = rng.uniform(0.1, 1, (*shape[:2], 1) if uniform else shape) / slots
    travels_TKW = (
        (senders_TKW != np.arange(bank.workers))
        & present_TW[:, None]
        & present_sender_TKW
        & (rng.random(shape) >= dropped)
        & (rng.random((rounds, 1, 1)) >= idle)
    )
    rows = packed(Rows(branches_TK, weights_TKW * travels_TKW, rng.random(rounds) < average))
    return replace(
        cycle(bank, rows, rounds),
        sync_T=rng.random(rounds) < 0.5,
        present_TW=present_TW,
        steps_TW=present_TW & (rng.random((rounds, bank.workers)) >= late),
        period=None,
    )


class Case(NamedTuple):
    """A rule, the schedule (or schedules) it is made for, and what it claims."""

    rule: Callable[[Exchange], MixingTransformation]
    schedule: Any
    mass: Mass | None
    """What no exchange changes, None for nothing."""
    matrix: Callable[[Any, int], np.ndarray] | None = None
    """(schedule, t) -> the matrix by which it mixes "unit" in round t, None for none."""
    exact: bool = True
    """Whether results are the same to the bit in all ways of exchanging: not where sums over all
    workers are taken in any order, nor where a rule has products that the compiler may fuse."""
    rounds_to: float = 1e-5
    """By how much results may differ that differ in rounding: for int8, the next number."""


SHIFTS, XORS = gossip.shift_bank(WORKERS), gossip.xor_bank(WORKERS)
DIRECTED = random_schedule(SHIFTS, ROUNDS, 2, seed=1, dropped=0.3)
DOUBLY = random_schedule(SHIFTS, ROUNDS, 2, seed=2, uniform=True)
SYMMETRIC = random_schedule(XORS, ROUNDS, 1, seed=3, uniform=True)
MEANS = random_schedule(SHIFTS, ROUNDS, 2, seed=4, dropped=0.3, average=0.3, absent=0.2)
RING = cycle(
    SHIFTS,
    Rows(np.array([[1, 7]], np.int32), np.full((1, 2, WORKERS), 0.25), np.zeros(1, bool)),
    ROUNDS,
)


def easgd_mass(params, state):
    """All workers and the centre."""
    return jax.tree.map(lambda x, c: x + c / WORKERS, params, state.centre)


def downpour_mass(params, state):
    """The centre, and what it has not been told yet."""
    return jax.tree.map(lambda x, f, c: x - f + c / WORKERS, params, state.fetched, state.centre)


def partition_mass(params, state):
    pushed = gossip.sum_weight_mass(params["kernel"], state["pushed"])
    return pushed, params["unit"]


def partitioned(exchange):
    rules = {"pushed": gossip.gosgd(exchange), "averaged": gossip.d_psgd(exchange)}
    return gossip.partition(rules, lambda params: {"kernel": "pushed", "unit": "averaged"})


def is_kernel(params):
    return {"kernel": True, "unit": False}


def nobody_mixes(schedule, t):
    return np.eye(WORKERS)


def gosgd_matrix(schedule, t):
    return schedule.sum_weight_matrix(t, schedule.sum_weights()[t])


def in_each_third_round(schedule, t):
    return schedule.pull_matrix(t) if t % 3 == 2 else np.eye(WORKERS)


def twice_in_each_third_round(schedule, t):
    return in_each_third_round(schedule, t) @ schedule.pull_matrix(t)


CASES = {
    "gosgd": Case(gossip.gosgd, DIRECTED, gossip.sum_weight_mass, gosgd_matrix),
    "push_sum": Case(gossip.push_sum, DIRECTED, gossip.numerator_mass, Schedule.push_matrix),
    "d_psgd": Case(gossip.d_psgd, DOUBLY, gossip.plain_mass, Schedule.pull_matrix),
    "peer_average": Case(lambda e: gossip.peer_average(e, rate=0.3), DIRECTED, None),
    "all_reduce": Case(gossip.all_reduce, DIRECTED, gossip.plain_mass, nobody_mixes, exact=False),
    "easgd": Case(lambda e: gossip.easgd(e, moving_rate=0.1), DIRECTED, easgd_mass, exact=False),
    "downpour": Case(gossip.downpour, DIRECTED, downpour_mass, exact=False),
    "slowmo": Case(lambda e: gossip.slowmo(e, 0.5, 0.7, 0.1), SYMMETRIC, None, exact=False),
    "diloco": Case(gossip.diloco, SYMMETRIC, None, exact=False),
    "noloco": Case(lambda e: gossip.noloco(e, 0.5, 0.7), SYMMETRIC, None, exact=False),
    "gasloc": Case(lambda e: gossip.gasloc(e, 0.4), SYMMETRIC, None, exact=False),
    "d2": Case(d2, RING, gossip.plain_mass),
    "no_mixing": Case(gossip.no_mixing, DIRECTED, gossip.plain_mass, nobody_mixes),
    "delayed by 0": Case(
        lambda e: gossip.delayed(gossip.d_psgd(e), e),
        DOUBLY,
        gossip.plain_mass,
        Schedule.pull_matrix,
    ),
    "delayed by 2": Case(
        lambda e: gossip.delayed(gossip.d_psgd(e), e, rounds=2), DOUBLY, gossip.plain_mass
    ),
    "every": Case(
        lambda e: gossip.every(3, gossip.d_psgd(e)), DOUBLY, gossip.plain_mass, in_each_third_round
    ),
    "chain": Case(
        lambda e: gossip.chain(gossip.d_psgd(e), gossip.every(3, gossip.d_psgd(e))),
        DOUBLY,
        gossip.plain_mass,
        twice_in_each_third_round,
    ),
    "partition": Case(partitioned, DOUBLY, partition_mass, Schedule.pull_matrix),
    "masked": Case(
        lambda e: gossip.masked(gossip.d_psgd(e), is_kernel, e),
        DOUBLY,
        gossip.plain_mass,
        nobody_mixes,
    ),
    "fragments": Case(
        lambda e: gossip.fragments((gossip.d_psgd(e), gossip.d_psgd(e))),
        (DOUBLY, random_schedule(SHIFTS, ROUNDS, 1, seed=5, uniform=True)),
        gossip.plain_mass,
        lambda schedules, t: schedules[1].pull_matrix(t),  # where the unit vectors belong
    ),
    "in bfloat16": Case(
        lambda e: gossip.in_dtype(jnp.bfloat16, gossip.gosgd, e), DIRECTED, None, rounds_to=0.02
    ),
    "in int8": Case(
        lambda e: gossip.in_dtype(jnp.int8, gossip.d_psgd, e),
        DOUBLY,
        gossip.plain_mass,
        rounds_to=0.05,
    ),
}
