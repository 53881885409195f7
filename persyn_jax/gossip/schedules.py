"""A mixing schedule: who sends to whom in which round, and with what weight. Plain NumPy: data.

The schedules of the field are in `topologies`, all made by the two functions here: `cycle`, for
those that repeat a list of rows, and `draw`, for those whose rounds are drawn from a law.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from persyn_jax.gossip.banks import AnyBank, Bank, Dense
from persyn_jax.gossip.base import Round
from persyn_jax.streams import numpy_stream


class Rows(NamedTuple):
    """Some rows that a schedule may hold, S of them."""

    branches_SK: np.ndarray
    """int32[S, K]: the permutation of each slot, 0 for none."""
    weights_SKW: np.ndarray
    """float64[S, K, W]: the weight of the message that each worker gets through each slot."""
    average_S: np.ndarray
    """bool[S]: whether the exact mean is taken, before the slots."""


class Law(NamedTuple):
    """The law of a random schedule: each round is drawn anew, independently of the others."""

    rows: Rows
    probability_S: np.ndarray
    """float64[S]: of each row; totals 1."""
    coin: float
    """Probability of each message of the drawn row to be sent, independently of the others."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """A table of T rounds over a bank.

    Raises ValueError if the table does not fit the bank (a compiled program would only clamp), or
    if a worker would take or give more than there is.
    """

    bank: AnyBank
    branches_TK: np.ndarray
    """int32[T, K]: the permutation of each slot; 0 for none."""
    weights_TKW: np.ndarray
    """float64[T, K, W]: the weight of the message that each worker gets through each slot."""
    average_T: np.ndarray
    """bool[T]: whether the exact mean is taken, before the slots."""
    sync_T: np.ndarray
    """bool[T]: whether workers exchange in this round."""
    steps_TW: np.ndarray
    """bool[T, W]: who takes its local step."""
    present_TW: np.ndarray
    """bool[T, W]: who is there."""
    period: int | None = None
    """After how many rounds the table repeats itself, if it does."""
    law: Law | None = None
    """What its rounds were drawn from, if they were."""

    def __post_init__(self):
        rounds, slots, workers = self.weights_TKW.shape
        if workers != self.workers:
            raise ValueError(f"schedule: weights of {workers} workers, a bank of {self.workers}")
        for name, expected in (
            ("branches_TK", (rounds, slots)),
            ("average_T", (rounds,)),
            ("sync_T", (rounds,)),
            ("steps_TW", (rounds, workers)),
            ("present_TW", (rounds, workers)),
        ):
            if getattr(self, name).shape != expected:
                shape = getattr(self, name).shape
                raise ValueError(f"schedule: {name} must be {expected}, got {shape}")
        branches = self.bank.branches
        if ((self.branches_TK < 0) | (self.branches_TK >= branches)).any():
            raise ValueError(f"schedule: branches must lie in [0, {branches}), the bank's size")
        if not ((self.weights_TKW >= 0) & (self.weights_TKW <= 1)).all():
            raise ValueError("schedule: weights must lie in [0, 1]")

    @property
    def rounds(self) -> int:
        return len(self.branches_TK)

    @property
    def slots(self) -> int:
        return self.branches_TK.shape[1]

    @property
    def workers(self) -> int:
        return self.bank.workers

    def round(self, t: int) -> Round:
        """Row t, for `MixingTransformation.update`. Raises ValueError outside the table."""
        if not 0 <= t < self.rounds:
            raise ValueError(f"schedule: it has {self.rounds} rounds, asked for round {t}")
        return Round(np.asarray(t, np.int32), *(column[t] for column in self._columns()))

    def table(self) -> Round:
        """All rows at once, each field with a leading axis T: for `jax.lax.scan`."""
        return Round(np.arange(self.rounds, dtype=np.int32), *self._columns())

    def messages(self) -> np.ndarray:
        """int64[T]: how many models are sent in each round, not counting those of the mean."""
        return (self.weights_TKW > 0).sum(axis=(1, 2))

    def edges(self, t: int) -> list[tuple[int, int, float]]:
        """(receiver, sender, weight) of each message of round t, by slot and receiver."""
        slots, receivers = np.nonzero(self.weights_TKW[t])
        senders = self._senders_KW(t)[slots, receivers]
        weights = self.weights_TKW[t, slots, receivers]
        return list(zip(receivers.tolist(), senders.tolist(), weights.tolist(), strict=True))

    def pull_matrix(self, t: int) -> np.ndarray:
        """float64[W, W]: x <- W x of an averaging rule in round t. Rows sum to 1.

        Raises ValueError if a worker takes more than the whole of its value from others.
        """
        flow_WW = self._flow(t)
        return (np.diag(self._rest(flow_WW.sum(axis=1), t, "takes")) + flow_WW) @ self._mean(
            t, np.ones(self.workers)
        )

    def push_matrix(self, t: int) -> np.ndarray:
        """float64[W, W]: mass <- A mass of a sum-weight rule in round t. Columns sum to 1.

        Raises ValueError if a worker gives away more than it has.
        """
        return self._push_slots(t) @ self._mean(t, np.ones(self.workers))

    def sum_weights(self) -> np.ndarray:
        """float64[T + 1, W]: GoSGD's, before each round and after the last, if no push fails.

        An exact mean leaves them alone.
        """
        weights = [np.full(self.workers, 1 / self.workers)]
        for t in range(self.rounds):
            weights.append(self._push_slots(t) @ weights[-1])
        return np.array(weights)

    def sum_weight_matrix(self, t: int, sum_weight_W: np.ndarray) -> np.ndarray:
        """float64[W, W]: GoSGD's matrix of round t, x <- K x. Rows sum to 1.

        sum_weight_W: the sum weights before the round.
        """
        mass_WW = self._push_slots(t) * sum_weight_W
        return mass_WW / mass_WW.sum(axis=1, keepdims=True) @ self._mean(t, sum_weight_W)

    def dense(self) -> "Schedule":
        """The same schedule in the matrix mode. Exact means stay what they are."""
        if isinstance(self.bank, Dense):
            return self
        flow_TWW = [self._flow(t) for t in range(self.rounds)]
        everyone = np.arange(self.workers, dtype=np.int32)
        return replace(
            self,
            bank=Dense(self.workers),
            branches_TK=np.tile(everyone, (self.rounds, 1)),
            weights_TKW=np.reshape(flow_TWW, (-1, self.workers, self.workers)).transpose(0, 2, 1),
            law=None,
        )

    def _columns(self) -> tuple[np.ndarray, ...]:
        return (
            self.sync_T,
            self.average_T,
            self.branches_TK,
            self.weights_TKW,
            self.steps_TW,
            self.present_TW,
        )

    def _senders_KW(self, t: int) -> np.ndarray:
        if isinstance(self.bank, Dense):
            return np.repeat(np.arange(self.workers)[:, None], self.workers, axis=1)
        return self.bank.senders_BW[self.branches_TK[t]]

    def _flow(self, t: int) -> np.ndarray:
        """float64[W, W]: the weights of round t off the diagonal, [receiver, sender]."""
        flow_WW = np.zeros((self.workers, self.workers))
        for receiver, sender, weight in self.edges(t):
            flow_WW[receiver, sender] += weight
        return flow_WW

    def _push_slots(self, t: int) -> np.ndarray:
        """float64[W, W]: the push matrix of the slots alone."""
        flow_WW = self._flow(t)
        return np.diag(self._rest(flow_WW.sum(axis=0), t, "gives")) + flow_WW

    def _mean(self, t: int, weight_W: np.ndarray) -> np.ndarray:
        """float64[W, W]: the weighted mean that the present take before the slots, if they do."""
        mean_WW = np.eye(self.workers)
        if self.average_T[t]:
            present = np.flatnonzero(self.present_TW[t])
            mean_WW[np.ix_(present, present)] = weight_W[present] / weight_W[present].sum()
        return mean_WW

    def _rest(self, total_W: np.ndarray, t: int, verb: str) -> np.ndarray:
        if (total_W > 1 + 1e-9).any():
            worker = int(total_W.argmax())
            raise ValueError(
                f"schedule: in round {t} worker {worker} {verb} {total_W[worker]:.4g} of a model,"
                " at most 1 is there"
            )
        return np.maximum(1 - total_W, 0)


def cycle(bank: Bank, rows: Rows, rounds: int) -> Schedule:
    """A schedule that repeats `rows`, from the first on. Raises ValueError: negative rounds."""
    period = len(rows.branches_SK)
    return replace(_schedule(bank, rows, np.arange(_count(rounds)) % period), period=period)


def draw(bank: Bank, law: Law, rounds: int, seed: int) -> Schedule:
    """A schedule whose rounds are drawn from `law`.

    Round t depends on t and the seed, not on how many rounds are asked for.
    Raises ValueError: a coin outside [0, 1], negative rounds.
    """
    if not 0 <= law.coin <= 1:
        raise ValueError(f"exchange probability: must be in [0, 1], got {law.coin}")
    uniform_T = numpy_stream(seed, "gossip receivers").random(_count(rounds))
    last = len(law.probability_S) - 1
    chosen_T = np.minimum(np.searchsorted(np.cumsum(law.probability_S), uniform_T, "right"), last)
    branches_TK, weights_TKW = law.rows.branches_SK[chosen_T], law.rows.weights_SKW[chosen_T]
    coins_TKW = numpy_stream(seed, "gossip coins").random(weights_TKW.shape) < law.coin
    sender_TKW = bank.senders_BW[branches_TK]
    heads_TKW = np.take_along_axis(coins_TKW, sender_TKW, axis=2)  # the coin is the sender's
    rows = Rows(branches_TK, weights_TKW * heads_TKW, law.rows.average_S[chosen_T])
    return replace(_schedule(bank, rows, np.arange(rounds)), law=law)


def packed(rows: Rows) -> Rows:
    """The same rows, with branch 0 in every slot that carries nothing and those slots last."""
    used_SK = (rows.weights_SKW > 0).any(axis=2)
    order_SK = np.argsort(~used_SK, axis=1, kind="stable")
    branches_SK = np.where(used_SK, rows.branches_SK, 0)
    return Rows(
        np.take_along_axis(branches_SK, order_SK, axis=1).astype(np.int32),
        np.take_along_axis(rows.weights_SKW, order_SK[:, :, None], axis=1),
        rows.average_S,
    )


def _schedule(bank: Bank, rows: Rows, chosen_T: np.ndarray) -> Schedule:
    """The table of row `chosen_T[t]` in round t. Everyone is there, steps, and exchanges."""
    branches_SK, weights_SKW, average_S = packed(rows)
    everyone_TW = np.ones((len(chosen_T), bank.workers), bool)
    return Schedule(
        bank=bank,
        branches_TK=branches_SK[chosen_T],
        weights_TKW=weights_SKW[chosen_T],
        average_T=average_S[chosen_T],
        sync_T=np.ones(len(chosen_T), bool),
        steps_TW=everyone_TW,
        present_TW=everyone_TW.copy(),
    )


def _count(rounds: int) -> int:
    if rounds < 0:
        raise ValueError(f"schedule: the number of rounds must not be negative, got {rounds}")
    return rounds
