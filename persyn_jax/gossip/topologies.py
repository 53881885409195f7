"""The schedules of the field. Each is a function from (workers, rounds, ...) to a `Schedule`.

Either they repeat a short list of rows, or each round is drawn, independently of the others, from a
law (`Schedule.law`). Round t does not depend on how many rounds are asked for.

"Exact after n rounds" means that n rounds bring all workers to the exact mean, wherever they start
and at whichever multiple of n they start. Every schedule takes any number of workers from 1 on
unless it says otherwise, and raises ValueError for other numbers, for negative rounds, and for
weights and probabilities outside [0, 1].

A schedule that repeats has a bank of its own permutations and no other: small code, one hop a
message. `compose.share_bank` puts schedules over one bank.
"""

import math
from dataclasses import replace

import numpy as np

from persyn_jax.gossip.banks import Bank, bank_of, is_power_of_two, shift_bank, xor_bank
from persyn_jax.gossip.base_graph import base_graph
from persyn_jax.gossip.compose import periodic_average
from persyn_jax.gossip.graphs import from_matrices, from_permutations, permutation_rows
from persyn_jax.gossip.schedules import Law, Rows, Schedule, cycle, draw
from persyn_jax.streams import numpy_stream

# Random schedules.


def gosgd_schedule(workers: int, rounds: int, exchange_probability: float, seed: int) -> Schedule:
    """GoSGD in lock step: each worker pushes by its own coin of probability p (Algorithm 1).

    The receivers of a round are one random permutation without fixed points: XOR for a power of
    two, else a cyclic shift. Every other worker is an equally likely receiver, as in the paper, but
    a worker gets at most one message a round, where independent receivers would give it a Poisson
    number. Half the sender's sum weight goes with a message.

    Raises ValueError: no worker, negative rounds, a probability outside [0, 1].
    """
    bank = _bank_of_all_pairs(workers)
    return draw(bank, _uniform_law(bank, 1 / 2, coin=exchange_probability), rounds, seed)


def common_coin(workers: int, rounds: int, exchange_probability: float, seed: int) -> Schedule:
    """GoSGD with one coin a round for all: all push, with probability p, or nobody does.

    As many messages as under `gosgd_schedule`, on average, but none of a permutation's is wasted,
    and sum weights stay equal: doubly stochastic. Rounds without exchange have `sync` False.
    """
    _check_workers("common_coin", workers)
    _check_fraction("common_coin", "exchange probability", exchange_probability)
    bank = _bank_of_all_pairs(workers)
    law = _uniform_law(bank, 1 / 2)
    everyone_or_nobody = Law(
        rows=Rows(*map(np.concatenate, zip(law.rows, _nothing(workers), strict=True))),
        probability_S=np.append(exchange_probability * law.probability_S, 1 - exchange_probability),
        coin=1.0,
    )
    schedule = draw(bank, everyone_or_nobody, rounds, seed)
    return replace(schedule, sync_T=schedule.messages() > 0)


def random_shift(workers: int, rounds: int, seed: int, weight: float = 0.5) -> Schedule:
    """Worker w sends to w + s mod W, s drawn anew each round from 1 .. W - 1. Doubly stochastic.

    The OD-EquiDyn of EquiTopo (Song et al. 2022, arXiv 2210.07881): weight is its
    eta (W - 1) / W.
    """
    _check_workers("random_shift", workers)
    _check_fraction("random_shift", "weight", weight)
    bank = shift_bank(workers)
    return draw(bank, _uniform_law(bank, weight), rounds, seed)


def random_xor(workers: int, rounds: int, seed: int) -> Schedule:
    """Worker w and w XOR s average, s drawn anew each round from 1 .. W - 1. W: a power of two.

    Symmetric, doubly stochastic. Exact as soon as the s drawn span all bits: after about
    log2 W + 2 rounds, most of the time.
    """
    _check_power_of_two("random_xor", workers)
    bank = xor_bank(workers)
    return draw(bank, _uniform_law(bank, 1 / 2), rounds, seed)


def random_matching(workers: int, rounds: int, seed: int) -> Schedule:
    """Pairs average: one of the matchings of a round-robin tournament, drawn anew each round.

    Every pair is equally likely to meet. Symmetric, doubly stochastic. Of an odd number of workers
    one is idle each round, each in one of the W matchings (for an even number there are W - 1).
    """
    _check_workers("random_matching", workers)
    bank, _ = bank_of(_round_robin(workers))
    return draw(bank, _uniform_law(bank, 1 / 2), rounds, seed)


