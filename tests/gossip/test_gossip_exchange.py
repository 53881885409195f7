"""What travels, and what a program is made of, apart from any rule."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gossip_cases import random_schedule
from gossip_layouts import QUICK, on_a_device_each, on_one_device
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from persyn_jax import gossip
from persyn_jax.gossip import Dense, Exchange, bank_of, mix, receive, shift_bank, xor_bank
from persyn_jax.gossip import exchange as exchange_file
from persyn_jax.gossip.wire import decode, encode, wire_bytes
from persyn_jax.mesh import WORKER, make_mesh

SHAPES = {"scalar": (), "vector": (37,), "matrix": (67, 5), "stack": (3, 41, 5)}


def random_bank(workers):
    rng = np.random.default_rng(workers)
    return bank_of(np.array([rng.permutation(workers) for _ in range(4)]))[0]


def make_tree(workers):
    rng = np.random.default_rng(workers)
    tree_W = {
        name: rng.normal(size=(workers, *shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    return tree_W | {"half": rng.normal(size=(workers, 33, 5)).astype(jnp.bfloat16)}


BANKS = [xor_bank(2), xor_bank(8), shift_bank(3), random_bank(5), shift_bank(128)]
bank_cases = pytest.mark.parametrize("bank", BANKS, ids=lambda bank: f"{bank.workers}")


@bank_cases
def test_receive_permutes_bitwise(bank):
    """Above 64 workers in two steps, by digits: those are run on one device only."""

    def step(tree, branch):
        return receive(tree, branch, bank, WORKER)

    tree_W = {name: make_tree(bank.workers)[name] for name in ("vector", "half")}
    runs = [on_one_device(step)]
    if bank.workers <= 8:
        runs.append(on_a_device_each(step, bank.workers))
    for branch in {0, 1, bank.branches // 2, bank.branches - 1}:
        senders_W = np.argsort(bank.receivers_BW[branch])
        expected_W = jax.tree.map(lambda leaf_W, w=senders_W: leaf_W[w], tree_W)
        for run in runs:
            chex.assert_trees_all_equal(run(tree_W, np.int32(branch)), expected_W)


@pytest.mark.parametrize("mode", ["bank", "one device", "matrix"])
def test_every_worker_knows_the_weights_of_its_messages(mode):
    """What it sends by its outgoing weights comes in by the incoming ones."""
    schedule = random_schedule(random_bank(5), 8, 3, seed=0, dropped=0.3)
    schedule = schedule.dense() if mode == "matrix" else schedule
    exchange = Exchange(schedule.bank, WORKER, one_device=mode == "one device")

    def step(number, row):
        sent_K = gossip.outgoing(row, exchange)
        got_K = gossip.send(number * (sent_K > 0), row, exchange)
        return sent_K, gossip.incoming(row, exchange), got_K

    run = on_one_device(step, compiler_options=QUICK)
    number_W = np.arange(1, 6, dtype=np.float32)
    for t in range(schedule.rounds):
        sent_WK, came_WK, got_WK = run(number_W, schedule.round(t))
        edges = schedule.edges(t)
        for worker in range(5):
            given = sum(weight for _, sender, weight in edges if sender == worker)
            taken = [(n + 1, weight) for w, n, weight in edges if w == worker]
            np.testing.assert_allclose(sent_WK[worker].sum(), given, rtol=1e-6)
            np.testing.assert_allclose(came_WK[worker].sum(), sum(w for _, w in taken), rtol=1e-6)
            assert sorted(got_WK[worker][got_WK[worker] > 0]) == sorted(n for n, _ in taken)


def test_a_message_to_oneself_is_none():
    """A worker that a permutation leaves where it is hears nobody, whatever the weight says."""
    bank, _ = bank_of(np.array([[0, 2, 1]]))
    row = random_schedule(bank, 1, 1, seed=0).round(0)
    row = row._replace(branch_K=np.array([1], np.int32), weight_KW=np.full((1, 3), 0.5))
    sent_WK = on_one_device(lambda _, row: gossip.outgoing(row, Exchange(bank, WORKER)))
    np.testing.assert_array_equal(sent_WK(np.zeros(3), row)[:, 0], [0, 0.5, 0.5])


@pytest.mark.parametrize(
    ("bank", "fragment_bytes"),
    [(random_bank(5), 512), (shift_bank(3), exchange_file.FRAGMENT_BYTES)],
    ids=["5, in fragments", "3, whole"],
)
def test_mix_is_its_equation_to_the_bit(bank, fragment_bytes, monkeypatch):
    """own * scale + sum_k gain_k (received_k - own) in float32, product by product, whatever the
    compiler would like to fuse; and the distance to what was received."""
    monkeypatch.setattr(exchange_file, "FRAGMENT_BYTES", fragment_bytes)
    workers, exchange = bank.workers, Exchange(bank, WORKER)
    tree_W = make_tree(workers)
    rng = np.random.default_rng(0)
    scale_W = rng.uniform(0.5, 1.5, workers).astype(np.float32)
    gain_WK = rng.uniform(0.1, 0.5, (workers, 2)).astype(np.float32)
    gain_WK[0, 0] = 0

    def step(tree, scale, gain_K, row):
        return mix(tree, gain_K, row, exchange, scale=scale)

    row = random_schedule(bank, 1, 2, seed=0).round(0)._replace(branch_K=np.array([1, 2], np.int32))
    expected_W, expected_distance_W = {}, np.zeros(workers)
    for name, leaf_W in tree_W.items():
        own_WN = leaf_W.astype(np.float32).reshape(workers, -1)
        mixed_WN = scale_W[:, None] * own_WN
        for k in range(2):
            gap_WN = own_WN[bank.senders_BW[row.branch_K[k]]] - own_WN
            mixed_WN += gain_WK[:, k, None] * gap_WN
            expected_distance_W += np.where(gain_WK[:, k] > 0, (gap_WN**2).sum(axis=1), 0)
        expected_W[name] = mixed_WN.reshape(leaf_W.shape).astype(leaf_W.dtype)
    for layout in (on_one_device, functools.partial(on_a_device_each, workers=workers)):
        mixed_W, distance_W = layout(step)(tree_W, scale_W, gain_WK, row)
        chex.assert_trees_all_equal(mixed_W, expected_W)
        np.testing.assert_allclose(distance_W, expected_distance_W, rtol=1e-5)


def test_bfloat16_is_mixed_in_float32():
    # 1 + 2^-8 is not a bfloat16: sums in bfloat16 would lose each of the small terms.
    bank, _ = bank_of(np.array([[1, 0]]))
    row = random_schedule(bank, 1, 2, seed=0).round(0)._replace(branch_K=np.array([1, 1], np.int32))
    exchange = Exchange(bank, WORKER)

    def step(params, row):
        return mix(params, jnp.array([2.0**-8, 2.0**-8]), row, exchange)[0]

    params_W = jnp.asarray([[1.0], [2.0]], jnp.bfloat16)
    expected_W = jnp.asarray([[1 + 2 * 2**-8], [2 - 2 * 2**-8]], jnp.float32).astype(jnp.bfloat16)
    chex.assert_trees_all_equal(on_one_device(step)(params_W, row), expected_W)


@pytest.mark.parametrize("bank", [xor_bank(4), Dense(4)], ids=["bank", "matrix"])
def test_numbers_that_nobody_wants_do_no_harm(bank):
    """A slot without gain may hold NaN; it neither mixes nor counts in the distance."""
    exchange = Exchange(bank, WORKER)
    schedule = random_schedule(xor_bank(4), 1, 1, seed=0, idle=0)
    row = (schedule.dense() if isinstance(bank, Dense) else schedule).round(0)
    params_W = np.ones((4, 3), np.float32)
    params_W[2] = np.nan

    def step(params, row):
        return mix(params, jnp.zeros(row.branch_K.shape), row, exchange)

    mixed_W, distance_W = on_one_device(step)(params_W, row)
    np.testing.assert_array_equal(mixed_W, params_W)
    np.testing.assert_array_equal(np.delete(distance_W, 2), 0)


@pytest.mark.parametrize("bank", [xor_bank(4), Dense(4)], ids=["bank", "matrix"])
def test_the_mean_is_over_those_who_may_and_reaches_only_them(bank):
    exchange = Exchange(bank, WORKER)
    row = random_schedule(xor_bank(4), 1, 1, seed=0).round(0)
    row = row._replace(average=np.True_, present_W=np.array([True, True, False, True]))
    params_W = {"x": np.array([[1.0], [2.0], [np.nan], [np.nan]], np.float32)}
    weight_W = np.array([0.25, 0.75, 0.5, 0.5], np.float32)
    ok_W = np.array([True, True, True, False])

    def step(params, weight, ok, row):
        return gossip.average(params, weight, ok, row, exchange)

    run = on_one_device(step)
    expected_W = {"x": np.array([[1.75], [1.75], [np.nan], [np.nan]], np.float32)}
    chex.assert_trees_all_equal(run(params_W, weight_W, ok_W, row), expected_W)
    silent = row._replace(average=np.False_)
    chex.assert_trees_all_equal(run(params_W, weight_W, ok_W, silent), params_W)


# What a program is made of.


def compile_mix(workers, params_W, bank, **jit_options):
    exchange = Exchange(bank, WORKER)

    def step(params, row):
        return mix(params, gossip.incoming(row, exchange), row, exchange)

    row = random_schedule(bank, 1, 1, seed=0, idle=0).round(0)
    run = on_a_device_each(step, workers, donate_argnums=0, **jit_options)
    return run.lower(params_W, row).compile()


def test_the_program_holds_one_collective_permute_a_branch_and_group_and_gathers_nothing():
    params_W = {  # two groups: rows of 16 (three arrays in one message) and rows of 32
        "up": jnp.ones((8, 64, 16)),
        "layers": jnp.ones((8, 4, 16, 16)),
        "norm": jnp.ones((8, 4, 16)),
        "down": jnp.ones((8, 16, 32)),
    }
    text = compile_mix(8, params_W, xor_bank(8), compiler_options=QUICK).as_text()
    assert len(re.findall(r" collective-permute(?:-start)?\(", text)) == 7 * 2
    assert not re.search("all-gather|all-reduce|all-to-all", text)


def test_donated_parameters_are_mixed_in_place(monkeypatch):
    monkeypatch.setattr(exchange_file, "FRAGMENT_BYTES", 1 << 16)
    params_W = {"embed": jnp.ones((4, 4096, 128)), "layers": jnp.ones((4, 6, 512, 128))}
    bytes_per_worker = (4096 + 6 * 512) * 128 * 4
    memory = compile_mix(4, params_W, xor_bank(4)).memory_analysis()
    assert memory.alias_size_in_bytes >= bytes_per_worker
    assert memory.temp_size_in_bytes < bytes_per_worker / 8


def test_an_axis_of_another_size_than_the_bank_is_refused():
    step = on_a_device_each(lambda x, branch: receive(x, branch, xor_bank(4), WORKER), workers=8)
    with pytest.raises(ValueError, match="axis 'worker' has 8 workers, the bank 4"):
        step(jnp.ones((8, 2)), np.int32(1))


@pytest.mark.parametrize("layout", ["on one device", "on a device each"])
def test_a_thousand_random_rounds_run_in_one_compiled_program(layout):
    schedule = random_schedule(
        shift_bank(4), 1000, 2, seed=7, dropped=0.3, average=0.1, absent=0.1, late=0.1
    )
    assert set(schedule.branches_TK.ravel()) == {0, 1, 2, 3}
    assert {schedule.average_T.any(), schedule.sync_T.any(), schedule.sync_T.all()} == {True, False}
    exchange = Exchange(schedule.bank, WORKER)
    mixing = gossip.chain(gossip.gosgd(exchange), gossip.every(7, gossip.diloco(exchange)))
    params_W = {"x": jnp.ones((4, 3, 5))}
    state_W = jax.vmap(mixing.init)(params_W)
    if layout == "on one device":
        step = on_one_device(mixing.update, compiler_options=QUICK)
        own = shared = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    else:
        step = on_a_device_each(mixing.update, 4, compiler_options=QUICK)
        own, shared = (NamedSharding(make_mesh(4), spec) for spec in (P(WORKER), P()))
    params_W, state_W, updates_W = jax.device_put((params_W, state_W, params_W), own)
    for t in range(schedule.rounds):
        row = jax.device_put(schedule.round(t), shared)
        params_W, state_W = jax.block_until_ready(step(updates_W, state_W, params_W, row))
    assert step._cache_size() == 1


# What parameters look like while they travel.


def test_int8_is_off_by_half_a_step_at_most():
    leaf = np.random.default_rng(0).normal(size=(7, 64)).astype(np.float32)
    leaf[3] = 0
    steps, scale = encode(leaf, jnp.int8)
    assert (steps.dtype, scale.dtype, scale.shape) == (jnp.int8, jnp.float32, (7, 1))
    np.testing.assert_array_equal(np.abs(steps).max(axis=1), [127, 127, 127, 0, 127, 127, 127])
    read = np.asarray(decode((steps, scale), jnp.float32))
    assert (np.abs(read - leaf) <= np.abs(leaf).max(axis=1, keepdims=True) / 127 * 0.5001).all()


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.int8])
def test_what_needs_no_rounding_arrives_as_it_is(dtype):
    leaf = np.random.default_rng(0).integers(-126, 127, (5, 6)).astype(np.float32) / 4
    leaf[:, 0] = 127 / 4
    np.testing.assert_array_equal(decode(encode(leaf, dtype), jnp.float32), leaf)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((10, 64), None, 10 * 64 * 4),
        ((10, 64), jnp.bfloat16, 10 * 64 * 2),
        ((10, 64), jnp.int8, 10 * 64 + 10 * 4),
        ((64,), jnp.int8, 64 * 4),  # vectors travel as they are
    ],
)
def test_bytes_on_the_wire(shape, dtype, expected):
    assert wire_bytes(shape, jnp.float32, dtype) == expected


def test_a_lone_worker_keeps_what_it_has():
    """Its schedule may ask for a mean of all and give a message to itself weight: nothing moves."""
    schedule = gossip.gosgd_schedule(1, 4, 0.5, seed=0)
    exchange, row = Exchange(schedule.bank, WORKER), schedule.round(0)
    row = row._replace(average=np.array(True), weight_KW=np.full_like(row.weight_KW, 0.5))
    tree_W = {name: make_tree(1)[name] for name in SHAPES}

    def step(tree, row):
        mean = gossip.average(tree, jnp.float32(1), jnp.bool_(True), row, exchange)
        return mean, *mix(tree, jnp.full(row.branch_K.shape, 0.5), row, exchange)

    mean_W, mixed_W, distance_W = on_a_device_each(step, 1)(tree_W, row)
    chex.assert_trees_all_equal(mean_W, tree_W)
    chex.assert_trees_all_equal(mixed_W, tree_W)
    assert distance_W == 0
