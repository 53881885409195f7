"""Where rules and combinators collapse into one another, or into a textbook algorithm."""

from dataclasses import replace

import chex
import jax
import numpy as np
import optax
import pytest
from gossip_cases import DIRECTED, DOUBLY, ROUNDS, SHIFTS, SYMMETRIC, WORKERS, XORS
from gossip_layouts import QUICK, on_one_device, over_rounds
from gossip_runs import at_round, program, results, run, run_with, start

from persyn_jax import gossip
from persyn_jax.gossip import Exchange, compose, topologies
from persyn_jax.mesh import WORKER

PERIOD = 5
IS_MEAN_T = np.arange(1, ROUNDS + 1) % PERIOD == 0
EXCHANGE = Exchange(SHIFTS, WORKER)


def in_the_program_of(schedule, bank, slots):
    """A schedule that sends no message fits every bank."""
    return replace(compose.padded(schedule, slots), bank=bank)


ALWAYS = in_the_program_of(topologies.complete(WORKERS, ROUNDS), SHIFTS, 2)
BY_EDGES = topologies.complete_by_edges(WORKERS, ROUNDS).dense()
LOCAL_SGD = topologies.local_sgd_schedule(WORKERS, ROUNDS, PERIOD)


def same_start():
    """All workers at the parameters of the first; updates as in `start`."""
    params_W, updates_WT = start()
    return jax.tree.map(lambda x_W: np.stack([x_W[0]] * WORKERS), params_W), updates_WT


def fresh_run(rule, schedules, params_W, updates_WT):
    """`results` of a rule that is not in the table: the parameters."""
    compiled = on_one_device(over_rounds(rule.update), compiler_options=QUICK)
    return results(rule, compiled, schedules, params_W, updates_WT)[0]


