"""Faults as data: each is a function from a schedule to one of the same shape, with less in it.

So they run in the compiled program of the schedule itself, and they compose:

    kill(drop_edges(schedule, 0.1, seed=0), worker=3, start=100)

Exact means (`average`) are no messages: only `kill` concerns them.
"""

import math
from dataclasses import replace

import numpy as np

from persyn_jax.gossip.banks import Bank
from persyn_jax.gossip.schedules import Rows, Schedule, packed
from persyn_jax.gossip.simulate import ComputeTime
from persyn_jax.streams import numpy_stream


def drop_edges(
    schedule: Schedule, probability: float, seed: int, symmetric: bool = False
) -> Schedule:
    """Each message is lost with this probability, independently of the others.

    symmetric: in each round both directions between two workers are lost together, so that a
    symmetric mixing matrix stays symmetric, and with it doubly stochastic.
    Raises ValueError: a probability outside [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"dropped edges: the probability must be in [0, 1], got {probability}")
    if not symmetric:
        rng = numpy_stream(seed, "dropped messages")
        dropped = _masked(schedule, rng.random(schedule.weights_TKW.shape) >= probability)
        if schedule.law:  # a lost message is one more coin that shows tails
            coin = schedule.law.coin * (1 - probability)
            dropped = replace(dropped, law=schedule.law._replace(coin=coin))
        return dropped
    alive_TKW = np.ones(schedule.weights_TKW.shape, bool)
    receiver_W, workers = np.arange(schedule.workers), schedule.workers
    for t, sender_KW in enumerate(_senders(schedule)):
        uniform_WW = numpy_stream(seed, "dropped pairs", t).random((workers, workers))
        pair = np.minimum(sender_KW, receiver_W), np.maximum(sender_KW, receiver_W)
        alive_TKW[t] = uniform_WW[pair] >= probability
    return _masked(schedule, alive_TKW)


def kill(schedule: Schedule, worker: int, start: int, stop: int | None = None) -> Schedule:
    """The worker is not there in rounds [start, stop), or from `start` on: it does not step, nor
    count in means, and what it would send or get is lost. It keeps its parameters meanwhile.

    Raises ValueError: no such worker.
    """
    if not 0 <= worker < schedule.workers:
        raise ValueError(f"kill: there are {schedule.workers} workers, asked for {worker}")
    dead_TW = np.zeros((schedule.rounds, schedule.workers), bool)
    dead_TW[start:stop, worker] = True
    alive_TKW = ~(dead_TW[:, None, :] | _of_sender(schedule, dead_TW))
    return replace(
        _masked(schedule, alive_TKW),
        steps_TW=schedule.steps_TW & ~dead_TW,
        present_TW=schedule.present_TW & ~dead_TW,
    )


def stragglers(schedule: Schedule, compute_time: ComputeTime, seed: int) -> Schedule:
    """Local steps that take longer than a round: the others do not wait.

    A worker whose step is not done in a round does not step and does not send in it; it still
    receives. Its next step begins in the round after that in which this one is done.

    compute_time: `compute_time(rng, worker)` is how long a step of the worker takes, in rounds:
    `simulate.lognormal(1.2, 0.5)` for a distribution, `lambda rng, worker: every_W[worker]` for a
    worker that steps each n-th round.
    Raises ValueError: a time that is not positive and finite.
    """
    done_TW = np.zeros((schedule.rounds, schedule.workers), bool)
    for worker in range(schedule.workers):
        rng = numpy_stream(seed, "straggler times", worker)
        finished = -1
        while finished < schedule.rounds:
            time = compute_time(rng, worker)
            if not 0 < time < math.inf:
                raise ValueError(
                    f"stragglers: a step must take a positive, finite time, got {time}"
                )
            finished += math.ceil(time)
            done_TW[finished : finished + 1, worker] = True
    masked = _masked(schedule, _of_sender(schedule, done_TW))
    return replace(masked, steps_TW=schedule.steps_TW & done_TW)


def slow_links(schedule: Schedule, period_WW: np.ndarray) -> Schedule:
    """Links of unlike bandwidth: the one from worker j to worker i carries messages only in rounds
    that are multiples of `period_WW[i, j]`, int[W, W].

    Raises ValueError: a period below 1, another shape.
    """
    period_WW = np.asarray(period_WW)
    if period_WW.shape != (schedule.workers, schedule.workers) or (period_WW < 1).any():
        raise ValueError(
            f"slow links: periods must be >= 1, one for each pair of {schedule.workers} workers"
        )
    period_TKW = period_WW[np.arange(schedule.workers), _senders(schedule)]
    return _masked(schedule, np.arange(schedule.rounds)[:, None, None] % period_TKW == 0)


def _masked(schedule: Schedule, alive_TKW: np.ndarray) -> Schedule:
    """Only the messages that are alive, by slot and receiver. It no longer follows its law, nor
    does it repeat itself."""
    rows = Rows(schedule.branches_TK, schedule.weights_TKW * alive_TKW, schedule.average_T)
    if isinstance(schedule.bank, Bank):  # in a `Dense` bank the slots' order says who sends
        rows = packed(rows)
    return replace(
        schedule, branches_TK=rows.branches_SK, weights_TKW=rows.weights_SKW, period=None, law=None
    )


def _senders(schedule: Schedule) -> np.ndarray:
    """int[T, K, W]: from whom each worker hears through each slot."""
    if isinstance(schedule.bank, Bank):
        return schedule.bank.senders_BW[schedule.branches_TK]
    everyone = np.arange(schedule.workers)
    return np.broadcast_to(everyone[:, None], schedule.weights_TKW.shape)


def _of_sender(schedule: Schedule, value_TW: np.ndarray) -> np.ndarray:
    """[T, K, W]: the sender's value for each slot and receiver."""
    return value_TW[np.arange(schedule.rounds)[:, None, None], _senders(schedule)]