def ou_equi_dyn(workers: int, rounds: int, seed: int, weight: float = 0.5) -> Schedule:
    """OU-EquiDyn of EquiTopo (Song et al. 2022, arXiv 2210.07881): shift a and start s are drawn,
    and going round from s, worker i is paired with i + a mod W if both are free.

    Weight is the paper's eta (W - 1) / W. Symmetric, doubly stochastic; some workers are idle. The
    bank has some W^2 / 3 matchings: on many devices, `random_matching` is as good with W - 1.
    """
    _check_workers("ou_equi_dyn", workers)
    _check_fraction("ou_equi_dyn", "weight", weight)
    matchings = [
        _matching_of_shift(workers, shift, start)
        for shift in range(min(1, workers - 1), workers)
        for start in range(workers)
    ]
    bank, rows = permutation_rows(np.array(matchings)[:, None, :], weight)
    probability_S = np.full(len(matchings), 1 / len(matchings))
    return draw(bank, Law(rows, probability_S, coin=1.0), rounds, seed)


def random_pull(workers: int, rounds: int, seed: int, weight: float = 0.5) -> Schedule:
    """Each worker reads one uniformly drawn other, by itself: several may read the same one.

    Rows sum to 1, columns do not: the mean wanders. This is the graph of levanter's rule and of
    epidemic learning by pull. The reader of shift k uses slot k, so a round takes W - 1 slots, of
    which some 2/3 are busy, to carry one useful message a worker: as any exchange with freely drawn
    readers, it is made for many workers on one device (`Schedule.dense`). It has no law: there
    would be (W - 1)^W rows.
    """
    _check_workers("random_pull", workers)
    _check_fraction("random_pull", "weight", weight)
    others = max(workers - 1, 1)
    read_TW = numpy_stream(seed, "random pull").integers(others, size=(max(rounds, 0), workers))
    shifts_K = 1 + np.arange(others)
    rows = Rows(
        branches_SK=np.tile(shifts_K % workers, (len(read_TW), 1)),
        weights_SKW=np.where(
            (read_TW[:, None, :] + 1 == shifts_K[:, None]) & (workers > 1), weight, 0.0
        ),
        average_S=np.zeros(len(read_TW), bool),
    )
    return replace(cycle(shift_bank(workers), rows, rounds), period=None)


# Static graphs and cycles.


def ring(workers: int, rounds: int) -> Schedule:
    """Everyone averages with both neighbours, weights 1/3 (D-PSGD, Lian et al. 2017).

    Symmetric, doubly stochastic; never exact above 3 workers. Two workers meet with weight 1/2.
    """
    _check_workers("ring", workers)
    return torus(1, workers, rounds)


def torus(rows: int, columns: int, rounds: int) -> Schedule:
    """Everyone averages with four neighbours, weights 1/5. Worker w is at (w // columns, w mod
    columns). Symmetric, doubly stochastic.

    On a side of length 2 both neighbours are one, on a side of length 1 there is none: then all
    weights are 1 / (1 + number of neighbours).
    """
    _check_workers("torus", min(rows, columns))
    place = np.arange(rows * columns).reshape(rows, columns)
    neighbours = {
        tuple(np.roll(place, step, axis).ravel().tolist()) for step in (1, -1) for axis in (0, 1)
    }
    neighbours.discard(tuple(range(place.size)))
    return _static(place.size, sorted(neighbours), rounds)


def static_exponential(workers: int, rounds: int) -> Schedule:
    """Worker w sends to w + 1, w + 2, w + 4, ... mod W in every round, all weights equal.

    Doubly stochastic, not symmetric (Ying et al. 2021, arXiv 2110.13363). ceil(log2 W) slots.
    """
    _check_workers("static_exponential", workers)
    return _static(workers, _powers_of_two_away(workers), rounds)


def one_peer_exponential(workers: int, rounds: int) -> Schedule:
    """Worker w sends to w + 1, then w + 2, w + 4, ... mod W, one a round, and again from the start.

    Doubly stochastic, not symmetric (Assran et al. 2019; Ying et al. 2021, arXiv 2110.13363). Exact
    after log2 W rounds if W is a power of two, never otherwise.
    """
    _check_workers("one_peer_exponential", workers)
    return from_permutations(_powers_of_two_away(workers) or [_shift(workers, 0)], rounds)


