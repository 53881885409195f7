"""The exchange: a run-time choice among static permutations, in one compiled program.

XLA's collective-permute has its pairs fixed at compile time, so the bank's permutations stand side
by side in a `lax.switch`. Its index is the same on every worker: control flow that followed
`axis_index` would hang.

Rules are written with these functions, the same for every way of exchanging:

    incoming, outgoing  the weights of a worker's messages in a round, by slot
    send                scalars along the slots: what each worker got
    average             the exact mean of all workers, in rounds that have it
    mix                 own + sum_k gain_k (received_k - own), for a whole tree

The ways:

    bank      `Bank`: any of its permutations, chosen at run time. The default.
    digits    `Bank` with digits: two smaller choices one after the other, above 64 workers.
    cycle     a round of NumPy arrays, not traced: its permutations are known to the compiler, which
              then overlaps them with other work. For a step that is unrolled over a short cycle.
    take      any of these under `jax.vmap(axis_name=...)`, many workers on one device. With
              `one_device` a message is read where it lies, whatever the permutation: faster.
    dense     `Dense`: one all-gather and a matrix product; under vmap the matrix product alone.
"""

from functools import partial, reduce
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from persyn_jax.gossip.banks import AnyBank, Bank, Dense
from persyn_jax.gossip.base import Array, Params, Round
from persyn_jax.gossip.wire import decode, encode, times

Tree = TypeVar("Tree")

FRAGMENT_BYTES = 1 << 20
"""Bytes of a fragment, roughly: it should fit a cache and yet outweigh the latency of a message."""
ONE_DEVICE_FRAGMENT_BYTES = 8 << 20
"""The same for many workers on one device, of all of them together."""


class Exchange(NamedTuple):
    """How the workers of a mesh exchange: what every rule is built from."""

    bank: AnyBank
    axis_name: str
    """The mesh axis (or vmapped axis) of the workers."""
    inner_axes: tuple[str, ...] = ()
    """The mesh axes over which each worker is itself sharded. Shards meet shards; only scalars go
    across these axes: whether an update is finite, and the distance to the partners."""
    dtype: Any = None
    """What parameters travel as: None for their own dtype, `jnp.bfloat16`, or `jnp.int8`.
    Weights are always float32. See `in_dtype`, which adds error feedback."""
    one_device: bool = False
    """All workers are on one device, under `jax.vmap`. (Under `shard_map` this would be an
    all-gather.) The distance to partners is then not measured, but NaN."""