def assert_close(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def worker_mean(tree_WT):
    return jax.tree.map(lambda x_WT: x_WT.mean(axis=0), tree_WT)


@pytest.mark.parametrize("rule", ["gosgd", "push_sum", "d_psgd", "peer_average", "all_reduce"])
@pytest.mark.parametrize("way", ["average", "by edges"])
def test_with_everyone_in_every_round_it_is_synchronous_sgd(rule, way):
    params_W, updates_WT = same_start()
    if way == "average":
        params_WT, _ = run_with(rule, "take", ALWAYS, params_W, updates_WT)
    elif rule == "peer_average":  # it has its rate, not the schedule's weights
        mixing = gossip.peer_average(Exchange(BY_EDGES.bank, WORKER), rate=(WORKERS - 1) / WORKERS)
        params_WT = fresh_run(mixing, BY_EDGES, params_W, updates_WT)
    else:
        params_WT, _ = run_with(rule, "dense", BY_EDGES, params_W, updates_WT)
    mean_T = jax.tree.map(lambda u_WT: u_WT.mean(axis=0).cumsum(axis=0), updates_WT)
    assert_close(params_WT, jax.tree.map(lambda x_W, u_T: x_W[:, None] + u_T, params_W, mean_T))


def test_averaging_now_and_then_is_local_sgd():
    params_W, updates_WT = start()
    schedule = in_the_program_of(LOCAL_SGD, SHIFTS, 2)
    params_WT, _ = run_with("d_psgd", "take", schedule, params_W, updates_WT)
    for t in range(ROUNDS):
        params_W = jax.tree.map(np.add, params_W, at_round(updates_WT, t))
        if IS_MEAN_T[t]:
            params_W = jax.tree.map(lambda x_W: 0 * x_W + x_W.mean(axis=0), params_W)
        assert_close(at_round(params_WT, t), params_W)


def diloco_by_the_book(params_W, updates_WT, rate, momentum, nesterov=True):
    """One theta for all, as in the paper: [T, ...] of each round, and `theta` after each."""
    theta = jax.tree.map(lambda x_W: x_W[0].astype(np.float64), params_W)
    velocity = jax.tree.map(np.zeros_like, theta)
    local_W, after_T = params_W, []
    for t in range(ROUNDS):
        local_W = jax.tree.map(np.add, local_W, at_round(updates_WT, t))
        if IS_MEAN_T[t]:
            delta = jax.tree.map(lambda th, x_W: th - x_W.mean(axis=0), theta, local_W)
            velocity = jax.tree.map(lambda v, d: momentum * v + d, velocity, delta)
            step = jax.tree.map(lambda v, d: d + momentum * v if nesterov else v, velocity, delta)
            theta = jax.tree.map(lambda th, s: th - rate * s, theta, step)
            local_W = jax.tree.map(lambda th: np.stack([th] * WORKERS), theta)
        after_T.append(local_W)
    return jax.tree.map(lambda *x_W: np.stack(x_W, axis=1), *after_T)


def test_diloco_over_a_group_of_all_is_diloco():
    """For each worker, in every round."""
    schedule = in_the_program_of(LOCAL_SGD, XORS, 1)
    params_WT, _ = run_with("diloco", "take", schedule, *same_start())
    assert_close(params_WT, diloco_by_the_book(*same_start(), rate=0.7, momentum=0.9))


@pytest.mark.parametrize("rule", ["slowmo", "noloco"])
def test_slowmo_and_noloco_over_a_group_of_all_are_diloco_with_heavy_ball(rule):
    """The table has both with momentum 0.5 and rate 0.7."""
    schedule = in_the_program_of(LOCAL_SGD, XORS, 1)
    params_WT, _ = run_with(rule, "take", schedule, *same_start())
    expected = diloco_by_the_book(*same_start(), rate=0.7, momentum=0.5, nesterov=False)
    assert_close(params_WT, expected)


def test_the_mean_of_gasloc_over_a_group_of_all_follows_diloco():
    """With rate 1 and its momentum; the workers stay unequal."""
    schedule = in_the_program_of(LOCAL_SGD, XORS, 1)
    params_WT, _ = run_with("gasloc", "take", schedule, *same_start())
    expected = diloco_by_the_book(*same_start(), rate=1.0, momentum=0.4)
    assert_close(worker_mean(params_WT), worker_mean(expected))
    assert np.ptp(params_WT["kernel"][:, IS_MEAN_T], axis=0).max() > 0.01


def test_gasloc_without_momentum_over_a_group_of_all_is_diloco_for_each_worker():
    mixing = gossip.gasloc(Exchange(XORS, WORKER), momentum=0.0)
    schedule = in_the_program_of(LOCAL_SGD, XORS, 1)
    params_WT = fresh_run(mixing, schedule, *same_start())
    assert_close(params_WT, diloco_by_the_book(*same_start(), rate=1.0, momentum=0.0))


def test_diloco_with_plain_sgd_averages_in_sync_rounds():
    """theta <- W y, for an optax optimiser with rate 1 and no momentum."""
    mixing = gossip.diloco(Exchange(XORS, WORKER), optax.sgd(1.0))
    params_W, updates_WT = start()
    params_WT = fresh_run(mixing, SYMMETRIC, params_W, updates_WT)
    for t in range(ROUNDS):
        W_WW = SYMMETRIC.pull_matrix(t) if SYMMETRIC.sync_T[t] else np.eye(WORKERS)
        params_W = jax.tree.map(
            lambda x_W, u_W, W_WW=W_WW: np.tensordot(W_WW, x_W + u_W, 1),
            params_W,
            at_round(updates_WT, t),
        )
        assert_close(at_round(params_WT, t), params_W)


def test_delayed_averaging_is_d_psgd_as_printed():
    """x <- W x + u."""
    params_W, updates_WT = start()
    params_WT, _ = run("delayed by 0", "take")
    for t in range(ROUNDS):
        W_WW = DOUBLY.pull_matrix(t)
        params_W = jax.tree.map(
            lambda x_W, u_W, W_WW=W_WW: np.tensordot(W_WW, x_W, 1) + u_W,
            params_W,
            at_round(updates_WT, t),
        )
        assert_close(at_round(params_WT, t), params_W)


@pytest.mark.parametrize("rule", ["push_sum", "gosgd"])
def test_sum_weights_that_stay_equal_make_no_difference(rule):
    mixing, _ = program(rule, "take")
    after_WT = run_with(rule, "take", DOUBLY, *start())
    at_WT = jax.vmap(jax.vmap(mixing.evaluate_at))(*after_WT)
    assert_close(at_WT, run("d_psgd", "take")[0])


def test_gossip_in_each_round_and_an_exact_mean_now_and_then():
    mixing = gossip.chain(gossip.gosgd(EXCHANGE), gossip.every(PERIOD, gossip.d_psgd(EXCHANGE)))
    params_W, updates_WT = start()
    params_WT = fresh_run(mixing, (DIRECTED, ALWAYS), params_W, updates_WT)
    sum_weights_TW = DIRECTED.sum_weights()
    for t in range(ROUNDS):
        matrix_WW = DIRECTED.sum_weight_matrix(t, sum_weights_TW[t])
        if IS_MEAN_T[t]:
            matrix_WW = np.full((WORKERS, WORKERS), 1 / WORKERS) @ matrix_WW
        params_W = jax.tree.map(
            lambda x_W, u_W, m_WW=matrix_WW: np.tensordot(m_WW, x_W + u_W, 1),
            params_W,
            at_round(updates_WT, t),
        )
        assert_close(at_round(params_WT, t), params_W)


def everywhere(params):
    return jax.tree.map(lambda leaf: True, params)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda rule: gossip.every(1, rule),
        lambda rule: gossip.chain(rule),
        lambda rule: gossip.masked(rule, everywhere, EXCHANGE),
        lambda rule: gossip.partition(
            {"a": rule, "b": rule}, lambda params: {"unit": "a", "kernel": "b"}
        ),
        lambda rule: gossip.fragments((rule, rule)),
    ],
    ids=["every round", "chain of one", "masked nowhere", "partition", "fragments"],
)
def test_a_rule_that_is_wrapped_for_nothing_gives_the_same_bits(wrapped):
    mixing = wrapped(gossip.gosgd(EXCHANGE))
    params_WT = fresh_run(mixing, DIRECTED, *start())
    chex.assert_trees_all_equal(params_WT, run("gosgd", "take")[0])