def hypercube(workers: int, rounds: int) -> Schedule:
    """Worker w averages with w XOR 1, then w XOR 2, w XOR 4, ..., and again from the start.

    W: a power of two. Symmetric, doubly stochastic. Exact after log2 W rounds.
    """
    _check_power_of_two("hypercube", workers)
    bits = [1 << bit for bit in range(workers.bit_length() - 1)] or [0]
    return from_permutations(np.arange(workers) ^ np.array(bits)[:, None], rounds)


def base_k_plus_1(workers: int, rounds: int, degree: int) -> Schedule:
    """The Base-(k+1) graph, k = `degree` (Takezawa et al. 2023, arXiv 2305.11420): exact after
    `period` <= 2 log_(k+1) W + 2 rounds, for any number of workers.

    Symmetric, doubly stochastic, at most k neighbours a round, so k slots. Weights differ by edge,
    and some workers are idle.
    """
    _check_workers("base_k_plus_1", workers)
    if degree < 1:
        raise ValueError(f"schedule base_k_plus_1: the degree must be at least 1, got {degree}")
    return from_matrices(base_graph(workers, degree) or [np.eye(workers)], rounds)


def d_equi_static(workers: int, rounds: int, draws: int, seed: int) -> Schedule:
    """D-EquiStatic of EquiTopo (Song et al. 2022, arXiv 2210.07881): `draws` cyclic shifts, drawn
    once, make the one matrix of all rounds, 1/W on its diagonal. Doubly stochastic.

    Its consensus rate, the norm of W - 11'/W, does not depend on the number of workers: see
    `equi_static_draws`. Shifts drawn more than once weigh more, and share a slot.
    """
    shifts_M = _drawn_shifts("d_equi_static", workers, draws, seed)
    return _weighted_shifts(workers, shifts_M, rounds)


def u_equi_static(workers: int, rounds: int, draws: int, seed: int) -> Schedule:
    """U-EquiStatic of EquiTopo: `d_equi_static` with every shift taken both ways. Symmetric, doubly
    stochastic, up to twice the slots."""
    shifts_M = _drawn_shifts("u_equi_static", workers, draws, seed)
    return _weighted_shifts(workers, np.concatenate([shifts_M, -shifts_M % workers]), rounds)


def equi_static_draws(workers: int, rate: float, failure_probability: float) -> int:
    """How many shifts `d_equi_static` and `u_equi_static` need so that the norm of W - 11'/W is
    below `rate`, but for a failure of this probability: 8 ln(2 W / failure) / (3 rate^2)."""
    return math.ceil(8 * math.log(2 * workers / failure_probability) / (3 * rate**2))


def complete(workers: int, rounds: int) -> Schedule:
    """The exact mean of all in every round, by an all-reduce. No slot is used."""
    _check_workers("complete", workers)
    rows = _nothing(workers)._replace(average_S=np.ones(1, bool))
    return cycle(_no_bank(workers), rows, rounds)


def complete_by_edges(workers: int, rounds: int) -> Schedule:
    """The exact mean of all in every round, by messages from everyone to everyone, weights 1 / W.

    The matrix of `complete`, in W - 1 slots.
    """
    _check_workers("complete_by_edges", workers)
    return _static(workers, [_shift(workers, shift) for shift in range(1, workers)], rounds)


def star(workers: int, rounds: int) -> Schedule:
    """All exchange with worker 0, and it with all. W - 1 slots, of one pair each.

    Metropolis weights: 1 / W both ways. Symmetric, doubly stochastic.
    """
    _check_workers("star", workers)
    matrix_WW = np.eye(workers) * (1 - 1 / workers)
    matrix_WW[0] = matrix_WW[:, 0] = 1 / workers
    return from_matrices([matrix_WW], rounds)


def silent(workers: int, rounds: int) -> Schedule:
    """Nobody exchanges, ever; `sync` is False in all rounds."""
    _check_workers("silent", workers)
    alone = cycle(_no_bank(workers), _nothing(workers), rounds)
    return replace(alone, sync_T=np.zeros(rounds, bool))


