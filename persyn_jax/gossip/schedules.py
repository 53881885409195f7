"""Mixing schedules: who sends to whom in which round. Plain NumPy: a schedule is data, not code."""

from dataclasses import dataclass

import numpy as np

from persyn_jax.gossip.base import Round
from persyn_jax.streams import numpy_stream


@dataclass(frozen=True)
class Bank:
    """The permutations that a compiled program can choose from at run time.

    Raises ValueError unless every branch permutes the workers and branch 0 is the identity.
    """

    receivers: tuple[tuple[int, ...], ...]
    """`receivers[branch][worker]` is the worker that `worker` sends to."""

    def __post_init__(self):
        everyone = tuple(range(self.workers))
        if not everyone or self.receivers[0] != everyone:
            raise ValueError(
                f"bank: branch 0 must be the identity of some workers, got {self.receivers[:1]}"
            )
        for branch, receivers in enumerate(self.receivers):
            if tuple(sorted(receivers)) != everyone:
                raise ValueError(
                    f"bank: branch {branch} must permute {self.workers} workers, got {receivers}"
                )

    @property
    def workers(self) -> int:
        return len(self.receivers[0]) if self.receivers else 0


def xor_bank(workers: int) -> Bank:
    """Branch k pairs worker w with w XOR k. Raises ValueError: workers is no power of two."""
    if workers < 1 or workers & (workers - 1):
        raise ValueError(f"xor bank: the number of workers must be a power of two, got {workers}")
    return Bank(tuple(tuple(w ^ k for w in range(workers)) for k in range(workers)))


def shift_bank(workers: int) -> Bank:
    """Branch k sends from worker w to (w + k) mod W. Raises ValueError: no worker."""
    if workers < 1:
        raise ValueError(f"shift bank: the number of workers must be at least 1, got {workers}")
    return Bank(tuple(tuple((w + k) % workers for w in range(workers)) for k in range(workers)))


@dataclass(frozen=True, eq=False)
class Schedule:
    """A table of T rounds over a bank.

    Raises ValueError if the table does not fit the bank (a compiled program would only clamp).
    """

    bank: Bank
    branches_T: np.ndarray
    """int32[T]: the permutation of each round."""
    push_TW: np.ndarray
    """bool[T, W]: the coin of each worker in each round."""

    def __post_init__(self):
        expected = (len(self.branches_T), self.bank.workers)
        if self.push_TW.shape != expected:
            raise ValueError(f"schedule: push_TW must be {expected}, got {self.push_TW.shape}")
        branches = len(self.bank.receivers)
        if not np.isin(self.branches_T, np.arange(branches)).all():
            raise ValueError(f"schedule: branches must lie in [0, {branches}), the bank's size")

    @property
    def rounds(self) -> int:
        return len(self.branches_T)

    def round(self, t: int) -> Round:
        """Row t, for `MixingTransformation.update`. Raises ValueError outside the table."""
        if not 0 <= t < self.rounds:
            raise ValueError(f"schedule: it has {self.rounds} rounds, asked for round {t}")
        return Round(self.branches_T[t], self.push_TW[t])

    def messages(self) -> np.ndarray:
        """int64[T]: how many models are pushed in each round."""
        return self.push_TW.sum(axis=1)

    def sum_weights(self) -> np.ndarray:
        """float64[T + 1, W]: sum weights before each round and after the last, if no push fails."""
        weights = [np.full(self.bank.workers, 1 / self.bank.workers)]
        for t in range(self.rounds):
            kept_W, received_W = self._split(t, weights[-1])
            weights.append(kept_W + received_W)
        return np.array(weights)

    def mixing_matrix(self, t: int, sum_weight_W: np.ndarray) -> np.ndarray:
        """float64[W, W]: GoSGD's matrix of round t, x <- K x, rows sum to 1.

        sum_weight_W: the sum weights before the round.
        """
        kept_W, received_W = self._split(t, sum_weight_W)
        gain_W = received_W / (kept_W + received_W)
        matrix_WW = np.diag(1 - gain_W)
        for sender, receiver in enumerate(self.bank.receivers[self.branches_T[t]]):
            matrix_WW[receiver, sender] += gain_W[receiver]
        return matrix_WW

    def _split(self, t: int, sum_weight_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What each worker keeps of its sum weight in round t, and what it is sent."""
        sent_W = np.where(self.push_TW[t], sum_weight_W / 2, 0)
        received_W = np.empty_like(sent_W)
        received_W[list(self.bank.receivers[self.branches_T[t]])] = sent_W
        return sum_weight_W - sent_W, received_W


def gosgd_schedule(workers: int, rounds: int, exchange_probability: float, seed: int) -> Schedule:
    """GoSGD in lock step: each worker pushes by its own coin of probability p (Algorithm 1).

    The receivers of a round are one random permutation without fixed points: XOR for a power of
    two, else a cyclic shift. Every other worker is an equally likely receiver, as in the paper, but
    a worker gets at most one message a round, where independent receivers would give it a Poisson
    number. Branch 0, the identity, stands where no coin came up.

    Round t depends on t and the seed, not on how many rounds are asked for.
    Raises ValueError: no worker, negative rounds, a probability outside [0, 1].
    """
    if not 0 <= exchange_probability <= 1:
        raise ValueError(f"exchange probability: must be in [0, 1], got {exchange_probability}")
    if rounds < 0:
        raise ValueError(f"schedule: the number of rounds must not be negative, got {rounds}")
    is_power_of_two = workers > 0 and workers & (workers - 1) == 0
    bank = xor_bank(workers) if is_power_of_two else shift_bank(workers)
    if workers == 1:  # nobody to push to
        return Schedule(bank, np.zeros(rounds, np.int32), np.zeros((rounds, 1), bool))
    coins_TW = numpy_stream(seed, "gossip coins").random((rounds, workers))
    push_TW = coins_TW < exchange_probability
    branches_T = numpy_stream(seed, "gossip receivers").integers(1, len(bank.receivers), rounds)
    branches_T = np.where(push_TW.any(axis=1), branches_T, 0).astype(np.int32)
    return Schedule(bank, branches_T, push_TW)


def expected_gosgd_matrix(exchange_probability: float, sum_weight_W: np.ndarray) -> np.ndarray:
    """float64[W, W]: E[K] of one round of `gosgd_schedule` that starts with these sum weights.

    Receiver r is sent alpha_s / 2 with probability p / (W - 1), and its own coin, independent of
    the sender's, decides whether it then holds alpha_r or half of it.
    """
    p, workers = exchange_probability, len(sum_weight_W)
    sent_WW, own_WW = np.meshgrid(sum_weight_W / 2, sum_weight_W)  # [receiver, sender]
    gain_WW = (1 - p) * sent_WW / (sent_WW + own_WW) + p * sent_WW / (sent_WW + own_WW / 2)
    matrix_WW = gain_WW * p / max(workers - 1, 1)
    np.fill_diagonal(matrix_WW, 0)
    np.fill_diagonal(matrix_WW, 1 - matrix_WW.sum(axis=1))
    return matrix_WW
