"""Mass: that it stays, over very many rounds too, and that the audit sees when it does not."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gossip_cases import DIRECTED, DOUBLY, ROUNDS, SHIFTS, random_schedule
from gossip_layouts import QUICK, on_a_device_each, on_one_device, over_rounds
from gossip_runs import at_round, results, start

from persyn_jax import gossip
from persyn_jax.gossip import Exchange, MassError, audited, check_audit
from persyn_jax.mesh import WORKER

EXCHANGE = Exchange(SHIFTS, WORKER)
FAULTY = random_schedule(SHIFTS, ROUNDS, 2, seed=6, dropped=0.3, average=0.2, absent=0.2, late=0.2)
MASSES = {
    "gosgd": (gossip.gosgd, gossip.sum_weight_mass),
    "push_sum": (gossip.push_sum, gossip.numerator_mass),
    "d_psgd": (gossip.d_psgd, gossip.plain_mass),
}


@functools.cache
def audited_program(name, layout=on_one_device):
    make, mass = MASSES[name]
    rule = audited(make(EXCHANGE), mass, EXCHANGE)
    return rule, layout(over_rounds(rule.update), compiler_options=QUICK)


@pytest.mark.parametrize(
    ("name", "schedule"), [("gosgd", FAULTY), ("push_sum", FAULTY), ("d_psgd", DOUBLY)]
)
def test_the_audit_of_a_rule_that_conserves_mass_finds_rounding_only(name, schedule):
    params_W, updates_WT = start()
    updates_WT["kernel"][3, ::4] = np.nan  # not even an update that is dropped changes it
    if name == "d_psgd":
        updates_WT["kernel"][3, ::4] = 0
    _, state_WT = results(*audited_program(name), schedule, params_W, updates_WT)
    last_W = at_round(state_WT, -1)
    check_audit(last_W)
    assert (last_W.violated_in == -1).all()
    assert 0 < last_W.error.max() < 1e-6


@pytest.mark.parametrize(
    "layout",
    [on_one_device, functools.partial(on_a_device_each, workers=8)],
    ids=["one device", "a device each"],
)
def test_the_audit_names_the_first_round_that_made_or_lost_mass(layout):
    """Averaging with rows that sum to 1, and from round 20 on with columns that do not."""
    doubly_T = np.arange(ROUNDS) < 20
    schedule = replace(
        DIRECTED,
        branches_TK=np.where(doubly_T[:, None], DOUBLY.branches_TK, DIRECTED.branches_TK),
        weights_TKW=np.where(doubly_T[:, None, None], DOUBLY.weights_TKW, DIRECTED.weights_TKW),
    )
    columns_TW = np.array([schedule.pull_matrix(t).sum(axis=0) for t in range(ROUNDS)])
    expected = int(np.flatnonzero(~np.isclose(columns_TW, 1).all(axis=1))[0])
    assert expected >= 20
    _, state_WT = results(*audited_program("d_psgd", layout), schedule, *start())
    last_W = at_round(state_WT, -1)
    assert (last_W.violated_in == expected).all(), "all workers agree"
    with pytest.raises(MassError, match=f"round {expected} changed the mass .* by 0.0"):
        check_audit(last_W)
    check_audit(at_round(state_WT, expected - 1))


def test_mass_that_is_no_number_is_a_violation():
    params_W, updates_WT = start()
    params_W["kernel"][3] = np.nan
    _, state_WT = results(*audited_program("d_psgd"), DOUBLY, params_W, updates_WT)
    with pytest.raises(MassError, match=r"round 0 .* by nan"):
        check_audit(at_round(state_WT, -1))


@pytest.mark.parametrize("workers", [3, 8])
def test_sum_weights_never_drift(workers):
    """Their total in float64 is the same to the bit after each of 10,000 rounds."""
    schedule = gossip.gosgd_schedule(workers, 10_000, 0.4, seed=1)
    mixing = gossip.gosgd(Exchange(schedule.bank, WORKER))
    update = jax.vmap(mixing.update, in_axes=(0, 0, 0, None), axis_name=WORKER)
    params_W = jnp.zeros((workers, 1))
    state_W = jax.vmap(mixing.init)(params_W)

    def step(state_W, row):
        _, state_W = update(params_W, state_W, params_W, row)
        return state_W, state_W.sum_weight

    _, weights_TW = jax.jit(lambda state_W: jax.lax.scan(step, state_W, schedule.table()))(state_W)
    assert weights_TW.dtype == jnp.float32
    total_T = np.asarray(weights_TW, np.float64).sum(axis=1)
    np.testing.assert_array_equal(total_T, np.asarray(state_W.sum_weight, np.float64).sum())
    assert abs(total_T[0] - 1) < 1e-6
    assert (np.ptp(weights_TW, axis=1) > 0).mean() > 0.5
    assert (np.asarray(weights_TW) > 0).all()