def local_sgd_schedule(workers: int, rounds: int, period: int) -> Schedule:
    """Local SGD: everyone alone, and the exact mean of all after each `period` local steps."""
    return periodic_average(silent(workers, rounds), period)


# What they are made of.


def _bank_of_all_pairs(workers: int) -> Bank:
    """Permutations in which everyone sends to every other exactly once."""
    return xor_bank(workers) if is_power_of_two(workers) else shift_bank(workers)


def _uniform_law(bank: Bank, weight: float, coin: float = 1.0) -> Law:
    """Any branch but the identity, all with the same probability; the identity if it is alone."""
    branches_S = np.arange(min(1, bank.branches - 1), bank.branches, dtype=np.int32)
    moves_SW = bank.receivers_BW[branches_S] != np.arange(bank.workers)
    rows = Rows(
        branches_SK=branches_S[:, None],
        weights_SKW=np.where(moves_SW, weight, 0.0)[:, None, :],
        average_S=np.zeros(len(branches_S), bool),
    )
    return Law(rows, np.full(len(branches_S), 1 / len(branches_S)), coin)


def _static(workers: int, permutations: list, rounds: int) -> Schedule:
    """All permutations in every round, the messages and a worker's own of equal weight."""
    permutations_KW = np.array(permutations or [_shift(workers, 0)])
    return cycle(*permutation_rows(permutations_KW[None], 1 / (1 + len(permutations))), rounds)


def _shift(workers: int, shift: int) -> np.ndarray:
    return (np.arange(workers) + shift) % workers


def _powers_of_two_away(workers: int) -> list[np.ndarray]:
    return [_shift(workers, 1 << bit) for bit in range((workers - 1).bit_length())]


def _drawn_shifts(name: str, workers: int, draws: int, seed: int) -> np.ndarray:
    _check_workers(name, workers)
    if draws < 1:
        raise ValueError(f"schedule {name}: at least 1 shift must be drawn, got {draws}")
    others = max(workers - 1, 1)
    return (1 + numpy_stream(seed, "equi-static shifts").integers(others, size=draws)) % workers


def _weighted_shifts(workers: int, shifts_M: np.ndarray, rounds: int) -> Schedule:
    """(1/M) sum_m A(shift_m) in every round, A(s) = I / W + (1 - 1 / W) (the shift by s)."""
    shifts_K, count_K = np.unique(shifts_M, return_counts=True)
    permutations_KW = np.array([_shift(workers, shift) for shift in shifts_K])
    weight_K = (1 - 1 / workers) * count_K / len(shifts_M)
    return cycle(*permutation_rows(permutations_KW[None], weight_K[:, None]), rounds)


def _round_robin(workers: int) -> np.ndarray:
    """int[R, W]: whom everyone meets in each round of a tournament; oneself if idle."""
    circle = workers - 1 + workers % 2
    meets_RW = (2 * np.arange(circle)[:, None] - np.arange(circle)) % circle
    if workers % 2:
        return meets_RW
    # In round r of an odd circle, r would meet itself: it meets the last worker.
    np.fill_diagonal(meets_RW, circle)
    return np.append(meets_RW, np.arange(circle)[:, None], axis=1)


def _matching_of_shift(workers: int, shift: int, start: int) -> list[int]:
    partner_W = list(range(workers))
    for i in range(start, start + workers):
        one, other = i % workers, (i + shift) % workers
        if partner_W[one] == one and partner_W[other] == other:
            partner_W[one], partner_W[other] = other, one
    return partner_W


def _no_bank(workers: int) -> Bank:
    return Bank(np.arange(workers, dtype=np.int32)[None])


def _nothing(workers: int) -> Rows:
    """One row without messages."""
    return Rows(np.zeros((1, 1), np.int32), np.zeros((1, 1, workers)), np.zeros(1, bool))


def _check_workers(name: str, workers: int) -> None:
    if workers < 1:
        raise ValueError(
            f"schedule {name}: the number of workers must be at least 1, got {workers}"
        )


def _check_power_of_two(name: str, workers: int) -> None:
    if not is_power_of_two(workers):
        raise ValueError(
            f"schedule {name}: the number of workers must be a power of two, got {workers}"
        )


def _check_fraction(name: str, what: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"schedule {name}: the {what} must lie in [0, 1], got {value}")
