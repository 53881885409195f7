"""Schedules made of schedules. Faults are laid over the result, not over the parts."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from persyn_jax.gossip.banks import Bank, bank_of
from persyn_jax.gossip.schedules import Schedule


def stretch(schedule: Schedule, period: int, offset: int = 0) -> Schedule:
    """Exchanges in each `period`-th round only, the first time in round `offset`.

    Each exchange is the next row of the schedule: it takes `period` times as long, and contracts as
    much an exchange. In the other rounds everyone takes a local step and nothing is exchanged.
    Raises ValueError: a period below 1, an offset outside [0, period).
    """
    _check_period("stretch", period)
    if not 0 <= offset < period:
        raise ValueError(f"schedule stretch: the offset must lie in [0, {period}), got {offset}")
    exchanges_T = np.arange(schedule.rounds * period) % period == offset

    def spread(column: np.ndarray, otherwise: int) -> np.ndarray:
        table = np.full((len(exchanges_T), *column.shape[1:]), otherwise, column.dtype)
        table[exchanges_T] = column
        return table

    return replace(
        schedule,
        branches_TK=spread(schedule.branches_TK, 0),
        weights_TKW=spread(schedule.weights_TKW, 0),
        average_T=spread(schedule.average_T, False),
        sync_T=spread(schedule.sync_T, False),
        steps_TW=spread(schedule.steps_TW, True),
        present_TW=spread(schedule.present_TW, True),
        period=schedule.period and schedule.period * period,
        law=None,
    )


def periodic_average(schedule: Schedule, period: int) -> Schedule:
    """The schedule, but in each `period`-th round the exact mean in its place: rounds period - 1,
    2 period - 1, ... Gossip-PGA (Chen et al. 2021, arXiv 2105.09080); exact after `period` rounds.

    Raises ValueError: a period below 1, a schedule in the matrix mode (`dense` comes last).
    """
    _check_period("periodic_average", period)
    _bank("periodic_average", schedule)
    is_mean_T = np.arange(1, schedule.rounds + 1) % period == 0
    return replace(
        schedule,
        branches_TK=schedule.branches_TK * ~is_mean_T[:, None],
        weights_TKW=schedule.weights_TKW * ~is_mean_T[:, None, None],
        average_T=schedule.average_T | is_mean_T,
        sync_T=schedule.sync_T | is_mean_T,
        period=schedule.period and math.lcm(schedule.period, period),
        law=None,
    )


def hierarchical(between: Schedule, slice_size: int, inside_rounds: int = 1) -> Schedule:
    """Exact inside a slice, gossip between slices.

    `inside_rounds` rounds in which each slice takes its exact mean, by slice_size - 1 slots, then
    the next round of `between`, a schedule whose workers are the slices: worker w exchanges with
    the one at its position in the other slice. So on, by turns. Worker w is in slice
    w // slice_size. Doubly stochastic, or symmetric, where `between` is; if `between` is exact
    after n rounds, this is after n (inside_rounds + 1).

    Where a slice has fast links of its own, better make it one worker, sharded or all-reduced over
    its devices: this schedule is for workers that must stay apart.
    Raises ValueError: a slice size or a number of rounds below 1, `between` in the matrix mode.
    """
    if slice_size < 1 or inside_rounds < 1:
        raise ValueError(
            "schedule hierarchical: the slice size and the rounds inside must be at least 1,"
            f" got {slice_size} and {inside_rounds}"
        )
    between_bank = _bank("hierarchical", between)
    place_SL = np.arange(between.workers * slice_size).reshape(between.workers, slice_size)
    lifted_BW = [place_SL[receivers_S].ravel() for receivers_S in between_bank.receivers_BW]
    inside_KW = [np.roll(place_SL, -shift, axis=1).ravel() for shift in range(1, slice_size)]
    bank, branches = bank_of(np.array(lifted_BW + inside_KW))
    lifted = replace(
        between,
        bank=bank,
        branches_TK=branches[between.branches_TK],
        weights_TKW=np.repeat(between.weights_TKW, slice_size, axis=2),
        steps_TW=np.repeat(between.steps_TW, slice_size, axis=1),
        present_TW=np.repeat(between.present_TW, slice_size, axis=1),
        law=None,
    )
    slots = max(between.slots, slice_size - 1)
    schedule = stretch(padded(lifted, slots), inside_rounds + 1, offset=inside_rounds)

    is_inside_T = np.arange(schedule.rounds) % (inside_rounds + 1) != inside_rounds
    inside_K = np.pad(branches[between_bank.branches :], (0, slots - slice_size + 1))
    weight_K = np.where(inside_K > 0, 1 / slice_size, 0.0)
    return replace(
        schedule,
        branches_TK=np.where(is_inside_T[:, None], inside_K, schedule.branches_TK),
        weights_TKW=np.where(is_inside_T[:, None, None], weight_K[:, None], schedule.weights_TKW),
        sync_T=schedule.sync_T | is_inside_T,
    )


def padded(schedule: Schedule, slots: int) -> Schedule:
    """The same schedule with `slots` slots, the added ones unused.

    Schedules over one bank that have the same number of slots share one compiled program.
    Raises ValueError: fewer slots than there are, a schedule in the matrix mode.
    """
    _bank("padded", schedule)
    more = slots - schedule.slots
    if more < 0:
        raise ValueError(f"schedule padded: it has {schedule.slots} slots already, got {slots}")
    law = schedule.law
    if law:
        rows = law.rows._replace(
            branches_SK=np.pad(law.rows.branches_SK, ((0, 0), (0, more))),
            weights_SKW=np.pad(law.rows.weights_SKW, ((0, 0), (0, more), (0, 0))),
        )
        law = law._replace(rows=rows)
    return replace(
        schedule,
        branches_TK=np.pad(schedule.branches_TK, ((0, 0), (0, more))),
        weights_TKW=np.pad(schedule.weights_TKW, ((0, 0), (0, more), (0, 0))),
        law=law,
    )


def share_bank(schedules: Sequence[Schedule]) -> list[Schedule]:
    """The same schedules over one bank, which holds the permutations of all, and with equally many
    slots: one compiled program serves them all. The bank has no digits.

    Raises ValueError: schedules of unlike numbers of workers, one in the matrix mode.
    """
    banks = [_bank("share_bank", schedule) for schedule in schedules]
    if len({bank.workers for bank in banks}) != 1:
        given = [bank.workers for bank in banks]
        raise ValueError(f"schedule share_bank: all must have the same workers, got {given}")
    shared, branches = bank_of(np.concatenate([bank.receivers_BW for bank in banks]))
    parts = np.split(branches, np.cumsum([bank.branches for bank in banks])[:-1])
    slots = max(schedule.slots for schedule in schedules)
    return [
        padded(_renumbered(schedule, shared, part), slots)
        for schedule, part in zip(schedules, parts, strict=True)
    ]


def _renumbered(schedule: Schedule, bank: Bank, branches_B: np.ndarray) -> Schedule:
    """The same schedule over a bank that has its branch b at `branches_B[b]`."""
    law = schedule.law
    if law:
        rows = law.rows._replace(branches_SK=branches_B[law.rows.branches_SK])
        law = law._replace(rows=rows)
    branches_TK = branches_B[schedule.branches_TK]
    return replace(schedule, bank=bank, branches_TK=branches_TK, law=law)


def _bank(name: str, schedule: Schedule) -> Bank:
    if not isinstance(schedule.bank, Bank):
        raise ValueError(f"schedule {name}: needs a schedule over a bank, got the matrix mode")
    return schedule.bank


def _check_period(name: str, period: int) -> None:
    if period < 1:
        raise ValueError(f"schedule {name}: the period must be at least 1, got {period}")
