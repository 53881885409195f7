"""The asynchronous run against Algorithms 1 and 2 written out with their queues."""

import dataclasses
import doctest
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persyn_jax import gossip
from persyn_jax.gossip import simulate
from persyn_jax.gossip.simulate import constant, exponential, lognormal
from persyn_jax.mesh import WORKER

CLOCKS = {
    "round": constant(1.0),
    "tick": exponential(1.0),
    "stragglers": lambda rng, worker: rng.lognormal(0.0, 0.5) * (5 if worker == 0 else 1),
}
DELAYS = {
    "none": constant(0.0),
    "short": constant(0.5),
    "long": exponential(3.0),
    "some are lost": lambda rng, sender, receiver: rng.choice([0.1, 4.0, np.inf]),
}

runs = given(
    workers=st.integers(2, 6),
    probability=st.floats(0, 1),
    clock=st.sampled_from(sorted(CLOCKS)),
    delay=st.sampled_from(sorted(DELAYS)),
    seed=st.integers(0, 2**31),
)
few = settings(max_examples=15)


def make_run(workers, probability, clock, delay, seed, duration=12):
    return simulate.asynchronous_run(
        workers, probability, duration, seed, CLOCKS[clock], DELAYS[delay]
    )


def step_size(event):
    return 0.1 + 0.01 * (event % 7)


def local_step(x, momentum, worker, event):
    """Not linear, different for each worker and each awakening, with a state of the worker's."""
    momentum = 0.5 * momentum + jnp.sin(x + worker)
    return x - step_size(event) * momentum, momentum


def starts(workers, dimension=3):
    return np.random.default_rng(0).normal(size=(workers, dimension))


def algorithm(events, x, step, shuffle):
    """GoSGD's Algorithms 1 and 2. Returns x, alpha, the queues, and what each step started from."""
    x, alpha = x.copy(), np.full(events.workers, 1 / events.workers)
    momentum = np.zeros_like(x)
    queues: list[list[tuple]] = [[] for _ in x]
    seen = []
    for event, (now, i) in enumerate(zip(events.time_E, events.worker_E, strict=True)):
        arrived = [message for message in queues[i] if message[0] <= now]
        queues[i] = [message for message in queues[i] if message[0] > now]
        shuffle(arrived)
        for _, x_j, alpha_j in arrived:
            x[i] = alpha_j / (alpha[i] + alpha_j) * x_j + alpha[i] / (alpha[i] + alpha_j) * x[i]
            alpha[i] = alpha_j + alpha[i]
        seen.append(x[i].copy())
        x[i], momentum[i] = step(x[i], momentum[i], i, event)
        if events.receiver_E[event] != i:
            alpha[i] = alpha[i] / 2
            queues[events.receiver_E[event]].append(
                (events.arrival_E[event], x[i].copy(), alpha[i])
            )
    return x, alpha, [message for queue in queues for message in queue], np.array(seen)


def numpy_step(x, momentum, worker, event):
    momentum = 0.5 * momentum + np.sin(x + worker)
    return x - step_size(event) * momentum, momentum


