"""Banks: the exchanges that a compiled program can choose from at run time. Plain NumPy."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

DIRECT_WORKERS = 64
"""Above this, XOR and shift banks are factored: a program of 255 permutations takes a minute to
compile for a pod, one of 2 x 15 takes two seconds."""


@dataclass(frozen=True, eq=False)
class Bank:
    """Permutations of the workers; branch 0 is the identity.

    Raises ValueError unless every branch permutes the workers, branch 0 is the identity, and the
    factors, if there are any, compose to the branches.
    """

    receivers_BW: np.ndarray
    """int32[B, W]: in branch b, worker w sends to `receivers_BW[b, w]`."""
    digits: "tuple[Bank, Bank] | None" = None
    """(high, low): branch b is branch b % L of low, then branch b // L of high, L being the number
    of branches of low. The program then holds the branches of both and not of their product; a
    message may travel twice."""

    def __post_init__(self):
        if self.receivers_BW.ndim != 2 or not self.receivers_BW.size:
            raise ValueError(f"bank: receivers must be [B, W], got {self.receivers_BW.shape}")
        everyone = np.arange(self.workers)
        if (self.receivers_BW[0] != everyone).any():
            raise ValueError(f"bank: branch 0 must be the identity, got {self.receivers_BW[0]}")
        for branch, receivers_W in enumerate(self.receivers_BW):
            if (np.sort(receivers_W) != everyone).any():
                raise ValueError(
                    f"bank: branch {branch} must permute {self.workers} workers, got {receivers_W}"
                )
        if self.digits and (_compose(*self.digits) != self.receivers_BW).any():
            raise ValueError("bank: its digits do not compose to its branches")

    @property
    def branches(self) -> int:
        return self.receivers_BW.shape[0]

    @property
    def workers(self) -> int:
        return self.receivers_BW.shape[1]

    @cached_property
    def senders_BW(self) -> np.ndarray:
        """int32[B, W]: in branch b, worker w hears from `senders_BW[b, w]`."""
        return np.argsort(self.receivers_BW, axis=1).astype(np.int32)


@dataclass(frozen=True)
class Dense:
    """The matrix mode: every worker hears every other, slot k from worker k.

    Any mixing matrix is one row of weights, so one program serves every schedule. It moves W - 1
    models a worker a round: made for many workers on one device, where that is one matrix product.
    """

    workers: int

    @property
    def branches(self) -> int:
        return self.workers


AnyBank = Bank | Dense


def xor_bank(workers: int) -> Bank:
    """Branch k pairs worker w with w XOR k. Raises ValueError: workers is no power of two."""
    if not is_power_of_two(workers):
        raise ValueError(f"xor bank: the number of workers must be a power of two, got {workers}")
    return _digit_bank(workers, lambda w, k: w ^ k)


def shift_bank(workers: int) -> Bank:
    """Branch k sends from worker w to (w + k) mod W. Raises ValueError: no worker."""
    if workers < 1:
        raise ValueError(f"shift bank: the number of workers must be at least 1, got {workers}")
    return _digit_bank(workers, lambda w, k: (w + k) % workers)


def bank_of(permutations: np.ndarray) -> tuple[Bank, np.ndarray]:
    """The bank of the permutations [..., W] (receivers of each worker), and their branches [...].

    Each distinct permutation is one branch; the identity is always branch 0.
    Raises ValueError as `Bank` does.
    """
    permutations = np.asarray(permutations, np.int32)
    everyone = np.arange(permutations.shape[-1], dtype=np.int32)
    rows = np.concatenate([everyone[None], permutations.reshape(-1, len(everyone))])
    distinct, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)  # in order of appearance, so the identity, put first, stays first
    branches = np.argsort(order)[inverse.reshape(-1)[1:]]
    return Bank(distinct[order]), branches.reshape(permutations.shape[:-1]).astype(np.int32)


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _digit_bank(workers: int, receiver) -> Bank:
    """Of the group whose element k takes worker w to `receiver(w, k)`; factored when large."""
    w = np.arange(workers, dtype=np.int32)

    def branches(elements) -> np.ndarray:
        return np.array([receiver(w, k) for k in elements], np.int32)

    if workers <= DIRECT_WORKERS:
        return Bank(branches(range(workers)))
    base = 2 ** round(np.log2(workers) / 2)
    low, high = Bank(branches(range(base))), Bank(branches(range(0, workers, base)))
    return Bank(_compose(high, low), digits=(high, low))


def _compose(high: Bank, low: Bank) -> np.ndarray:
    """int32[B, W]: row h * L + l is low's branch l, then high's branch h."""
    composed = high.receivers_BW[:, low.receivers_BW]  # [H, L, W]
    return composed.reshape(-1, low.workers)
