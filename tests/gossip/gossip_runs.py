"""Runs of the rules of `gossip_cases` by every way of exchanging, each program compiled once."""

import functools
from dataclasses import replace

import jax
import numpy as np
from gossip_cases import CASES, ROUNDS, SHIFTS, WORKERS, XORS
from gossip_layouts import QUICK, on_a_device_each, on_one_device, over_rounds

from persyn_jax.gossip import Bank, Exchange
from persyn_jax.mesh import WORKER

on_eight_devices = functools.partial(on_a_device_each, workers=WORKERS)


def with_digits(bank: Bank, base: int) -> Bank:
    high, low = Bank(bank.receivers_BW[::base]), Bank(bank.receivers_BW[:base])
    return Bank(bank.receivers_BW, digits=(high, low))


DIGITS = {id(SHIFTS): with_digits(SHIFTS, 2), id(XORS): with_digits(XORS, 4)}

WAYS = {
    "take": (on_one_device, lambda schedule: schedule),
    "one device": (on_one_device, lambda schedule: schedule),
    "digits": (on_eight_devices, lambda s: replace(s, bank=DIGITS[id(s.bank)])),
    "dense": (on_one_device, lambda schedule: schedule.dense()),
    "gather": (on_eight_devices, lambda schedule: schedule.dense()),
}


def start():
    """Parameters [W, ...] with the unit vectors among them, and updates [W, T, ...], zero for the
    unit vectors, which so show the matrix of each round."""
    rng = np.random.default_rng(0)
    unit_W, kernel_W = np.eye(WORKERS)[:, None], rng.normal(size=(WORKERS, 3, WORKERS))
    updates_WT = {
        "unit": np.zeros((WORKERS, ROUNDS, 1, WORKERS)),
        "kernel": 0.1 * rng.normal(size=(WORKERS, ROUNDS, 3, WORKERS)),
    }
    return jax.tree.map(np.float32, ({"unit": unit_W, "kernel": kernel_W}, updates_WT))


def rows(schedules, t):
    return jax.tree.map(lambda schedule: schedule.round(t), schedules)


def table(schedules):
    return jax.tree.map(lambda schedule: schedule.table(), schedules)


def at_round(tree_WT, t):
    return jax.tree.map(lambda leaf_WT: leaf_WT[:, t], tree_WT)


def rule_of(name, schedules, one_device=False):
    bank = jax.tree.leaves(schedules)[0].bank
    return CASES[name].rule(Exchange(bank, WORKER, one_device=one_device))


@functools.cache
def program(name, way):
    """The rule, and its program over a table of rounds."""
    layout, adapted = WAYS[way]
    schedules = jax.tree.map(adapted, CASES[name].schedule)
    rule = rule_of(name, schedules, one_device=way == "one device")
    return rule, layout(over_rounds(rule.update), compiler_options=QUICK)


def results(rule, run, schedules, params_W, updates_WT):
    """(parameters, state) [W, T, ...] after each round."""
    state_W = jax.vmap(rule.init)(params_W)
    return jax.device_get(run(params_W, state_W, updates_WT, table(schedules)))


def run_with(name, way, schedules, params_W, updates_WT):
    """`results` of any schedules over the bank of the case, with as many slots."""
    adapted = jax.tree.map(WAYS[way][1], schedules)
    return results(*program(name, way), adapted, params_W, updates_WT)


@functools.cache
def run(name, way):
    """`results` of the case's own schedules, from `start`."""
    return run_with(name, way, CASES[name].schedule, *start())