@few
@runs
@pytest.mark.parametrize("shuffle", [lambda queue: None, np.random.default_rng(1).shuffle])
def test_a_run_is_algorithms_1_and_2_in_whatever_order_a_queue_is_emptied(shuffle, **choices):
    events = make_run(**choices)
    start_WN = starts(events.workers)
    x_WN, alpha_W, queued, _ = algorithm(events, start_WN, numpy_step, shuffle)
    plan = simulate.make_plan(events)
    with jax.enable_x64(True):
        momentum_W = jnp.zeros(start_WN.shape)
        x_PN, _ = simulate.run_plan(plan, jnp.asarray(start_WN), momentum_W, local_step)
    workers, x_PN = events.workers, np.asarray(x_PN)
    np.testing.assert_allclose(x_PN[:workers], x_WN, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(plan.sum_weight_P[:workers], alpha_W, rtol=1e-12)
    queued_weight = sum(alpha for _, _, alpha in queued)
    np.testing.assert_allclose(plan.sum_weight_P[workers:].sum(), queued_weight, atol=1e-15)
    queued_mass = sum((alpha * x for _, x, alpha in queued), np.zeros(start_WN.shape[1]))
    np.testing.assert_allclose(
        plan.sum_weight_P[workers:] @ x_PN[workers:], queued_mass, rtol=1e-12, atol=1e-12
    )


@few
@runs
def test_sum_weights_total_1_and_mass_is_conserved_after_every_awakening(**choices):
    events = make_run(**choices)
    start_WN = starts(events.workers)
    for rows in range(len(events.time_E) + 1):
        columns = ("time_E", "worker_E", "receiver_E", "arrival_E")
        first = {name: getattr(events, name)[:rows] for name in columns}
        plan = simulate.make_plan(dataclasses.replace(events, **first))
        assert math.fsum(plan.sum_weight_P) == pytest.approx(1, abs=1e-15)
        assert (plan.sum_weight_P[: events.workers] > 0).all()
        x_PN = np.concatenate([start_WN, np.zeros((len(plan.sum_weight_P), 3))])
        for worker, source, gain, target, share in zip(*plan.moves[1:], strict=True):
            x_PN[worker] += gain * (x_PN[source] - x_PN[worker])
            x_PN[target] += share * (x_PN[worker] - x_PN[target])
        mass_N = plan.sum_weight_P @ x_PN[: len(plan.sum_weight_P)]
        np.testing.assert_allclose(mass_N, start_WN.mean(axis=0), atol=1e-14)


def test_sum_weights_total_exactly_1_where_floats_can_hold_them():
    events = make_run(4, 1.0, "tick", "long", seed=0, duration=9)
    plan = simulate.make_plan(events)
    assert sum(map(Fraction, plan.sum_weight_P)) == 1
    assert len(set(plan.sum_weight_P[:4])) > 1


@few
@runs
def test_the_schedule_starts_every_local_step_from_the_same_parameters(**choices):
    """Replayed in NumPy from the schedule's own push matrices."""
    events = make_run(**choices)
    start_WN = starts(events.workers)
    *_, seen_EN = algorithm(events, start_WN, numpy_step, lambda queue: None)
    schedule, alpha_P = simulate.as_schedule(events)
    assert schedule.rounds == len(events.time_E)
    x_PN = np.concatenate([start_WN, np.zeros((schedule.workers - events.workers, 3))])
    momentum_PN = np.zeros_like(x_PN)
    for t in range(schedule.rounds):
        (worker,) = np.flatnonzero(schedule.steps_TW[t])
        np.testing.assert_allclose(x_PN[worker], seen_EN[t], rtol=1e-12, atol=1e-12)
        x_PN[worker], momentum_PN[worker] = numpy_step(x_PN[worker], momentum_PN[worker], worker, t)
        mass_PN = schedule.push_matrix(t) @ (alpha_P[:, None] * x_PN)
        alpha_P = schedule.push_matrix(t) @ alpha_P
        x_PN = mass_PN / np.where(alpha_P > 0, alpha_P, 1)[:, None]
        assert alpha_P.sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("delay", ["none", "long"])
def test_the_schedule_replays_by_the_ordinary_gosgd_rule(delay):
    events = make_run(4, 0.6, "tick", delay, seed=5, duration=40)
    start_WN = starts(4)
    noise_EN = np.random.default_rng(1).normal(size=(len(events.time_E), 3))
    *_, seen_EN = algorithm(
        events, start_WN, lambda x, m, worker, event: (x + noise_EN[event], m), lambda queue: None
    )
    schedule, alpha_P = simulate.as_schedule(events)
    with jax.enable_x64(True):
        rule = gossip.gosgd(gossip.Exchange(schedule.bank, WORKER))
        update = jax.vmap(rule.update, in_axes=(0, 0, 0, None), axis_name=WORKER)
        mailboxes_PN = np.zeros((schedule.workers - 4, 3))
        x_PN = jnp.concatenate([start_WN, mailboxes_PN])
        state_P = jax.vmap(rule.init)(x_PN)._replace(sum_weight=jnp.asarray(alpha_P))

        def step(carry, row_and_noise):
            row, noise_N = row_and_noise
            x_PN, state_P = carry
            seen_N = row.steps_W @ x_PN
            updates_PN = jnp.broadcast_to(noise_N, x_PN.shape)
            return update(updates_PN, state_P, x_PN, row), seen_N

        _, replayed_EN = jax.lax.scan(step, (x_PN, state_P), (schedule.table(), noise_EN))
    np.testing.assert_allclose(replayed_EN, seen_EN, rtol=1e-11, atol=1e-11)


def test_without_delay_the_schedule_has_one_half_edge_a_push_and_no_mailboxes():
    events = make_run(5, 0.5, "tick", "none", seed=0, duration=50)
    schedule, alpha_W = simulate.as_schedule(events)
    np.testing.assert_array_equal(alpha_W, np.full(5, 1 / 5))
    np.testing.assert_array_equal(schedule.messages(), events.pushes)
    for t in np.flatnonzero(events.pushes):
        assert schedule.edges(t) == [(events.receiver_E[t], events.worker_E[t], 0.5)]


def lock_step_events(receivers_TW, delay):
    """Every worker acts once a round; a message needs `delay` rounds."""
    rounds, workers = receivers_TW.shape
    time_E = np.repeat(np.arange(1.0, rounds + 1), workers)
    worker_E = np.tile(np.arange(workers, dtype=np.int32), rounds)
    return simulate.Events(workers, time_E, worker_E, receivers_TW.ravel(), time_E + delay)


@pytest.mark.parametrize("delay", [0.01, 1.0])
def test_lock_step_gosgd_is_the_limit_of_equal_paces_and_short_delays(delay):
    workers, rounds = 8, 30
    schedule = gossip.gosgd_schedule(workers, rounds, 0.7, seed=2)
    everyone = np.arange(workers)
    receivers_TW = np.tile(everyone, (rounds, 1))
    for t in range(rounds):
        for receiver, sender, _ in schedule.edges(t):
            receivers_TW[t, sender] = receiver
    last = everyone[None]  # one round more, in which messages are only merged
    events = lock_step_events(np.concatenate([receivers_TW, last]).astype(np.int32), delay)
    noise_TWN = np.random.default_rng(3).normal(size=(rounds + 1, workers, 3))
    noise_TWN[-1] = 0

    with jax.enable_x64(True):
        noise = jnp.asarray(noise_TWN)

        def local_step(x, state, worker, event):
            return x + noise[event // workers, worker], state

        plan = simulate.make_plan(events)
        x_PN, _ = simulate.run_plan(plan, jnp.asarray(starts(workers)), (), local_step)
        rule = gossip.gosgd(gossip.Exchange(schedule.bank, WORKER))
        update = jax.jit(jax.vmap(rule.update, in_axes=(0, 0, 0, None), axis_name=WORKER))
        x_WN = jnp.asarray(starts(workers))
        state_W = jax.vmap(rule.init)(x_WN)
        for t in range(rounds):
            x_WN, state_W = update(noise[t], state_W, x_WN, schedule.round(t))
    np.testing.assert_allclose(x_PN[:workers], x_WN, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(plan.sum_weight_P[:workers], state_W.sum_weight, rtol=1e-12)


def test_a_lock_step_run_is_what_constant_times_give():
    events = simulate.asynchronous_run(3, 1.0, 20, 0, constant(1.0), constant(0.5))
    expected = lock_step_events(events.receiver_E.reshape(20, 3), 0.5)
    for name in ("time_E", "worker_E", "arrival_E", "merged_in"):
        np.testing.assert_array_equal(getattr(events, name), getattr(expected, name))
    assert (events.merged_in[: 19 * 3] // 3 == np.arange(19 * 3) // 3 + 1).all()


def test_without_local_steps_workers_meet_at_the_mean_of_their_starts():
    events = make_run(6, 0.5, "tick", "short", seed=0, duration=400)
    start_WN = jnp.asarray(starts(6), jnp.float32)
    x_PN, _ = simulate.run_plan(
        simulate.make_plan(events), start_WN, (), lambda x, state, worker, event: (x, state)
    )
    expected = np.broadcast_to(start_WN.mean(axis=0), (6, 3))
    np.testing.assert_allclose(x_PN[:6], expected, atol=1e-5)


def test_parameters_are_a_tree_and_keep_their_dtypes():
    events = make_run(3, 0.8, "tick", "long", seed=0)
    params_W = {"kernel": jnp.ones((3, 2, 2), jnp.bfloat16), "bias": jnp.ones((3,))}

    def step(params, state, worker, event):
        assert params["kernel"].shape == (2, 2)
        return params, state

    plan = simulate.make_plan(events)
    params_P, _ = jax.jit(lambda params_W: simulate.run_plan(plan, params_W, (), step))(params_W)
    assert jax.tree.map(lambda leaf: leaf.dtype, params_P) == {
        "kernel": jnp.bfloat16,
        "bias": jnp.float32,
    }
    np.testing.assert_array_equal(params_P["kernel"][:3].astype(jnp.float32), 1)


def test_a_diverged_message_spoils_nobody_but_its_receiver():
    """Worker 0 diverges and pushes to worker 1, which starts afresh and pushes to worker 2 through
    the mailbox that the broken message has left."""
    worker_E = np.array([0, 1, 1, 2], np.int32)
    receiver_E = np.array([1, 1, 2, 2], np.int32)
    time_E = np.arange(4.0)
    plan = simulate.make_plan(simulate.Events(3, time_E, worker_E, receiver_E, time_E))
    assert len(plan.sum_weight_P) == 4

    def local_step(x, state, worker, event):
        return jnp.array([jnp.nan, x, 1.0, x])[event], state

    x_P, _ = simulate.run_plan(plan, jnp.zeros(3), (), local_step)
    half = (1 / 3 + 1 / 6) / 2  # of worker 1's sum weight, after it has merged
    np.testing.assert_allclose(x_P[:3], [np.nan, 1, half / (half + 1 / 3)], rtol=1e-6)


@pytest.mark.parametrize("clock", sorted(CLOCKS))
def test_a_longer_run_begins_with_the_shorter_one(clock):
    short = make_run(4, 0.5, clock, "long", seed=3, duration=20)
    long = make_run(4, 0.5, clock, "long", seed=3, duration=60)
    for name in ("time_E", "worker_E", "receiver_E", "arrival_E"):
        np.testing.assert_array_equal(
            getattr(long, name)[: len(short.time_E)], getattr(short, name)
        )


def test_random_awakenings_coins_and_receivers_have_the_promised_laws():
    workers, p, duration = 5, 0.3, 20_000
    events = make_run(workers, p, "tick", "none", seed=0, duration=duration)
    count = len(events.time_E)
    assert count == pytest.approx(workers * duration, abs=5 * np.sqrt(workers * duration))
    gaps_E = np.diff(events.time_E) * workers
    assert gaps_E.mean() == pytest.approx(1, abs=5 / np.sqrt(count))
    assert gaps_E.var() == pytest.approx(1, abs=5 * np.sqrt(8 / count))
    assert events.pushes.mean() == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / count))
    pairs = np.zeros((workers, workers))
    np.add.at(pairs, (events.worker_E, events.receiver_E), 1)
    np.fill_diagonal(pairs, 0)
    share = pairs[~np.eye(workers, dtype=bool)] / (count * p)
    np.testing.assert_allclose(share, 1 / 20, atol=5 * np.sqrt(0.05 / (count * p)))


def test_distributions_have_the_promised_means():
    rng = np.random.default_rng(0)
    for distribution in (constant(2.0), exponential(2.0), lognormal(2.0, 0.5)):
        times = [distribution(rng, 0, 1) for _ in range(20_000)]
        assert np.mean(times) == pytest.approx(2, abs=0.08)
    assert np.std(np.log(times)) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"workers": 1}, "at least 2 workers, got 1"),
        ({"exchange_probability": 1.5}, r"must be in \[0, 1\], got 1.5"),
        ({"compute_time": constant(0.0)}, "must be positive, got 0.0 of worker 0"),
        ({"message_delay": constant(-1.0)}, "must not be negative, got -1.0 of worker 0"),
    ],
)
def test_impossible_runs_are_refused(changes, complaint):
    possible = {
        "workers": 3,
        "exchange_probability": 1.0,
        "duration": 3,
        "seed": 0,
        "compute_time": constant(1.0),
        "message_delay": constant(0.0),
    }
    with pytest.raises(ValueError, match=complaint):
        simulate.asynchronous_run(**{**possible, **changes})


def test_the_example_of_the_docstring_runs():
    assert doctest.testmod(simulate).failed == 0
