"""Many workers on one device: a message read where it lies is the message that would have come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from persyn_jax import gossip
from persyn_jax.gossip import topologies

RNG = np.random.default_rng(0)
ROUNDS = 30
SCHEDULES = {
    "gosgd": topologies.gosgd_schedule(8, ROUNDS, 0.4, seed=0),
    "ring": topologies.ring(5, ROUNDS),
    "base-3": topologies.base_k_plus_1(7, ROUNDS, degree=2),
    "digits": topologies.gosgd_schedule(128, 3, 1.0, seed=1),
}


def run(rule, schedule, one_device):
    """All rounds in one program, which is compiled for one row."""
    mixing = rule(gossip.Exchange(schedule.bank, "worker", one_device=one_device))
    workers = schedule.workers
    rng = np.random.default_rng(1)
    params = {
        "a": rng.normal(size=(workers, 6, 4)).astype(np.float32),
        "b": rng.normal(size=(workers, 3)).astype(np.float32),
    }
    updates = jax.tree.map(lambda leaf: 0.1 * leaf, params)
    update = jax.vmap(mixing.update, in_axes=(0, 0, 0, None), axis_name="worker")

    def step(carry, round):
        return update(updates, carry[1], carry[0], round), None

    start = jax.tree.map(jnp.asarray, params), jax.vmap(mixing.init)(params)
    return jax.jit(lambda start: lax.scan(step, start, schedule.table())[0])(start)


@pytest.mark.parametrize("rule", [gossip.gosgd, gossip.push_sum, gossip.d_psgd])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_result_is_bitwise_that_of_the_bank(name, rule):
    found, found_state = run(rule, SCHEDULES[name], one_device=True)
    expected, expected_state = run(rule, SCHEDULES[name], one_device=False)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    if hasattr(found_state, "sum_weight"):
        np.testing.assert_array_equal(found_state.sum_weight, expected_state.sum_weight)


def test_the_distance_to_partners_is_not_measured_rather_than_wrong():
    _, state = run(gossip.d_psgd, SCHEDULES["ring"], one_device=True)
    assert np.isnan(np.asarray(state.pair_distance)).all()
