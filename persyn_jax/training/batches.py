"""Which examples each worker sees in which step: a plan made from the seed before training starts.

A plan is data, so resuming needs nothing but the number of the step.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from persyn_jax.models import rows
from persyn_jax.models.rows import Conversation, Rows
from persyn_jax.streams import numpy_stream
from persyn_jax.training.config import TrainConfig

Row = list[int]
"""Indices of the examples packed into one row."""
Plan = list[list[list[Row]]]
"""plan[step][worker]: the rows of that worker's batch."""


class Segment(NamedTuple):
    """Some steps that were taken by one number of workers."""

    workers: int
    steps: int


_OPEN_ROWS = 64  # rows that packing still looks at: its time stays linear in the number of examples


def make_plan(
    examples: Sequence[Conversation],
    config: TrainConfig,
    workers: int,
    seed: int,
    taken: Sequence[Segment] = (),
) -> Plan:
    """Deals the examples to workers once; every epoch shuffles and packs each worker's share anew.

    In an epoch every example is seen exactly once, by one worker. Workers take the same number of
    steps: one whose share packs into fewer rows ends its epoch with empty ones (no tokens, so a
    zero gradient: its momentum alone moves it). An epoch depends on the seed and its number, not on
    how many epochs there are.

    taken: the steps that came before, if the number of workers has changed since the start. The
    plan begins with these; then what is left of their epoch is dealt to `workers`.

    Raises ValueError: an example that does not fit in a row, fewer examples than workers, more
    steps taken than there are.
    """
    for index, example in enumerate(examples):
        if example.length > config.row_tokens or len(example.response) > config.row_response_tokens:
            raise ValueError(
                f"example {index} has {example.length} tokens, {len(example.response)} of them "
                f"response; a row holds {config.row_tokens} and {config.row_response_tokens}"
            )
    if len(examples) < workers:
        raise ValueError(f"{len(examples)} examples for {workers} workers: each needs at least one")
    before = _changes(taken, workers)
    dealt = numpy_stream(seed, "deal examples").permutation(len(examples)).tolist()
    plan: Plan = []
    for epoch in range(config.epochs):
        left, part = dealt, 0
        while left:
            at_work = before[0].workers if before else workers
            steps = list(_deal(examples, config, left, at_work, seed, (epoch, part)))
            if not before or len(steps) < before[0].steps:
                plan += steps
                if before:
                    before[0] = before[0]._replace(steps=before[0].steps - len(steps))
                break
            plan += steps[: before[0].steps]
            seen = {
                i for step in plan[-before[0].steps :] for own in step for row in own for i in row
            }
            left, part = [index for index in left if index not in seen], part + 1
            del before[0]
    if before:
        raise ValueError(f"{sum(s.steps for s in taken)} steps were taken, there are {len(plan)}")
    return plan


def with_steps(taken: Sequence[Segment], workers: int, steps: int) -> tuple[Segment, ...]:
    """`taken`, and `steps` in all, the last of them by `workers`."""
    segments = [segment for segment in taken if segment.steps]
    more = steps - sum(segment.steps for segment in segments)
    if segments and segments[-1].workers == workers:
        segments[-1] = Segment(workers, segments[-1].steps + more)
    else:
        segments.append(Segment(workers, more))
    return tuple(segments)


def _changes(taken: Sequence[Segment], workers: int) -> list[Segment]:
    """The segments up to the last change: what `workers` took since needs no mention."""
    segments = [segment for segment in taken if segment.steps]
    while segments and segments[-1].workers == workers:
        segments.pop()
    return segments


def _deal(
    examples: Sequence[Conversation],
    config: TrainConfig,
    left: list[int],
    workers: int,
    seed: int,
    place: tuple[int, int],
) -> Iterator[list[list[Row]]]:
    """The steps that see each example of `left` once. place: the epoch, and which part of it."""
    epoch, part = place
    rows_by_worker = []
    for worker in range(workers):
        keys = (epoch, worker, part) if part else (epoch, worker)
        order = numpy_stream(seed, "shuffle examples", *keys).permutation(left[worker::workers])
        rows_by_worker.append(first_fit(examples, order.tolist(), config))
    count = config.rows * config.accumulate
    steps = max(-(-len(worker_rows) // count) for worker_rows in rows_by_worker)
    for step in range(steps):
        first, last = step * count, (step + 1) * count
        yield [_padded(own[first:last], count) for own in rows_by_worker]


def first_fit(examples: Sequence[Conversation], order: list[int], config: TrainConfig) -> list[Row]:
    """Packs the examples of `order` one after the other, each into the first row with room for it.

    Room is looked for in the newest rows only. An example longer than a row gets one of its own.
    """
    packed: list[Row] = []
    room: list[tuple[int, int]] = []  # tokens and response tokens left in each row
    for index in order:
        length, response = examples[index].length, len(examples[index].response)
        for place in range(max(0, len(packed) - _OPEN_ROWS), len(packed)):
            tokens, responses = room[place]
            if length <= tokens and response <= responses:
                break
        else:
            place = len(packed)
            packed.append([])
            room.append((config.row_tokens, config.row_response_tokens))
        packed[place].append(index)
        room[place] = (room[place][0] - length, room[place][1] - response)
    return packed


def _padded(own: list[Row], count: int) -> list[Row]:
    return own + [[] for _ in range(count - len(own))]


def batch_rows(examples: Sequence[Conversation], own: list[Row], config: TrainConfig) -> Rows:
    """These rows, as NumPy: [B, T] and [B, R]."""
    conversations = [[examples[index] for index in row] for row in own]
    return rows.pack(conversations, config.row_tokens, config.row_response_tokens)


def step_batch(examples: Sequence[Conversation], own: list[Row], config: TrainConfig) -> Rows:
    """One worker's batch of one step: [B, T] and [B, R], or [A, B, ...] if A are accumulated."""
    batch = batch_rows(examples, own, config)
    if config.accumulate == 1:
        return batch
    shape = (config.accumulate, config.rows)
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), batch)


def stack_workers(batches: Sequence[Rows]) -> Rows:
    """One batch a worker -> one batch of all workers: each leaf [...] becomes [W, ...]."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def hold_out(
    examples: Sequence[Conversation], count: int, seed: int
) -> tuple[list[int], list[int]]:
    """(indices to train on, indices held out), both in order; at most half is held out."""
    count = min(count, len(examples) // 2)
    held_out = set(numpy_stream(seed, "hold out").permutation(len(examples))[:count].tolist())
    train = [index for index in range(len(examples)) if index not in held_out]
    return train, sorted(held_out)
