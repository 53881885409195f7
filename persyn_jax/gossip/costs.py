"""What a schedule costs on given links, and whether gossip can pay there at all.

The model, no more than this:

- Workers fill the slices in order; a worker is one node of its slice, at its row-major place on the
  slice's torus, which wraps around. Without a torus the slice is a switch: one link a worker.
- A message inside a slice takes the shortest way, dimension by dimension, up where both ways are
  as long. Links work in both directions at once. A permutation is done when its busiest link is:
  a shift by s on a ring of N takes min(s, N - s) S / b.
- Messages between slices share the slice's way out (and in); what they do inside is not counted.
- One permutation follows the other: slots, and the two hops of a bank with digits. All workers
  move when one does: a permutation is not partial. `Dense` counts as all W - 1 shifts.
- An all-reduce takes S / (b D) inside a slice, D being the dimensions of its torus (on a switch of
  n workers: 2 S (n - 1) / n / b), and works on shards between P slices: 2 S (P - 1) / P / B.
- Compute, overlap, and waiting for slow workers are not in it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from persyn_jax.gossip.banks import AnyBank, Dense
from persyn_jax.gossip.schedules import Schedule


@dataclass(frozen=True)
class LinkModel:
    """The links between workers. Raises ValueError: see the messages below."""

    inside_bandwidth: float
    """b: bytes a second of one link inside a slice, in one direction."""
    inside_latency: float
    """Seconds of one hop inside a slice."""
    between_bandwidth: float
    """B: bytes a second that a slice sends to all others (and can get from them)."""
    between_latency: float
    """Seconds of one message between slices."""
    workers_per_slice: int
    torus: tuple[int, ...] | None = None
    """Workers along each dimension of a slice; None for a switch."""

    def __post_init__(self):
        if min(self.inside_bandwidth, self.between_bandwidth) <= 0:
            raise ValueError("links: bandwidths must be positive")
        if min(self.inside_latency, self.between_latency) < 0:
            raise ValueError("links: latencies must not be negative")
        if self.workers_per_slice < 1:
            raise ValueError(f"links: workers per slice must be >= 1, got {self.workers_per_slice}")
        if self.torus and np.prod(self.torus) != self.workers_per_slice:
            raise ValueError(
                f"links: a torus of {self.torus} does not hold {self.workers_per_slice} workers"
            )

    def slices(self, workers: int) -> int:
        """P. Raises ValueError if the workers do not fill whole slices."""
        if workers % self.workers_per_slice:
            raise ValueError(
                f"links: {workers} workers do not fill slices of {self.workers_per_slice}"
            )
        return workers // self.workers_per_slice


class Costs(NamedTuple):
    """Costs of each round. Bytes are those that a worker sends, averaged over the workers."""

    inside_T: np.ndarray
    """float64[T]: bytes on the wire inside slices: what travels, filler included."""
    between_T: np.ndarray
    """float64[T]: bytes on the wire between slices."""
    useful_inside_T: np.ndarray
    """float64[T]: bytes of messages with a weight (and of exact means), inside slices."""
    useful_between_T: np.ndarray
    """float64[T]: the same between slices."""
    hop_T: np.ndarray
    """float64[T]: bytes times hops inside slices."""
    busiest_link_T: np.ndarray
    """float64[T]: bytes over the busiest link inside a slice, totalled over the permutations."""
    seconds_T: np.ndarray
    """float64[T]: predicted seconds."""


class Verdict(NamedTuple):
    """A schedule against an exact mean by all-reduce, on the same links."""

    seconds: float
    """Of a round in which something travels, on average."""
    all_reduce_seconds: float
    ratio: float
    """The one over the other."""
    sentence: str


class _Cost(NamedTuple):
    """Of one collective: bytes of all workers together, the busiest link's bytes, seconds."""

    inside: float
    between: float
    hops: float
    busiest_link: float
    seconds: float


def costs(schedule: Schedule, model_bytes: float, links: LinkModel) -> Costs:
    """What each round costs when a model is `model_bytes` on the wire (see `wire_bytes`).

    Raises ValueError if the workers do not fill whole slices.
    """
    workers = schedule.workers
    slice_W = np.arange(workers) // links.workers_per_slice
    mean = np.array(_all_reduce(workers, model_bytes, links))
    wire_TC = np.zeros((schedule.rounds, len(_Cost._fields)))
    if isinstance(schedule.bank, Dense):
        wire_TC += _branch_cost(schedule.bank, 0, model_bytes, links)
    else:
        for branch in np.unique(schedule.branches_TK):
            uses_T = (schedule.branches_TK == branch).sum(axis=1)
            cost = _branch_cost(schedule.bank, int(branch), model_bytes, links)
            wire_TC += uses_T[:, None] * cost
    useful_TC = np.zeros((schedule.rounds, 2))
    for t in range(schedule.rounds):
        for receiver, sender, _ in schedule.edges(t):
            useful_TC[t, int(slice_W[receiver] != slice_W[sender])] += model_bytes
    wire_TC[schedule.average_T] += mean
    useful_TC[schedule.average_T] += mean[:2]
    inside_T, between_T, hop_T, busiest_T, seconds_T = wire_TC.T
    return Costs(
        inside_T=inside_T / workers,
        between_T=between_T / workers,
        useful_inside_T=useful_TC[:, 0] / workers,
        useful_between_T=useful_TC[:, 1] / workers,
        hop_T=hop_T / workers,
        busiest_link_T=busiest_T,
        seconds_T=seconds_T,
    )


