"""Every rule against the NumPy oracle, over 50 rounds of random schedules with all faults."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from gossip_cases import random_schedule
from gossip_layouts import QUICK, on_one_device, over_rounds
from hypothesis import given, settings
from hypothesis import strategies as st

from persyn_jax import gossip
from persyn_jax.gossip import Exchange, MixingTransformation, Schedule, bank_of
from persyn_jax.gossip.contrib import d2
from persyn_jax.gossip.rules import is_finite
from persyn_jax.mesh import WORKER

ROUNDS, SLOTS, DIMENSION = 50, 2, 5


class Rule(NamedTuple):
    """A rule of the library, the same in the oracle, and where both keep what."""

    ours: Callable[[Exchange], MixingTransformation]
    theirs: Callable[..., dict]
    hyper: dict[str, float]
    state: dict[str, Callable[[Any], Any]]
    """Of each name beside "params" in the oracle's result: where the rule's state holds it."""
    same_start: bool = False
    """Whether all workers must start from the same parameters."""


WEIGHTS = {"weights": lambda state: state.sum_weight}
CENTRE = {"centre": lambda state: state.centre["x"][0]}
RESIDUAL = {"residual": lambda state: state.residual["x"]}

RULES = {
    "gosgd": Rule(gossip.gosgd, oracle.gosgd, {}, WEIGHTS),
    "push_sum": Rule(gossip.push_sum, oracle.push_sum, {}, WEIGHTS),
    "d_psgd": Rule(gossip.d_psgd, oracle.d_psgd, {}, {}),
    "delayed by 0": Rule(
        lambda e: gossip.delayed(gossip.d_psgd(e), e), oracle.d_psgd_before, {}, {}
    ),
    "delayed by 2": Rule(
        lambda e: gossip.delayed(gossip.d_psgd(e), e, rounds=2),
        oracle.d_psgd_delayed,
        {"k": 2},
        {},
    ),
    "in int8": Rule(
        lambda e: gossip.in_dtype(jnp.int8, gossip.d_psgd, e), oracle.d_psgd_int8, {}, RESIDUAL
    ),
    "peer_average": Rule(
        lambda e: gossip.peer_average(e, rate=0.3), oracle.levanter_pull, {"m": 0.3}, {}
    ),
    "d2": Rule(d2, oracle.d2, {}, {}),
    "all_reduce": Rule(gossip.all_reduce, oracle.all_reduce, {}, {}),
    "no_mixing": Rule(gossip.no_mixing, oracle.no_mixing, {}, {}),
    "easgd": Rule(
        lambda e: gossip.easgd(e, moving_rate=0.1),
        oracle.easgd,
        {"moving_rate": 0.1},
        CENTRE,
        same_start=True,
    ),
    "downpour": Rule(gossip.downpour, oracle.downpour, {}, CENTRE, same_start=True),
    "slowmo": Rule(
        lambda e: gossip.slowmo(e, momentum=0.5, learning_rate=0.7, inner_learning_rate=0.1),
        oracle.slowmo,
        {"beta": 0.5, "lr": 0.7, "inner_lr": 0.1},
        {},
    ),
    "diloco": Rule(gossip.diloco, oracle.diloco, {"lr": 0.7, "momentum": 0.9}, {}),
    "noloco": Rule(
        lambda e: gossip.noloco(e, momentum=0.5, learning_rate=0.7),
        oracle.noloco,
        {"beta": 0.5, "alpha_lr": 0.7},
        {},
    ),
    "gasloc": Rule(lambda e: gossip.gasloc(e, momentum=0.4), oracle.gasloc, {"gamma": 0.4}, {}),
}
PROGRAMS = [
    (2, "bank", "float64"),
    (3, "matrix", "float64"),
    (5, "bank", "float64"),
    (8, "matrix", "float64"),
    (4, "matrix", "float32"),
]
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
QUANTUM = 0.05
"""In float32, a number near the middle between two int8 may be rounded to either."""

rates = st.fixed_dictionaries(
    {fault: st.floats(0, 0.5) for fault in ("idle", "dropped", "average", "absent", "late")}
)


@functools.cache
def bank_for(workers):
    rng = np.random.default_rng(workers)
    return bank_of(np.array([rng.permutation(workers) for _ in range(4)]))[0]


@functools.cache
def program(name, bank):
    rule = RULES[name].ours(Exchange(bank, WORKER))
    return rule, on_one_device(over_rounds(rule.update), compiler_options=QUICK)


def oracle_rounds(schedule: Schedule) -> list[oracle.OracleRound]:
    return [
        oracle.OracleRound(
            index=t,
            sync=bool(schedule.sync_T[t]),
            average=bool(schedule.average_T[t]),
            edges=schedule.edges(t),
            steps_W=schedule.steps_TW[t],
            present_W=schedule.present_TW[t],
        )
        for t in range(schedule.rounds)
    ]


def make_data(workers, seed, poison, same_start):
    """Parameters [W, D] and updates [T, W, D], some of them not finite."""
    rng = np.random.default_rng([seed, 1])
    x0_WD = rng.normal(size=(workers, DIMENSION))
    updates_TWD = 0.3 * rng.normal(size=(ROUNDS, workers, DIMENSION))
    bad_TW = rng.random((ROUNDS, workers)) < poison
    updates_TWD[bad_TW, rng.integers(DIMENSION, size=bad_TW.sum())] = rng.choice(
        [np.nan, np.inf, -np.inf], size=bad_TW.sum()
    )
    if same_start:
        x0_WD = np.tile(x0_WD[0], (workers, 1))
    return x0_WD, updates_TWD


@pytest.mark.parametrize(("workers", "mode", "dtype"), PROGRAMS)
@pytest.mark.parametrize("name", RULES)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**31), poison=st.floats(0, 0.5), rates=rates)
def test_fifty_rounds_agree_with_the_papers(name, workers, mode, dtype, seed, poison, rates):
    case = RULES[name]
    schedule = random_schedule(bank_for(workers), ROUNDS, SLOTS, seed, **rates)
    if mode == "matrix":
        schedule = schedule.dense()
    x0_WD, updates_TWD = make_data(workers, seed, poison, case.same_start)
    x0_WD, updates_TWD = x0_WD.astype(dtype), updates_TWD.astype(dtype)
    hyper = dict(case.hyper)
    with jax.enable_x64(dtype == "float64"):
        rule, run = program(name, schedule.bank if mode == "bank" else gossip.Dense(workers))
        if name == "gosgd":
            hyper["unit"] = gossip.sum_weight_unit()
        params_W = {"x": x0_WD[:, None]}
        updates_WT = {"x": updates_TWD.swapaxes(0, 1)[:, :, None]}
        state_W = jax.vmap(rule.init)(params_W)
        params_WT, state_WT = run(params_W, state_W, updates_WT, schedule.table())
    expected = case.theirs(x0_WD, updates_TWD, oracle_rounds(schedule), **hyper)
    actual = {"params": params_WT["x"]} | {key: of(state_WT) for key, of in case.state.items()}
    tolerance = QUANTUM if (name, dtype) == ("in int8", "float32") else TOLERANCE[dtype]
    assert params_WT["x"].dtype == dtype
    for key, expected_T in expected.items():
        actual_T = np.asarray(actual[key], np.float64)
        if key != "centre":
            actual_T = actual_T.swapaxes(0, 1)
        np.testing.assert_allclose(
            actual_T.reshape(expected_T.shape),
            expected_T,
            rtol=0,
            atol=tolerance * max(1, np.abs(expected_T).max()),
            err_msg=key,
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_one_bad_number_among_many_is_found(poison, dtype):
    """As many as XLA reduces in another way than a few."""
    exchange = Exchange(gossip.gosgd_schedule(1, 1, 1.0, 0).bank, WORKER)
    found = jax.jit(lambda updates: is_finite(updates, exchange))
    large = np.random.default_rng(0).uniform(-3e38, 3e38, (137, 129)).astype(dtype)
    assert found({"kernel": large, "bias": large[0]})
    large[100, 77] = poison
    assert not found({"kernel": large, "bias": large[0]})
