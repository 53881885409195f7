"""The truly asynchronous GoSGD (arXiv 1804.01852, Algorithms 1 and 2), simulated on one device.

Nobody waits for anybody, and what a message does to the sum weights does not depend on what is in
it. So a run is data before a single parameter is computed: `asynchronous_run` makes the table of
its awakenings, and the same table can be

- run on parameters, an awakening at a time, exactly as the paper has it: `make_plan`, `run_plan`;
- replayed in lock step, a round for each awakening, by the ordinary rule: `as_schedule`.

    >>> import jax.numpy as jnp
    >>> from persyn_jax.gossip import simulate
    >>> events = simulate.asynchronous_run(
    ...     workers=4, exchange_probability=0.5, duration=100, seed=0,
    ...     compute_time=simulate.exponential(1.0), message_delay=simulate.lognormal(0.2, 1.0))
    >>> def local_step(x, state, worker, event):
    ...     return 0.9 * x, state  # towards 0, the minimum of every worker's loss
    >>> x_P, _ = simulate.run_plan(simulate.make_plan(events), jnp.ones((4, 3)), (), local_step)
    >>> bool(abs(x_P[:4]).max() < 0.01)
    True
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from persyn_jax.gossip.banks import Dense
from persyn_jax.gossip.base import Array, Params
from persyn_jax.gossip.schedules import Schedule
from persyn_jax.streams import numpy_stream

SUM_WEIGHT_UNITS = 2**62
"""Sum weights are counted in this many equal units, so that halves and sums of them are exact."""

ComputeTime = Callable[[np.random.Generator, int], float]
"""`compute_time(rng, worker)`: until the worker wakes again; `inf` for a worker that is dead."""
MessageDelay = Callable[[np.random.Generator, int, int], float]
"""`message_delay(rng, sender, receiver)`: how long a message is under way; `inf` if it is lost."""


def constant(value: float) -> Callable[..., float]:
    """Always the same time. As `compute_time`: all keep pace and act in the order of their numbers,
    as `message_delay` of more than 0 and at most that time: GoSGD in lock step."""
    return lambda rng, *who: value


def exponential(mean: float) -> Callable[..., float]:
    """Exponential waiting times. As `compute_time`: random awakenings, a Poisson process each."""
    return lambda rng, *who: rng.exponential(mean)


def lognormal(mean: float, sigma: float) -> Callable[..., float]:
    """Log-normal times, `sigma` being the standard deviation of the logarithm: stragglers."""
    location = np.log(mean) - sigma**2 / 2
    return lambda rng, *who: rng.lognormal(location, sigma)


@dataclass(frozen=True, eq=False)
class Events:
    """What happened: one row an awakening, in order of time (at the same time: of worker).

    A worker that wakes merges the messages that have arrived, takes its local step, and pushes to
    one other worker or to none.
    """

    workers: int
    time_E: np.ndarray
    """float64[E]: when."""
    worker_E: np.ndarray
    """int32[E]: who wakes."""
    receiver_E: np.ndarray
    """int32[E]: whom it pushes to; itself for nobody."""
    arrival_E: np.ndarray
    """float64[E]: when that message arrives."""

    @cached_property
    def pushes(self) -> np.ndarray:
        """bool[E]: whether a message is sent."""
        return self.receiver_E != self.worker_E

    @cached_property
    def merged_in(self) -> np.ndarray:
        """int64[E]: the awakening that merges the message: the receiver's first one from its
        arrival on. E if that lies beyond the run, and where nothing was sent."""
        merged_E = np.full(len(self.time_E), len(self.time_E))
        for worker in range(self.workers):
            sent = np.flatnonzero(self.pushes & (self.receiver_E == worker))
            wakes = np.flatnonzero(self.worker_E == worker)
            arrived = np.searchsorted(self.time_E[wakes], self.arrival_E[sent], "left")
            later = np.searchsorted(wakes, sent, "right")
            first = np.maximum(arrived, later)
            merged_E[sent] = np.append(wakes, len(self.time_E))[first]
        return merged_E


def asynchronous_run(
    workers: int,
    exchange_probability: float,
    duration: float,
    seed: int,
    compute_time: ComputeTime,
    message_delay: MessageDelay,
) -> Events:
    """A run of `duration` units of time: who wakes when, and who pushes to whom (Algorithm 1).

    Every worker pushes by its own coin to one of the others, each equally likely: several messages
    may wait for one worker. The choices of a worker depend on the seed and on its own number of
    awakenings only, so a longer run begins with the shorter one.
    Raises ValueError: fewer than 2 workers, a probability outside [0, 1], a compute time that is
    not positive, a negative delay.
    """
    if workers < 2:
        raise ValueError(f"asynchronous run: needs at least 2 workers, got {workers}")
    if not 0 <= exchange_probability <= 1:
        raise ValueError(f"exchange probability: must be in [0, 1], got {exchange_probability}")
    runs = []
    for worker in range(workers):
        rng = numpy_stream(seed, "event times", worker)
        times = _awakenings(rng, worker, duration, compute_time)
        coins = numpy_stream(seed, "event coins", worker).random(len(times))
        uniform = numpy_stream(seed, "event receivers", worker).random(len(times))
        others = np.delete(np.arange(workers), worker)
        receivers = others[(uniform * len(others)).astype(int)]
        receivers[coins >= exchange_probability] = worker
        rng = numpy_stream(seed, "event delays", worker)
        arrivals = times + _delays(rng, worker, receivers, message_delay)
        runs.append((times, np.full(len(times), worker), receivers, arrivals))
    time_E, worker_E, receiver_E, arrival_E = map(np.concatenate, zip(*runs, strict=True))
    order = np.lexsort((worker_E, time_E))
    return Events(
        workers,
        time_E[order],
        worker_E[order].astype(np.int32),
        receiver_E[order].astype(np.int32),
        arrival_E[order],
    )


def _awakenings(
    rng: np.random.Generator, worker: int, duration: float, compute_time: ComputeTime
) -> np.ndarray:
    """When the worker wakes, until `duration`. The first time after one compute time."""
    times, now = [], 0.0
    while True:
        taken = compute_time(rng, worker)
        if not taken > 0:
            raise ValueError(f"compute time: must be positive, got {taken} of worker {worker}")
        now += taken
        if now > duration:
            return np.array(times)
        times.append(now)


def _delays(
    rng: np.random.Generator, worker: int, receivers: np.ndarray, message_delay: MessageDelay
) -> np.ndarray:
    delays = np.zeros(len(receivers))
    for index in np.flatnonzero(receivers != worker):
        delays[index] = message_delay(rng, worker, int(receivers[index]))
        if not delays[index] >= 0:
            raise ValueError(
                f"message delay: must not be negative, got {delays[index]} of worker {worker}"
            )
    return delays


class Moves(NamedTuple):
    """The awakenings as moves between *places*: place w is worker w, mailboxes come after them.

    In awakening e, x being the parameters of the places,

        x[worker] += gain (x[source] - x[worker])      merge the mail
        x[worker]  = local step of x[worker]
        x[target] += share (x[worker] - x[target])     push

    An averaged mailbox is as good as a queue: messages that are merged together may as well be
    merged with each other first.
    """

    event: Array
    """int32[E]: the number of the awakening."""
    worker: Array
    """int32[E]: who wakes."""
    source: Array
    """int32[E]: its mailbox; itself if no message has arrived."""
    gain: Array
    """float64[E]: sum weight of the mail / (that + the worker's own); 0 if there is none."""
    target: Array
    """int32[E]: the mailbox that it pushes into; itself if it does not push."""
    share: Array
    """float64[E]: sum weight of the message / that of the mailbox with it: 1 if that was empty."""


class Plan(NamedTuple):
    """A run, ready to be executed."""

    workers: int
    moves: Moves
    sum_weight_P: np.ndarray
    """float64[P]: sum weights of all places at the end. Messages that nobody merges within the run
    are all in one mailbox then."""


def make_plan(events: Events) -> Plan:
    """Works out the mailboxes and the sum weights (Algorithm 2) of a run."""
    mailbox_E, mailboxes = _mailboxes(events, events.pushes, events.merged_in)
    worker_E = events.worker_E
    target_E = np.where(events.pushes, events.workers + mailbox_E, worker_E)
    source_E = np.append(worker_E, 0)
    source_E[events.merged_in[events.pushes]] = target_E[events.pushes]
    source_E = source_E[:-1]

    # In plain Python: integers never round, and this is faster than NumPy one number at a time.
    units = [SUM_WEIGHT_UNITS // events.workers] * events.workers + [0] * mailboxes
    total = sum(units)
    gains, shares = [], []
    for worker, source, target in zip(
        worker_E.tolist(), source_E.tolist(), target_E.tolist(), strict=True
    ):
        gain = share = 0.0
        if source != worker:
            merged = units[worker] + units[source]
            gain = units[source] / merged
            units[worker], units[source] = merged, 0
        if target != worker:
            sent = units[worker] // 2
            units[worker] -= sent
            units[target] += sent
            share = sent / max(units[target], 1)  # a worker with a single unit sends nothing
        gains.append(gain)
        shares.append(share)
    assert sum(units) == total, "sum weights are conserved"
    moves = Moves(
        event=np.arange(len(worker_E), dtype=np.int32),
        worker=worker_E,
        source=source_E.astype(np.int32),
        gain=np.array(gains),
        target=target_E.astype(np.int32),
        share=np.array(shares),
    )
    return Plan(events.workers, moves, np.array([held / total for held in units]))


LocalStep = Callable[[Params, Any, Array, Array], tuple[Params, Any]]
"""`local_step(params, state, worker, event) -> (params, state)`: what one worker does on its own.
`state` is its own too and is never mixed (an optimiser's, say); `worker` and `event` are int32[],
to choose data or fold into a key."""


def run_plan(
    plan: Plan, params_W: Params, state_W: Any, local_step: LocalStep
) -> tuple[Params, Any]:
    """Runs the whole plan: (parameters of all places [P, ...], states [W, ...]).

    params_W: where the workers start, arrays [W, ...]; state_W: likewise, `()` for none.
    The model that GoSGD returns is the plain mean of the first W places (Algorithm 1, line 11).
    """

    def body(carry, move):
        params_P, state_W = carry
        return awaken(params_P, state_W, move, local_step), None

    params_P = _with_mailboxes(plan, params_W)
    return lax.scan(body, (params_P, state_W), plan.moves)[0]


def _with_mailboxes(plan: Plan, params_W: Params) -> Params:
    """Arrays [W, ...] lengthened to all places; the mailboxes are empty."""

    def lengthen(leaf_W):
        chex.assert_axis_dimension(leaf_W, 0, plan.workers)
        mailboxes = len(plan.sum_weight_P) - plan.workers
        return jnp.concatenate([leaf_W, jnp.zeros((mailboxes, *leaf_W.shape[1:]), leaf_W.dtype)])

    return jax.tree.map(lengthen, params_W)


def awaken(
    params_P: Params, state_W: Any, move: Moves, local_step: LocalStep
) -> tuple[Params, Any]:
    """One awakening: `move` is one row of a plan's moves. Call it from a `lax.scan` over them."""
    chex.assert_rank(move.worker, 0)

    def at(place, tree):
        return jax.tree.map(
            lambda leaf: lax.dynamic_index_in_dim(leaf, place, keepdims=False), tree
        )

    def put(value, place, tree):
        return jax.tree.map(
            lambda leaf, row: lax.dynamic_update_index_in_dim(leaf, row, place, axis=0), tree, value
        )

    own = _towards(at(move.worker, params_P), at(move.source, params_P), move.gain)
    own, state = local_step(own, at(move.worker, state_W), move.worker, move.event)
    params_P = put(own, move.worker, params_P)
    params_P = put(_towards(at(move.target, params_P), own, move.share), move.target, params_P)
    return params_P, put(state, move.worker, state_W)


def _towards(params: Params, other: Params, weight: Array) -> Params:
    """params + weight (other - params), in float32 at least; exactly `other` for weight 1."""

    def towards(leaf, other_leaf):
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        leaf_wide, other_wide = leaf.astype(wide), other_leaf.astype(wide)
        mixed = leaf_wide + jnp.asarray(weight, wide) * (other_wide - leaf_wide)
        return jnp.where(weight == 1, other_wide, mixed).astype(leaf.dtype)

    return jax.tree.map(towards, params, other)


def as_schedule(events: Events) -> tuple[Schedule, np.ndarray]:
    """(schedule, sum weights to start from [P]): the run in lock step, a round an awakening.

    In round e one worker steps and pushes. Nobody looks at a sleeping worker, so a message is
    merged when it is pushed if its receiver would do so the next time it wakes. Others wait in a
    mailbox: a worker that never steps, starts with sum weight 0, and gives all of it in the round
    of the receiver's last awakening before the one that merges. So every local step starts from
    the same parameters as in the asynchronous run, under the ordinary `gosgd` rule; after its last
    step, a worker also merges what is then sent to it.

    The table is dense, float64[E, P, P]: for runs of some thousand awakenings.
    """
    rounds, workers = len(events.time_E), events.workers
    previous_E = _previous_awakening(events)
    waits_E = events.pushes & (previous_E > np.arange(rounds))
    mailbox_E, mailboxes = _mailboxes(events, waits_E, previous_E)
    places = workers + mailboxes
    weights_TKW = np.zeros((rounds, places, places))
    (sends,) = np.nonzero(events.pushes)
    targets = np.where(waits_E, workers + mailbox_E, events.receiver_E)
    weights_TKW[sends, events.worker_E[sends], targets[sends]] = 0.5
    (late,) = np.nonzero(waits_E & (events.merged_in < rounds))
    weights_TKW[previous_E[late], workers + mailbox_E[late], events.receiver_E[late]] = 1.0
    schedule = Schedule(
        bank=Dense(places),
        branches_TK=np.tile(np.arange(places, dtype=np.int32), (rounds, 1)),
        weights_TKW=weights_TKW,
        average_T=np.zeros(rounds, bool),
        sync_T=np.any(weights_TKW > 0, axis=(1, 2)),
        steps_TW=np.arange(places) == events.worker_E[:, None],
        present_TW=np.ones((rounds, places), bool),
    )
    return schedule, np.repeat([1 / workers, 0.0], [workers, mailboxes])


def _previous_awakening(events: Events) -> np.ndarray:
    """int64[E]: the receiver's last awakening before the one that merges the message; -1 for none.

    A message that waits for no awakening of the run: the receiver's last one.
    """
    previous_E = np.full(len(events.time_E), -1)
    for worker in range(events.workers):
        sent = np.flatnonzero(events.pushes & (events.receiver_E == worker))
        wakes = np.append(-1, np.flatnonzero(events.worker_E == worker))
        previous_E[sent] = wakes[np.searchsorted(wakes, events.merged_in[sent], "left") - 1]
    return previous_E


def _mailboxes(events: Events, waits_E: np.ndarray, closes_E: np.ndarray) -> tuple[np.ndarray, int]:
    """(mailbox of each message that waits, how many there are).

    Messages that are merged in one awakening share a mailbox, which is free again after
    `closes_E`; so do all that the run leaves unmerged.
    """
    mailbox_E = np.zeros(len(waits_E), np.int64)
    mailbox_of: dict[int, int] = {}  # by the awakening that merges
    in_use: list[tuple[int, int]] = []
    free: list[int] = []
    (waiting,) = np.nonzero(waits_E)
    merged, closes = events.merged_in.tolist(), closes_E.tolist()
    for event in waiting.tolist():
        while in_use and in_use[0][0] < event:
            free.append(heapq.heappop(in_use)[1])
        if merged[event] not in mailbox_of:
            mailbox = free.pop() if free else len(in_use)
            mailbox_of[merged[event]] = mailbox
            never = merged[event] == len(merged)
            heapq.heappush(in_use, (len(merged) if never else closes[event], mailbox))
        mailbox_E[event] = mailbox_of[merged[event]]
    return mailbox_E, len(in_use) + len(free)