def all_reduce_seconds(workers: int, model_bytes: float, links: LinkModel) -> float:
    """Predicted seconds of the exact mean of all workers."""
    return _all_reduce(workers, model_bytes, links).seconds


def verdict(schedule: Schedule, model_bytes: float, links: LinkModel) -> Verdict:
    """Whether gossip can pay. It cannot where a round in which something travels takes as long as
    an all-reduce: an all-reduce in its place, as often, would be as fast and mix completely.

    Raises ValueError as `costs` does.
    """
    seconds_T = costs(schedule, model_bytes, links).seconds_T
    reference = all_reduce_seconds(schedule.workers, model_bytes, links)
    busy_T = seconds_T[seconds_T > 0]
    if not busy_T.size:
        return Verdict(0.0, reference, 0.0, "Nothing travels.")
    seconds = float(busy_T.mean())
    ratio = seconds / reference
    if ratio >= 1:
        sentence = (
            f"Gossip cannot pay on these links: an exchange takes {ratio:.2f} times as long as an "
            "all-reduce, which mixes completely."
        )
    else:
        sentence = (
            f"Gossip can pay on these links: an exchange takes {ratio:.2f} of the time of an "
            "all-reduce. For the same time there could be an all-reduce each"
            f" {1 / ratio:.1f} rounds."
        )
    return Verdict(seconds, reference, ratio, sentence)


def _branch_cost(bank: AnyBank, branch: int, size: float, links: LinkModel) -> np.ndarray:
    """The `_Cost` of the permutations that stand for a branch, one after the other."""
    if isinstance(bank, Dense):
        w = np.arange(bank.workers)
        permutations = [(w + shift) % bank.workers for shift in range(1, bank.workers)]
    elif bank.digits:
        high, low = bank.digits
        permutations = [
            low.receivers_BW[branch % low.branches],
            high.receivers_BW[branch // low.branches],
        ]
    else:
        permutations = [bank.receivers_BW[branch]]
    parts = [_permutation(receivers_W, size, links) for receivers_W in permutations]
    return np.reshape(parts, (-1, len(_Cost._fields))).sum(axis=0)


def _permutation(receivers_W: np.ndarray, size: float, links: LinkModel) -> _Cost:
    workers, n = len(receivers_W), links.workers_per_slice
    slices = links.slices(workers)
    senders_W = np.arange(workers)
    leaves_W = receivers_W // n != senders_W // n
    inside = np.flatnonzero(~leaves_W & (receivers_W != senders_W))
    between = np.flatnonzero(leaves_W)
    hops, busiest = _loads(inside, receivers_W[inside], slices, links)
    seconds = 0.0
    if inside.size:
        seconds = busiest * size / links.inside_bandwidth + hops.max() * links.inside_latency
    if between.size:
        out = np.bincount(between // n).max()  # as many come into a slice
        outside = out * size / links.between_bandwidth + links.between_latency
        seconds = max(seconds, outside)  # both kinds of links work at the same time
    return _Cost(
        inside.size * size, between.size * size, hops.sum() * size, busiest * size, float(seconds)
    )


def _loads(
    senders: np.ndarray, receivers: np.ndarray, slices: int, links: LinkModel
) -> tuple[np.ndarray, int]:
    """Hops of each message inside slices, and how many of them cross the busiest link."""
    if not links.torus:
        return np.ones(len(senders), int), int(len(senders) > 0)
    n, torus = links.workers_per_slice, links.torus
    links_of_dimension = (2, slices, *torus)  # up or down, from each node of each slice
    crossing = np.zeros((len(torus), np.prod(links_of_dimension)), int)
    hops = np.zeros(len(senders), int)
    place = np.array(np.unravel_index(senders % n, torus))
    goal = np.array(np.unravel_index(receivers % n, torus))
    for dimension, length in enumerate(torus):
        up = (goal[dimension] - place[dimension]) % length
        down = (-up) % length
        step = np.where(up <= down, 1, -1)
        distance = np.minimum(up, down)
        for taken in range(length // 2):
            going = np.flatnonzero(taken < distance)
            node = senders[going] // n, *place[:, going]
            link = np.ravel_multi_index((step[going] < 0, *node), links_of_dimension)
            crossing[dimension] += np.bincount(link, minlength=crossing.shape[1])
            place[dimension, going] = (place[dimension, going] + step[going]) % length
        hops += distance
    return hops, int(crossing.max())


def _all_reduce(workers: int, size: float, links: LinkModel) -> _Cost:
    """Reduce-scatter inside slices, all-reduce of the shards between them, all-gather inside."""
    n, slices = links.workers_per_slice, links.slices(workers)
    inside = 2 * size * (n - 1) / n
    between = 2 * size * (slices - 1) / slices
    if links.torus:
        lengths = [length for length in links.torus if length > 1]
        busiest = size / len(lengths) if lengths else 0.0
        steps = 2 * sum(length // 2 for length in lengths)
    else:
        busiest, steps = inside, 2 * (n - 1)
    seconds = busiest / links.inside_bandwidth + steps * links.inside_latency
    if slices > 1:
        seconds += between / links.between_bandwidth + 2 * (slices - 1) * links.between_latency
    return _Cost(workers * inside, slices * between, workers * inside, busiest, seconds)
