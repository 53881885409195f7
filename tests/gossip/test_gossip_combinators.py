"""What each combinator does that the rules inside do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gossip_cases import random_schedule
from gossip_layouts import QUICK, on_one_device

from persyn_jax import gossip
from persyn_jax.gossip import Exchange, shift_bank
from persyn_jax.mesh import WORKER

WORKERS = 4
BANK = shift_bank(WORKERS)
EXCHANGE = Exchange(BANK, WORKER)
RULE = gossip.d_psgd(EXCHANGE)


def shift_round(shift, index=0, weight=0.5, average=False):
    """All hear from the worker `shift` before them."""
    schedule = random_schedule(BANK, 1, 1, seed=0)
    return schedule.round(0)._replace(
        index=np.int32(index),
        sync=np.True_,
        average=np.bool_(average),
        branch_K=np.array([shift], np.int32),
        weight_KW=np.full((1, WORKERS), weight),
    )


def mixed(rule, params_W, round):
    """The parameters after a round without updates."""
    step = on_one_device(rule.update, compiler_options=QUICK)
    nothing_W = jax.tree.map(jnp.zeros_like, params_W)
    return step(nothing_W, jax.vmap(rule.init)(params_W), params_W, round)[0]


def columns(*shape):
    return np.random.default_rng(0).normal(size=(WORKERS, *shape)).astype(np.float32)


def halfway(x_W, shift):
    return (x_W + np.roll(x_W, shift, axis=0)) / 2


def test_every_exchanges_in_the_last_round_of_each_period_only():
    x_W = columns(3)
    for index, average in ((0, False), (1, True), (2, False), (5, True)):
        row = shift_round(1, index, average=average)
        if index % 3 != 2:
            expected_W = x_W
        elif average:
            expected_W = np.broadcast_to(x_W.mean(axis=0), x_W.shape)
        else:
            expected_W = halfway(x_W, 1)
        actual_W = mixed(gossip.every(3, RULE), x_W, row)
        np.testing.assert_allclose(actual_W, expected_W, atol=1e-6)


def test_an_outer_optimiser_steps_in_the_last_round_of_each_period_only():
    """Half of the way to W y, and before that local steps."""
    rule = gossip.every(2, gossip.slowmo(EXCHANGE, 0.0, 0.5, 0.1))
    x_W = columns(3)
    step = on_one_device(rule.update, compiler_options=QUICK)
    updates_W = np.ones_like(x_W)
    carry = step(updates_W, jax.vmap(rule.init)(x_W), x_W, shift_round(1, index=0))
    np.testing.assert_array_equal(carry[0], x_W + 1)
    after_W, _ = step(updates_W, carry[1], carry[0], shift_round(1, index=1))
    np.testing.assert_allclose(after_W, (x_W + halfway(x_W + 2, 1)) / 2, atol=1e-6)


def test_every_part_of_a_partition_follows_its_own_rounds():
    rule = gossip.partition(
        {"near": RULE, "far": RULE}, lambda params: {"router": "near", "student": "far"}
    )
    params_W = {"router": columns(3), "student": columns(2, 3)}
    after_W = mixed(rule, params_W, {"near": shift_round(1), "far": shift_round(2)})
    np.testing.assert_allclose(after_W["router"], halfway(params_W["router"], 1), atol=1e-6)
    np.testing.assert_allclose(after_W["student"], halfway(params_W["student"], 2), atol=1e-6)


def test_masked_leaves_take_local_steps_only():
    rule = gossip.masked(RULE, lambda params: {"adapter": True, "backbone": False}, EXCHANGE)
    params_W = {"adapter": columns(3), "backbone": columns(2, 3)}
    updates_W = jax.tree.map(np.ones_like, params_W)
    step = on_one_device(rule.update, compiler_options=QUICK)
    state_W = jax.vmap(rule.init)(params_W)
    after_W, _ = step(updates_W, state_W, params_W, shift_round(1))
    np.testing.assert_allclose(after_W["adapter"], halfway(params_W["adapter"], 1) + 1, atol=1e-6)
    np.testing.assert_array_equal(after_W["backbone"], params_W["backbone"] + 1)


def test_each_fragment_has_another_partner():
    """Leaves are cut in rows; those with too few rows belong whole to one fragment each."""
    rule = gossip.fragments((RULE, RULE, RULE))
    params_W = {"a": columns(7, 2), "b": columns(), "c": columns(2)}
    after_W = mixed(rule, params_W, tuple(shift_round(shift) for shift in (1, 2, 3)))
    rows_W = {"a": ((0, 2, 1), (2, 4, 2), (4, 7, 3))}
    for low, high, shift in rows_W["a"]:
        expected_W = halfway(params_W["a"][:, low:high], shift)
        np.testing.assert_allclose(after_W["a"][:, low:high], expected_W, atol=1e-6)
    np.testing.assert_allclose(after_W["b"], halfway(params_W["b"], 2), atol=1e-6)
    np.testing.assert_allclose(after_W["c"], halfway(params_W["c"], 3), atol=1e-6)


def test_chained_rules_mix_one_after_the_other_and_step_once():
    rule = gossip.chain(RULE, RULE)
    x_W = columns(3)
    step = on_one_device(rule.update, compiler_options=QUICK)
    rounds = shift_round(1), shift_round(3)
    after_W, _ = step(np.ones_like(x_W), jax.vmap(rule.init)(x_W), x_W, rounds)
    np.testing.assert_allclose(after_W, halfway(halfway(x_W + 1, 1), 3), atol=1e-6)


def test_chained_rules_answer_where_the_first_wants_it():
    """Push-sum's z = x / w, after averaging has left everything as it is."""
    rule = gossip.chain(gossip.push_sum(EXCHANGE), RULE)
    params = {"x": jnp.arange(3.0)}
    push, plain = rule.init(params)
    at = rule.evaluate_at(params, (push._replace(sum_weight=jnp.float32(2)), plain))
    np.testing.assert_array_equal(at["x"], params["x"] / 2)


def test_rounding_is_paid_back_in_time():
    """With error feedback, pairs that average in int8 agree on more than int8 can say at once."""
    rule = gossip.in_dtype(jnp.int8, gossip.d_psgd, EXCHANGE)
    x_W = columns(1, 64)
    step = on_one_device(rule.update, compiler_options=QUICK)
    nothing_W, carry, sums_W = np.zeros_like(x_W), (x_W, jax.vmap(rule.init)(x_W)), 0 * x_W
    for t in range(200):
        carry = step(nothing_W, carry[1], carry[0], shift_round(2, index=t))
        sums_W += carry[0]
    quantum = np.abs(x_W).max() / 127
    expected_W = halfway(x_W, 2)
    assert np.abs(carry[0] - expected_W).max() < 2 * quantum
    assert np.abs(sums_W / 200 - expected_W).max() < 0.2 * quantum


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gossip.every(0, RULE), "period must be at least 1, got 0"),
        (lambda: gossip.delayed(RULE, EXCHANGE, rounds=-1), "must not be negative, got -1"),
        (lambda: gossip.in_dtype(jnp.float16, gossip.gosgd, EXCHANGE), "int8, got float16"),
        (
            lambda: gossip.partition({"a": RULE}, lambda params: "b").init(jnp.ones(3)),
            r"no rule for label 'b', only \['a'\]",
        ),
        (
            lambda: mixed(gossip.chain(RULE, RULE), columns(3), (shift_round(1),)),
            "2 rules need one round or 2, got 1",
        ),
        (
            lambda: mixed(gossip.fragments((RULE, RULE)), columns(3), (shift_round(1),) * 3),
            "2 rules need one round or 2, got 3",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
