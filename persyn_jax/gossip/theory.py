"""What a schedule promises: the moments of its mixing matrix W, and what follows from them.

W is the pull matrix, x <- W x: what an averaging rule (`d_psgd`) does. Rows sum to 1. Where the
columns do too, a sum-weight rule does the same. GoSGD under single coins does not: its matrices
depend on the sum weights, so on all of the past, and `predicted_consensus_of_table` takes them from
the table.

E is the mean over the law of a random schedule. Without a law it is the mean over the rounds of the
table, of one period if the table repeats itself.

Consensus distance is eps = sum_m ||x_m - xbar||^2 over all workers. It is the trace of Pi C for
C = E[x x'], float64[W, W], one and the same for all coordinates, and Pi = I - 11'/W.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from persyn_jax.gossip.banks import Bank
from persyn_jax.gossip.schedules import Schedule, cycle

EXACT = 1e-12
"""A round that leaves less than this part of what was there has brought exact consensus: the rest
is rounding."""


class Contraction(NamedTuple):
    """The factor of the consensus distance, without updates, over a period of `rounds` rounds."""

    mean: float
    """Expected factor for workers that start independent and identically distributed."""
    worst: float
    """Expected factor in the worst direction: no start does worse."""
    rounds: int
    """How many these factors are of: the period, 1 if there is none."""

    @property
    def mean_per_round(self) -> float:
        return self.mean ** (1 / self.rounds)

    @property
    def worst_per_round(self) -> float:
        return self.worst ** (1 / self.rounds)


def expected_matrix(schedule: Schedule) -> np.ndarray:
    """float64[W, W]: E[W]."""
    total_WW = np.zeros((schedule.workers, schedule.workers))
    for row in _rows(schedule):
        total_WW += row.probability * row.slots_WW @ row.mean_WW
    return total_WW


def expected_gram(schedule: Schedule) -> np.ndarray:
    """float64[W, W]: E[W'W]. Its quadratic form is the expected sum of squares after a round."""
    return _pulled_back(_rows(schedule), np.eye(schedule.workers))


def second_moment(schedule: Schedule, moment_WW: np.ndarray) -> np.ndarray:
    """float64[W, W]: E[W C W'], the moment E[x x'] after a round that began with C."""
    return _pushed_forward(_rows(schedule), moment_WW)


def contraction(schedule: Schedule) -> Contraction:
    """Of the consensus distance, in a period of a schedule that repeats itself, in a round of any
    other: the mean over its law, or over the rounds of its table (which includes all faults).

    With weight b from one uniformly drawn other worker, all having heads, both factors are
    (1-b)^2 + b^2 - 2 b (1-b) / (W - 1). A worker that is alone has no distance: factors of 0.
    """
    centre_WW = _centre(schedule.workers)
    if schedule.period:
        deviation_WW, rounds = _period_deviation(schedule), schedule.period
        gram_WW = deviation_WW.T @ deviation_WW
    else:
        gram_WW, rounds = _pulled_back(_rows(schedule), centre_WW), 1
    mean = float(np.trace(gram_WW)) / max(schedule.workers - 1, 1)
    worst = float(np.linalg.eigvalsh(gram_WW)[-1])
    return Contraction(max(mean, 0.0), max(worst, 0.0), rounds)


def spectral_gap(schedule: Schedule) -> float:
    """1 - |lambda_2| of E[W]; of the period's product, per round, if there is a period."""
    if schedule.period:
        deviation_WW, rounds = _period_deviation(schedule), schedule.period
    else:
        deviation_WW, rounds = _centre(schedule.workers) @ expected_matrix(schedule), 1
    # Since W 1 = 1, taking the mean away turns the eigenvalue 1 into 0 and leaves the others.
    second = np.abs(np.linalg.eigvals(deviation_WW)).max()
    return 1 - float(second) ** (1 / rounds)


def rounds_to_exact_consensus(schedule: Schedule) -> int | None:
    """The first t with W_{t-1} ... W_0 = 11'/W but for rounding; None if the table has none."""
    workers = schedule.workers
    product_WW = np.eye(workers)
    for t, deviation_WW in enumerate(_deviations(schedule, schedule.rounds)):
        if not deviation_WW.any():  # all agree; on the mean?
            return t if np.abs(product_WW - 1 / workers).max() < EXACT else None
        if t < schedule.rounds:
            product_WW = schedule.pull_matrix(t) @ product_WW
    return None


def predicted_consensus(
    schedule: Schedule, rounds: int, noise: float = 1.0, start_WW: np.ndarray | None = None
) -> np.ndarray:
    """float64[rounds + 1]: E[eps] / d before round 0 and after each, where x <- W (x + u).

    The updates u ~ N(0, noise I_d) are drawn for each worker that steps, independently in every
    round. The mean is over them and over the law; a table without a law is gone through again and
    again.

    start_WW: E[x x'] at the start; zero if not given (all workers at 0).
    """
    if not schedule.law:
        return _of_table(schedule, np.arange(rounds) % _period(schedule), noise, start_WW)
    rows, fresh_WW = list(_rows(schedule)), noise * np.eye(schedule.workers)
    moment_WW = _start(schedule, start_WW)
    moments = [moment_WW]
    for _ in range(rounds):
        moment_WW = _pushed_forward(rows, moment_WW + fresh_WW)
        moments.append(moment_WW)
    return _distances(moments)


def predicted_consensus_of_table(
    schedule: Schedule,
    noise: float = 1.0,
    start_WW: np.ndarray | None = None,
    sum_weights: bool = False,
) -> np.ndarray:
    """float64[T + 1]: `predicted_consensus` given the table: the mean is over the updates alone.

    sum_weights: mix with GoSGD's matrices instead of the pull matrices. Averaged over tables of
    many seeds, this is the prediction for GoSGD.
    """
    return _of_table(schedule, np.arange(schedule.rounds), noise, start_WW, sum_weights)


def _of_table(
    schedule: Schedule,
    round_T: np.ndarray,
    noise: float,
    start_WW: np.ndarray | None,
    sum_weights: bool = False,
) -> np.ndarray:
    moment_WW = _start(schedule, start_WW)
    moments = [moment_WW]
    weight_TW = schedule.sum_weights() if sum_weights else None
    for t in round_T:
        if weight_TW is None:
            matrix_WW = schedule.pull_matrix(t)
        else:
            matrix_WW = schedule.sum_weight_matrix(t, weight_TW[t])
        moment_WW = moment_WW + noise * np.diag(schedule.steps_TW[t])
        moment_WW = matrix_WW @ moment_WW @ matrix_WW.T
        moments.append(moment_WW)
    return _distances(moments)


class _Row(NamedTuple):
    """One row that a round may be: W = B J, where B holds the slots and may be random."""

    probability: float
    slots_WW: np.ndarray
    """E[B]."""
    variance_WW: np.ndarray
    """Variances off the diagonal of B. Each message has its own coin, so these entries are
    independent. The diagonal is 1 minus the rest of its row."""
    mean_WW: np.ndarray
    """J: the exact mean if the row takes it, else the identity."""


def _rows(schedule: Schedule) -> Iterator[_Row]:
    workers, law = schedule.workers, schedule.law
    identity_WW, nothing_WW = np.eye(workers), np.zeros((workers, workers))
    if law is None:
        period = _period(schedule)
        for t in range(period):
            yield _Row(1 / period, schedule.pull_matrix(t), nothing_WW, identity_WW)
        return
    assert isinstance(schedule.bank, Bank)  # nothing else is drawn over
    table = cycle(schedule.bank, law.rows, len(law.probability_S))
    slots = replace(table, average_T=np.zeros_like(table.average_T))
    for s, probability in enumerate(law.probability_S):
        squares_WW = np.zeros((workers, workers))
        for receiver, sender, weight in slots.edges(s):
            squares_WW[receiver, sender] += weight**2
        yield _Row(
            probability=float(probability),
            slots_WW=identity_WW + law.coin * (slots.pull_matrix(s) - identity_WW),
            variance_WW=law.coin * (1 - law.coin) * squares_WW,
            mean_WW=nothing_WW + 1 / workers if table.average_T[s] else identity_WW,
        )


def _pushed_forward(rows: Iterable[_Row], moment_WW: np.ndarray) -> np.ndarray:
    """E[W C W']: a coin that changes worker i's step towards j moves i by its gap to j."""
    total_WW = np.zeros_like(moment_WW, dtype=np.float64)
    for row in rows:
        before_WW = row.mean_WW @ moment_WW @ row.mean_WW.T
        after_WW = row.slots_WW @ before_WW @ row.slots_WW.T
        square_W = np.diag(before_WW)
        gap_WW = square_W[:, None] + square_W - before_WW - before_WW.T  # E (x_i - x_j)^2
        spread_WW = np.diag((row.variance_WW * gap_WW).sum(axis=1))
        total_WW += row.probability * (after_WW + spread_WW)
    return total_WW


def _pulled_back(rows: Iterable[_Row], form_WW: np.ndarray) -> np.ndarray:
    """E[W' Q W], the adjoint: trace(Q E[W C W']) = trace(E[W' Q W] C) for symmetric C."""
    total_WW = np.zeros_like(form_WW)
    for row in rows:
        weight_WW = row.variance_WW * np.diag(form_WW)[:, None]
        both_WW = weight_WW + weight_WW.T
        laplacian_WW = np.diag(both_WW.sum(axis=1)) - both_WW
        after_WW = row.slots_WW.T @ form_WW @ row.slots_WW + laplacian_WW
        total_WW += row.probability * (row.mean_WW.T @ after_WW @ row.mean_WW)
    return total_WW


def _period_deviation(schedule: Schedule) -> np.ndarray:
    """Pi times the product of the matrices of a period."""
    *_, last_WW = _deviations(schedule, _period(schedule))
    return last_WW


def _deviations(schedule: Schedule, rounds: int) -> Iterator[np.ndarray]:
    """Pi W_{t-1} ... W_0 for t = 0 .. rounds: exactly 0 from the round on in which all agree."""
    deviation_WW = _centre(schedule.workers)
    yield deviation_WW
    for t in range(rounds):
        before = np.abs(deviation_WW).max()
        deviation_WW = schedule.pull_matrix(t) @ deviation_WW
        deviation_WW -= deviation_WW.mean(axis=0)
        if np.abs(deviation_WW).max() < EXACT * before:
            deviation_WW = np.zeros_like(deviation_WW)
        yield deviation_WW


def _period(schedule: Schedule) -> int:
    """After how many rounds the table begins again: at its end, if it does not repeat itself."""
    period = schedule.period or schedule.rounds
    if not 0 < period <= schedule.rounds:
        raise ValueError(
            f"theory: a table of {schedule.rounds} rounds does not hold its period of {period}"
        )
    return period


def _start(schedule: Schedule, start_WW: np.ndarray | None) -> np.ndarray:
    if start_WW is None:
        return np.zeros((schedule.workers, schedule.workers))
    return np.asarray(start_WW, np.float64)


def _centre(workers: int) -> np.ndarray:
    """Pi, which takes the mean away."""
    return np.eye(workers) - 1 / workers


def _distances(moments: list[np.ndarray]) -> np.ndarray:
    """trace(Pi C) of each."""
    return np.array([np.trace(C_WW) - len(C_WW) * C_WW.mean() for C_WW in moments])