def receive(tree: Tree, branch: Array, bank: Bank, axis_name: str) -> Tree:
    """What each worker receives when all send their `tree` along permutation `branch` of the bank.

    Runs under `shard_map` or `vmap` with axis `axis_name`. `branch`, int32[], must be the same on
    all workers (under `vmap`: not batched, or every branch would be computed). A NumPy `branch` is
    a static choice.
    Raises ValueError if axis and bank differ in size (a partial permutation delivers zeros).
    """
    chex.assert_shape(branch, ())
    workers = lax.axis_size(axis_name)
    if workers != bank.workers:
        raise ValueError(f"axis {axis_name!r} has {workers} workers, the bank {bank.workers}")
    if bank.digits and not _is_static(branch):
        high, low = bank.digits
        tree = receive(tree, branch % low.branches, low, axis_name)
        return receive(tree, branch // low.branches, high, axis_name)
    permutations = [lambda identity: identity] + [
        partial(lax.ppermute, axis_name=axis_name, perm=list(enumerate(receivers_W)))
        for receivers_W in bank.receivers_BW[1:].tolist()
    ]
    if _is_static(branch):
        return permutations[int(branch)](tree)
    return lax.switch(branch, permutations, tree)


def _receive(tree: Tree, branch: Array, exchange: Exchange) -> Tree:
    """`receive`, in the way of the exchange."""
    bank = exchange.bank
    assert isinstance(bank, Bank), "in the matrix mode everything is received at once"
    if not exchange.one_device:
        return receive(tree, branch, bank, exchange.axis_name)
    sender = jnp.asarray(bank.senders_BW)[branch, lax.axis_index(exchange.axis_name)]
    return jax.tree.map(lambda leaf: lax.all_gather(leaf, exchange.axis_name)[sender], tree)


def outgoing(round: Round, exchange: Exchange) -> jax.Array:
    """float[K]: the weight of the message that this worker sends along each slot, 0 for none."""
    _check(round, exchange)
    me = lax.axis_index(exchange.axis_name)
    weight_KW = jnp.asarray(round.weight_KW)
    if isinstance(exchange.bank, Dense):
        return weight_KW[me]
    receiver_K = jnp.asarray(exchange.bank.receivers_BW)[round.branch_K, me]
    weight_K = jnp.take_along_axis(weight_KW, receiver_K[:, None], axis=1)[:, 0]
    return jnp.where(receiver_K == me, 0, weight_K)


def incoming(round: Round, exchange: Exchange) -> jax.Array:
    """float[K]: the weight of the message that this worker gets through each slot."""
    return jnp.asarray(round.weight_KW)[:, lax.axis_index(exchange.axis_name)]


def send(sent_K: jax.Array, round: Round, exchange: Exchange) -> jax.Array:
    """float32[K]: what this worker got through each slot, when all send their `sent_K`."""
    chex.assert_shape(sent_K, round.branch_K.shape)
    if isinstance(exchange.bank, Dense):
        return lax.all_to_all(sent_K, exchange.axis_name, 0, 0)

    def slot(k, got_K):
        return got_K.at[k].set(_receive(sent_K[k], round.branch_K[k], exchange))

    return _over_slots(slot, sent_K * 0, round)


def average(
    params: Params, weight: Array, ok: jax.Array, round: Round, exchange: Exchange
) -> Params:
    """The mean of `params` over the workers, weighted by their `weight`, in rounds with `average`.

    Those that are present and `ok` (bool[]) count in it and get it; the others keep their own, so
    that sum_m weight_m x_m stays what it was. Accumulates in float32, one all-reduce a leaf.
    """
    chex.assert_shape([weight, ok], ())
    if exchange.bank.workers == 1:
        return params
    takes = mine(round.present_W, exchange) & ok
    counted = jnp.where(takes, weight, 0)

    def mean(params):
        total = lax.psum(counted, exchange.axis_name)

        def mean_leaf(leaf):
            wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
            summed = lax.psum(jnp.where(takes, counted * wide, 0), exchange.axis_name)
            return jnp.where(takes, summed / total, wide).astype(leaf.dtype)

        return jax.tree.map(mean_leaf, params)

    return when(round.average, mean, params)


def mix(
    params: Params,
    gain_K: jax.Array,
    round: Round,
    exchange: Exchange,
    scale: jax.Array | None = None,
) -> tuple[Params, jax.Array]:
    """scale * own + sum_k gain_k (received_k - own) for all numbers of `params`.

    gain_K: float32[K], this worker's. A slot without gain is not looked at: it may hold NaN.
    scale: float32[], 1 if not given.
    Returns the tree, and float32[] sum_k ||received_k - own||^2 over the slots with gain: the
    distance to the partners, which estimates the consensus distance for free.

    The sum is taken in float32 (or float64), the result is rounded to the dtype of `params`. With
    `exchange.dtype`, `own` in the bracket is what the worker itself sent, so that exchanges between
    two workers still leave their sum alone.

    Donated parameters are mixed in place, with temporary memory of a few fragments. Arrays are cut
    along rows (the last axis stays whole, which keeps their layout), and those that are sharded
    alike and have rows of one shape and dtype share a message: one collective-permute a branch for
    each such group, and one more where the rows do not divide evenly. (On one device there is no
    message to share, and every array is cut on its own.) A round in which nobody sends does no work
    at all.
    """
    chex.assert_shape(gain_K, round.branch_K.shape)
    if exchange.bank.workers == 1 and scale is None:  # a program with less in it, and one copy less
        return params, jnp.zeros_like(gain_K).sum()
    leaves, structure = jax.tree.flatten(params)
    groups: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        group = index if exchange.one_device else (leaf.dtype, _row_shape(leaf), _axes(leaf))
        groups.setdefault(group, []).append(index)
    merge = partial(_merge, gain_K=gain_K, round=round, exchange=exchange, scale=scale)
    measures = not exchange.one_device or isinstance(exchange.bank, Dense)
    distance = jnp.float32(0)
    for indices in groups.values():
        group = [leaves[index] for index in indices]
        if isinstance(exchange.bank, Dense) or _is_static(round.branch_K):
            results = [merge(leaf) for leaf in group]  # nothing between it and the compiler
            mixed, parts = [leaf for leaf, _ in results], [part for _, part in results]
        else:
            mixed, part = _merge_group(group, exchange, round.branch_K[0], merge)
            parts = [part]
        distance += _over_shards(reduce(jnp.add, map(jnp.sum, parts)), exchange)
        for index, leaf in zip(indices, mixed, strict=True):
            leaves[index] = leaf
    return jax.tree.unflatten(structure, leaves), distance if measures else jnp.float32(jnp.nan)


def when(predicate: Array, function, *operands):
    """`function(*operands)` if the predicate holds (it is the same on all workers), else `operands`
    as they are: a single operand, or the tuple of several."""
    unchanged = operands[0] if len(operands) == 1 else operands
    if _is_static(predicate):
        return function(*operands) if predicate else unchanged
    return lax.cond(predicate, function, lambda *_: unchanged, *operands)


def _merge(own: jax.Array, *, gain_K, round: Round, exchange: Exchange, scale):
    """`mix` of one array: the mixed array, and the squared distance to what was received."""
    wide = jnp.promote_types(own.dtype, jnp.float32)
    message = encode(own, exchange.dtype)
    said = decode(message, wide)
    total = own.astype(wide) if scale is None else times(scale, own.astype(wide))
    if isinstance(exchange.bank, Dense):
        change, distance = _merge_dense(said, gain_K, exchange)
        return (total + change).astype(own.dtype), distance

    def slot(k, carry):
        total, distance = carry
        got = decode(_receive(message, round.branch_K[k], exchange), wide)
        gap = got - said
        if not exchange.one_device:  # there XLA would copy the parameters to keep them for the sum
            distance += jnp.where(gain_K[k] > 0, _column_sums(gap**2), 0)
        return total + times(gain_K[k], gap), distance

    total, distance = _over_slots(slot, (total, _no_distance(said)), round)
    return total.astype(own.dtype), distance


def _column_sums(leaf: jax.Array) -> jax.Array:
    """Over all rows. XLA's CPU adds along columns eight at a time, but a whole array one by one."""
    return leaf.reshape(-1, *_row_shape(leaf)).sum(axis=0)


def _over_shards(part: jax.Array, exchange: Exchange) -> jax.Array:
    """Summed over the shards of a worker, but not over those that hold the same numbers."""
    unlike = unlike_shards(part, exchange)
    return lax.psum(part, unlike) if unlike else part


def unlike_shards(leaf: jax.Array, exchange: Exchange) -> tuple[str, ...]:
    """The inner axes along which shards hold other numbers; only over these may they be reduced."""
    return tuple(axis for axis in exchange.inner_axes if axis in _axes(leaf))


def _axes(leaf: jax.Array) -> frozenset[str]:
    """The mesh axes over which the leaf is sharded, inside `shard_map`."""
    return jax.typeof(leaf).manual_axis_type.varying


def _no_distance(leaf: jax.Array) -> jax.Array:
    """Column sums of no row: zeros that vary over the mesh as `leaf` does."""
    return leaf.reshape(-1, *_row_shape(leaf))[:0].sum(axis=0)


def _merge_dense(said: jax.Array, gain_W: jax.Array, exchange: Exchange):
    """sum_k gain_k (said_k - own) and sum_k ||said_k - own||^2 over the workers k with gain."""
    me = lax.axis_index(exchange.axis_name)
    gain_WW = lax.all_gather(gain_W, exchange.axis_name)  # [receiver, sender]
    is_heard = (gain_WW[:, me] > 0).any()
    said_WN = lax.all_gather(jnp.where(is_heard, said, 0).ravel(), exchange.axis_name)
    change = (gain_W @ said_WN).reshape(said.shape) - gain_W.sum() * said
    mean_N = said_WN.mean(axis=0)  # near the middle of all, so that little cancels
    heard_WN, own_N = said_WN - mean_N[None], said.ravel() - mean_N
    distance_W = jnp.sum(heard_WN**2, axis=1) + jnp.sum(own_N**2) - 2 * (heard_WN @ own_N)
    return change, jnp.sum(jnp.where(gain_W > 0, distance_W, 0))


def _merge_group(leaves: list[jax.Array], exchange: Exchange, first_branch: Array, merge):
    """`merge` of arrays that have one dtype and one shape of row, one fragment of all at a time."""
    rows = [leaf.reshape(-1, *_row_shape(leaf)) for leaf in leaves]
    size = sum(leaf.nbytes for leaf in leaves)
    if exchange.one_device:
        fragments = _fragment_count(exchange.bank.workers * size, ONE_DEVICE_FRAGMENT_BYTES)
    else:
        fragments = _fragment_count(size, FRAGMENT_BYTES)
    counts = [len(row) // fragments for row in rows]
    rests = [len(row) % fragments for row in rows]
    wide = jnp.promote_types(leaves[0].dtype, jnp.float32)
    none = sum(_no_distance(row).astype(wide) for row in rows)

    def merge_fragment(index, carry):
        starts = [index * count for count in counts]
        return _merge_rows(carry, starts, counts, merge)

    def merge_rest(_, carry):
        starts = [fragments * count for count in counts]
        return _merge_rows(carry, starts, rests, merge)

    # Slots in use come first. No turn of the loops: a silent round does not even copy.
    busy = jnp.where(first_branch == 0, 0, 1)
    carry = lax.fori_loop(0, busy * fragments, merge_fragment, (rows, none))
    rows, distance = lax.fori_loop(0, busy, merge_rest, carry)
    return [row.reshape(leaf.shape) for row, leaf in zip(rows, leaves, strict=True)], distance


def _merge_rows(carry, starts, counts, merge):
    """Merges `counts[j]` rows of array j from row `starts[j]` on, those of all arrays at once."""
    rows, distance = carry
    if not any(counts):
        return rows, distance
    pieces = [
        lax.dynamic_slice_in_dim(row, start, count)
        for row, start, count in zip(rows, starts, counts, strict=True)
    ]
    merged, part = merge(jnp.concatenate(pieces))
    pieces = jnp.split(merged, np.cumsum(counts)[:-1])
    rows = [
        lax.dynamic_update_slice_in_dim(row, piece, start, 0)
        for row, piece, start in zip(rows, pieces, starts, strict=True)
    ]
    return rows, distance + part


def _over_slots(slot, carry, round: Round):
    """`slot(k, carry)` for each slot k in use."""
    slots = round.branch_K.shape[0]
    if _is_static(round.branch_K):
        for k in np.flatnonzero(round.branch_K):
            carry = slot(k, carry)
        return carry
    if slots == 1:  # slot 0 of an idle round has no weight, so it may as well run
        return slot(0, carry)
    return lax.fori_loop(0, jnp.sum(round.branch_K > 0), slot, carry)


def mine(value_W: Array, exchange: Exchange) -> jax.Array:
    """This worker's entry of a round's field [W]: data, not control flow."""
    return jnp.asarray(value_W)[lax.axis_index(exchange.axis_name)]


def _check(round: Round, exchange: Exchange) -> None:
    slots = round.branch_K.shape[0]
    workers = exchange.bank.workers
    chex.assert_shape(round.weight_KW, (slots, workers))
    chex.assert_shape([round.steps_W, round.present_W], (workers,))
    chex.assert_shape([round.index, round.sync, round.average], ())


def _is_static(value: Array) -> bool:
    """Whether `value` is known while the program is traced."""
    return not isinstance(value, jax.Array)


def _row_shape(leaf: jax.Array) -> tuple[int, ...]:
    """The last axis; for a vector or a scalar nothing, its rows are numbers."""
    return leaf.shape[1:][-1:]


def _fragment_count(size: int, fragment: int) -> int:
    """A power of two (it divides most numbers of rows) of fragments of about that many bytes."""
    return 2 ** round(np.log2(max(size / fragment, 1)))
