"""Base-(k+1) graphs (Takezawa et al. 2023, arXiv 2305.11420) as mixing matrices. Plain NumPy."""

import math
from collections.abc import Iterable, Sequence

import numpy as np


def base_graph(workers: int, degree: int) -> list[np.ndarray]:
    """float64[W, W] each: matrices whose product is the exact mean, for any number of workers.

    All are symmetric and doubly stochastic, and nobody has more than `degree` neighbours in a
    round. There are at most 2 log_(degree + 1) W + 2 of them, none for a single worker.

    The shorter of two constructions: the Simple Base-(k+1) graph of all workers, or that of each of
    B blocks and then the mean over blocks, with B the part of W that has no prime factor above k+1.
    """
    base = degree + 1
    blocks = math.prod(_factors(workers, base))
    size = workers // blocks
    inside = [np.kron(np.eye(blocks), matrix_WW) for matrix_WW in _simple(size, base)]
    across = [np.kron(matrix_WW, np.eye(size)) for matrix_WW in _simple(blocks, base)]
    return min(inside + across, _simple(workers, base), key=len)


def _simple(workers: int, base: int) -> list[np.ndarray]:
    """The Simple Base-(k+1) graph (the paper's Algorithm 1)."""
    if math.prod(_factors(workers, base)) == workers:
        return [_means(workers, groups) for groups in _hyper_hypercube(np.arange(workers), base)]
    parts = _parts(workers, base)
    # First every part comes to its own mean.
    rounds_of_part = [_hyper_hypercube(part.ravel(), base) for part in parts]
    matrices = [
        _means(workers, [group for rounds in rounds_of_part for group in _cyclic(rounds, t)])
        for t in range(len(rounds_of_part[0]))
    ]
    # Then part after part exchanges with all later ones, so that these hold the mean of all so far;
    # after that it settles block by block, for each of its blocks took in the same.
    last = len(parts) - 1
    rounds_of_part = [_rounds_by_block(part, base) for part in parts]
    for t in range(len(rounds_of_part[0]) + 1):
        settling = range(t) if t < last else range(last + 1)
        groups = [group for part in settling for group in _cyclic(rounds_of_part[part], t)]
        matrices.append(_means(workers, groups))
        if t < last:
            _exchange_with_later(matrices[-1], parts[t:], base)
    return matrices


def _factors(number: int, largest: int) -> list[int]:
    """Factors of `number` up to `largest`, until only prime factors above that are left."""
    factors = []
    for factor in range(largest, 1, -1):
        while number % factor == 0:
            factors.append(factor)
            number //= factor
    return factors


def _parts(workers: int, base: int) -> list[np.ndarray]:
    """Workers [blocks, size] for each digit of their number in `base` that is not 0, size being the
    place value and blocks the digit; the largest size first."""
    parts, first, size = [], 0, 1
    while size * base <= workers:
        size *= base
    while first < workers:
        blocks = (workers - first) // size
        if blocks:
            parts.append(first + np.arange(blocks * size).reshape(blocks, size))
        first += blocks * size
        size //= base
    return parts


def _hyper_hypercube(members: np.ndarray, base: int) -> list[np.ndarray]:
    """Rounds of groups [groups, size] that each take their mean; after the last, all members agree.

    Members are numbered in mixed radix; a group are those that differ in one digit only. Their
    number must have no prime factor above `base`.
    """
    radices = _factors(len(members), base)
    grid = np.reshape(members, radices)
    return [np.moveaxis(grid, digit, -1).reshape(-1, size) for digit, size in enumerate(radices)]


def _rounds_by_block(part: np.ndarray, base: int) -> list[np.ndarray]:
    """Rounds of groups after which each block agrees; if a block is one worker, all blocks do."""
    if part.shape[1] == 1:
        return _hyper_hypercube(part.ravel(), base)
    blocks = [_hyper_hypercube(block, base) for block in part]
    return [np.concatenate(groups) for groups in zip(*blocks, strict=True)]


def _cyclic(rounds: list[np.ndarray], t: int) -> list[np.ndarray]:
    """The groups of round t of rounds that repeat forever; none if there are no rounds. Any so many
    rounds in a row do, for their order does not matter."""
    return list(rounds[t % len(rounds)]) if rounds else []


def _means(workers: int, groups: Iterable[np.ndarray]) -> np.ndarray:
    """float64[W, W]: each group takes its mean, everyone else stands still."""
    matrix_WW = np.eye(workers)
    for group in groups:
        matrix_WW[np.ix_(group, group)] = 1 / len(group)
    return matrix_WW


def _exchange_with_later(matrix_WW: np.ndarray, parts: Sequence[np.ndarray], base: int) -> None:
    """Writes to `matrix_WW`: the first part exchanges with all others.

    Each worker of the others meets one of every block, and is left with the mean of first part and
    others by their sizes. Workers of the first part who meet nobody average in groups.
    """
    first, others = parts[0], np.concatenate([part.ravel() for part in parts[1:]])
    share = first.size / (first.size + len(others))
    weight = share / len(first)
    matrix_WW[others, others] = 1 - share
    for block in first[:, : len(others)]:
        matrix_WW[block, block] = 1 - weight
        matrix_WW[block, others] = matrix_WW[others, block] = weight
    idle = first[:, len(others) :].ravel()
    for start in range(0, len(idle), base):
        group = idle[start : start + base]
        matrix_WW[np.ix_(group, group)] = 1 / len(group)
