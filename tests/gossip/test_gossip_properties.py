"""What no rule may do, whatever its equation."""

from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
from gossip_cases import CASES, ROUNDS, random_schedule
from gossip_layouts import QUICK, on_one_device, over_rounds
from gossip_runs import at_round, program, results, run, run_with, start, table

from persyn_jax import gossip
from persyn_jax.gossip import Dense, Exchange, shift_bank
from persyn_jax.gossip.contrib import d2
from persyn_jax.mesh import WORKER

each_case = pytest.mark.parametrize("name", CASES)
BAD = 2
"""The worker with the bad updates."""


def spoilt(updates_WT, is_bad_T, poison=np.nan):
    """The same updates, with one number in each array of the bad worker replaced."""
    spoilt_WT = jax.tree.map(np.copy, updates_WT)
    for leaf_WT in jax.tree.leaves(spoilt_WT):
        leaf_WT[BAD, is_bad_T, 0, 3] = poison
    return spoilt_WT


def zeroed(updates_WT, is_bad_T):
    zeroed_WT = jax.tree.map(np.copy, updates_WT)
    for leaf_WT in jax.tree.leaves(zeroed_WT):
        leaf_WT[BAD, is_bad_T] = 0
    return zeroed_WT


def without_messages(schedule, is_bad_T):
    """The same schedule, in which the bad worker sends nothing in those rounds."""
    senders_TKW = schedule.bank.senders_BW[schedule.branches_TK]
    lost_TKW = is_bad_T[:, None, None] & (senders_TKW == BAD)
    return replace(schedule, weights_TKW=np.where(lost_TKW, 0, schedule.weights_TKW))


def without_worker(schedule, is_bad_T):
    present_TW = schedule.present_TW.copy()
    present_TW[is_bad_T, BAD] = False
    return replace(schedule, present_TW=present_TW)


def without_step(schedule, is_bad_T):
    steps_TW = schedule.steps_TW.copy()
    steps_TW[is_bad_T, BAD] = False
    return replace(schedule, steps_TW=steps_TW)


UNSCHEDULED = {
    "all_reduce": without_step,  # it gets the mean, and does not count in it
    "easgd": without_worker,
    "downpour": without_worker,
    "delayed by 0": lambda schedule, is_bad_T: schedule,  # the message had left before
    "delayed by 2": lambda schedule, is_bad_T: schedule,
}
"""What it means not to be scheduled, for rules that send no messages, or other ones."""


@each_case
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_bad_update_is_none_and_its_messages_are_not_sent(name, poison):
    """To the bit, for the worker itself and for all others."""
    schedules, (params_W, updates_WT) = CASES[name].schedule, start()
    is_bad_T = np.random.default_rng(0).random(ROUNDS) < 0.3
    unscheduled = UNSCHEDULED.get(name, without_messages)
    clean = jax.tree.map(lambda schedule: unscheduled(schedule, is_bad_T), schedules)
    expected = run_with(name, "take", clean, params_W, zeroed(updates_WT, is_bad_T))
    actual = run_with(name, "take", schedules, params_W, spoilt(updates_WT, is_bad_T, poison))
    chex.assert_trees_all_equal(actual, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(actual))


@each_case
@pytest.mark.parametrize("way", ["take", "dense"])
def test_a_worker_lost_to_nan_does_not_spread(name, way):
    params_W, updates_WT = start()
    for leaf_W in jax.tree.leaves(params_W):
        leaf_W[BAD] = np.nan
    updates_WT = spoilt(updates_WT, np.ones(ROUNDS, bool))
    params_WT, _ = run_with(name, way, CASES[name].schedule, params_W, updates_WT)
    for leaf_WT in jax.tree.leaves(params_WT):
        assert np.isfinite(np.delete(leaf_WT, BAD, axis=0)).all()


def silenced(schedule):
    """The same schedule, in which nobody exchanges."""
    return replace(
        schedule,
        branches_TK=0 * schedule.branches_TK,
        weights_TKW=0 * schedule.weights_TKW,
        sync_T=np.zeros(ROUNDS, bool),
    )


@each_case
def test_rounds_without_exchange_and_update_change_nothing(name):
    """Not after a disturbed start either. (D2 goes on in the same direction, as its equation has
    it, but from rest.)"""
    rule, over_table = program(name, "take")
    params_W, updates_WT = start()
    carry = params_W, jax.vmap(rule.init)(params_W)
    if name != "d2":
        carry = at_round(run(name, "take"), ROUNDS // 2)
    nothing_WT = jax.tree.map(np.zeros_like, updates_WT)
    silent = table(jax.tree.map(silenced, CASES[name].schedule))
    params_WT, _ = jax.device_get(over_table(*carry, nothing_WT, silent))
    chex.assert_trees_all_equal(at_round(params_WT, -1), carry[0])


@each_case
def test_workers_that_agree_stay_as_they_are(name):
    """Consensus is a fixed point of every exchange, of what the workers would hand out."""
    rule, _ = program(name, "take")
    params_W, updates_WT = jax.tree.map(np.zeros_like, start())
    for leaf_W in jax.tree.leaves(params_W):
        leaf_W[:] = np.random.default_rng(1).normal(size=leaf_W.shape[1:])
    after_WT = run_with(name, "take", CASES[name].schedule, params_W, updates_WT)
    at_WT = jax.vmap(jax.vmap(rule.evaluate_at))(*after_WT)
    for t in range(ROUNDS):
        chex.assert_trees_all_close(at_round(at_WT, t), params_W, rtol=1e-6, atol=1e-6)


@each_case
def test_absent_workers_keep_everything(name):
    """As if frozen: parameters, and whatever the rule has in store for them."""
    schedules = jax.tree.map(
        lambda schedule: replace(
            random_schedule(schedule.bank, ROUNDS, schedule.slots, seed=9, absent=0.4, average=0.2),
            sync_T=schedule.sync_T,
        ),
        CASES[name].schedule,
    )
    present_TW = jax.tree.leaves(schedules)[0].present_TW
    schedules = jax.tree.map(lambda s: replace(s, present_TW=present_TW), schedules)
    params_WT, _ = run_with(name, "take", schedules, *start())
    for leaf_WT in jax.tree.leaves(params_WT):
        before_WT, after_WT = leaf_WT[:, :-1], leaf_WT[:, 1:]
        absent_WT = ~present_TW[1:].T
        np.testing.assert_array_equal(after_WT[absent_WT], before_WT[absent_WT])


@pytest.mark.parametrize("rule", [gossip.gosgd, gossip.push_sum, gossip.d_psgd, d2])
@pytest.mark.parametrize("bank", [shift_bank(1), Dense(1)], ids=["bank", "matrix"])
def test_one_worker_alone_takes_its_steps(rule, bank):
    mixing = rule(Exchange(bank, WORKER))
    params_W, updates_WT = (jax.tree.map(lambda leaf_W: leaf_W[:1], tree) for tree in start())
    alone = gossip.gosgd_schedule(1, ROUNDS, 1.0, seed=0)
    alone = alone.dense() if isinstance(bank, Dense) else alone
    compiled = on_one_device(over_rounds(mixing.update), compiler_options=QUICK)
    params_WT, _ = results(mixing, compiled, alone, params_W, updates_WT)
    for t in range(ROUNDS):
        params_W = jax.tree.map(np.add, params_W, at_round(updates_WT, t))
        chex.assert_trees_all_close(at_round(params_WT, t), params_W, rtol=1e-5, atol=1e-6)
