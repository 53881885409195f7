"""The exchange: a run-time choice among static permutations, in one compiled program.

XLA's collective-permute has its pairs fixed at compile time, so the bank's permutations stand side
by side in a `lax.switch`. Its index is the same on every worker: control flow that followed
`axis_index` would hang.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from persyn_jax.gossip.base import Array, Params
from persyn_jax.gossip.schedules import Bank

Tree = TypeVar("Tree")

FRAGMENT_BYTES = 4 << 20
"""Bytes of a fragment, roughly: it should fit a cache and yet outweigh the latency of a message."""


def receive(tree: Tree, branch: Array, bank: Bank, axis_name: str) -> Tree:
    """What each worker receives when all send their `tree` along permutation `branch` of the bank.

    Runs under `shard_map` or `vmap` with axis `axis_name`. `branch`, int32[], must be the same on
    all workers (under `vmap`: not batched, or every branch would be computed).
    Raises ValueError if axis and bank differ in size (a partial permutation delivers zeros).
    """
    chex.assert_shape(branch, ())
    workers = lax.axis_size(axis_name)
    if workers != bank.workers:
        raise ValueError(f"axis {axis_name!r} has {workers} workers, the bank {bank.workers}")
    permutations = [
        partial(lax.ppermute, axis_name=axis_name, perm=list(enumerate(receivers)))
        for receivers in bank.receivers[1:]
    ]
    return lax.switch(branch, [lambda identity: identity, *permutations], tree)


def mix(
    params: Params,
    branch: Array,
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    bank: Bank,
    axis_name: str,
) -> Params:
    """`combine(own, received)` for all numbers of `params`, fragment by fragment.

    combine: elementwise, float32 (or float64) in and out. The result is rounded to the dtype of
    `params`, which is also the dtype that travels. Branch 0 is no work at all: `params` come back
    as they are.

    Donated parameters are mixed in place, with temporary memory of a few fragments. Arrays are cut
    along rows (the last axis stays whole, which keeps their layout), and those with rows of one
    shape and dtype share a message: one collective-permute a branch for each such group, and one
    more where the rows do not divide evenly.
    """

    def merge(own):
        received = receive(own, branch, bank, axis_name)
        wide = jnp.promote_types(own.dtype, jnp.float32)
        return combine(own.astype(wide), received.astype(wide)).astype(own.dtype)

    leaves, structure = jax.tree.flatten(params)
    groups: dict[tuple, list[int]] = {}
    for index, leaf in enumerate(leaves):
        groups.setdefault((leaf.dtype, _row_shape(leaf)), []).append(index)
    for indices in groups.values():
        mixed = _merge_group([leaves[index] for index in indices], branch, merge)
        for index, leaf in zip(indices, mixed, strict=True):
            leaves[index] = leaf
    return jax.tree.unflatten(structure, leaves)


def _merge_group(leaves: list[jax.Array], branch: Array, merge) -> list[jax.Array]:
    """`merge` of arrays that have one dtype and one shape of row, one fragment of all at a time."""
    rows = [leaf.reshape(-1, *_row_shape(leaf)) for leaf in leaves]
    fragments = _fragment_count(sum(leaf.nbytes for leaf in leaves))
    counts = [len(row) // fragments for row in rows]
    rests = [len(row) % fragments for row in rows]

    def merge_fragment(index, rows):
        return _merge_rows(rows, [index * count for count in counts], counts, merge)

    def merge_rest(_, rows):
        return _merge_rows(rows, [fragments * count for count in counts], rests, merge)

    busy = jnp.where(branch == 0, 0, 1)  # no turn of the loops: a silent round does not even copy
    rows = lax.fori_loop(0, busy * fragments, merge_fragment, rows)
    rows = lax.fori_loop(0, busy, merge_rest, rows)
    return [row.reshape(leaf.shape) for row, leaf in zip(rows, leaves, strict=True)]


def _merge_rows(rows, starts, counts, merge):
    """Merges `counts[j]` rows of array j from row `starts[j]` on, those of all arrays at once."""
    if not any(counts):
        return rows
    pieces = [
        lax.dynamic_slice_in_dim(row, start, count)
        for row, start, count in zip(rows, starts, counts, strict=True)
    ]
    merged = jnp.split(merge(jnp.concatenate(pieces)), np.cumsum(counts)[:-1])
    return [
        lax.dynamic_update_slice_in_dim(row, piece, start, 0)
        for row, piece, start in zip(rows, merged, starts, strict=True)
    ]


def _row_shape(leaf: jax.Array) -> tuple[int, ...]:
    """The last axis; for a vector or a scalar nothing, its rows are numbers."""
    return leaf.shape[1:][-1:]


def _fragment_count(size: int) -> int:
    """A power of two (it divides most numbers of rows) with fragments near FRAGMENT_BYTES."""
    return 2 ** round(np.log2(max(size / FRAGMENT_BYTES, 1)))
