import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gossip_layouts import on_a_device_each, on_one_device

from persyn_jax.gossip import exchange as exchange_file
from persyn_jax.gossip import mix, receive, shift_bank, xor_bank
from persyn_jax.mesh import WORKER

BANKS = [xor_bank(2), xor_bank(4), xor_bank(8), shift_bank(3), shift_bank(5)]
bank_cases = pytest.mark.parametrize("bank", BANKS, ids=lambda bank: f"{bank.workers}")

SHAPES = {"scalar": (), "vector": (37,), "matrix": (67, 5), "stack": (3, 41, 5)}


def make_tree(workers):
    generator = np.random.default_rng(workers)
    tree_W = {
        name: generator.normal(size=(workers, *shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    return jax.tree.map(jnp.asarray, tree_W) | {
        "half": jnp.asarray(generator.normal(size=(workers, 33, 5)), jnp.bfloat16)
    }


@bank_cases
def test_receive_permutes_bitwise_in_both_layouts(bank):
    def step(tree, branch):
        return receive(tree, branch, bank, WORKER)

    tree_W = {name: make_tree(bank.workers)[name] for name in ("matrix", "half")}
    one, each = on_one_device(step), on_a_device_each(step, bank.workers)
    for branch, receivers in enumerate(bank.receivers):
        senders = np.argsort(receivers)
        expected_W = jax.tree.map(lambda leaf_W, senders=senders: leaf_W[senders], tree_W)
        chex.assert_trees_all_equal(one(tree_W, np.int32(branch)), expected_W)
        chex.assert_trees_all_equal(each(tree_W, np.int32(branch)), expected_W)


@pytest.mark.parametrize(
    ("bank", "fragment_bytes"),
    [(bank, 512) for bank in BANKS] + [(xor_bank(4), exchange_file.FRAGMENT_BYTES)],
    ids=lambda case: f"{getattr(case, 'workers', case)}",
)
def test_mix_combines_every_number_once_in_both_layouts(bank, fragment_bytes, monkeypatch):
    monkeypatch.setattr(exchange_file, "FRAGMENT_BYTES", fragment_bytes)

    def combine(own, received):
        return own + 0.25 * (received - own)

    def step(tree, branch):
        return mix(tree, branch, combine, bank, WORKER)

    tree_W = make_tree(bank.workers)
    one, each = on_one_device(step), on_a_device_each(step, bank.workers)
    for branch in (0, 1, len(bank.receivers) - 1):
        senders = np.argsort(bank.receivers[branch])
        mixed_W = one(tree_W, np.int32(branch))
        chex.assert_trees_all_equal(mixed_W, each(tree_W, np.int32(branch)))
        chex.assert_trees_all_equal_shapes_and_dtypes(mixed_W, tree_W)
        for name, leaf_W in tree_W.items():
            wide_W = np.asarray(leaf_W, np.float64)
            expected_W = 0.75 * wide_W + 0.25 * wide_W[senders]
            tolerance = 2.0**-8 if leaf_W.dtype == jnp.bfloat16 else 1e-6
            actual_W = np.asarray(mixed_W[name], np.float64)
            np.testing.assert_allclose(actual_W, expected_W, rtol=tolerance, atol=1e-6)


def test_mixing_of_bfloat16_accumulates_in_float32():
    # 1 + 2^-8 is not a bfloat16: a sum in bfloat16 would lose the small term three times over.
    def combine(own, received):
        return own + received * 2**-8 + received * 2**-8 - received * 2**-8

    params_W = jnp.asarray([[1.0], [2.0]], jnp.bfloat16)
    step = on_one_device(lambda x, branch: mix(x, branch, combine, xor_bank(2), WORKER))
    expected_W = jnp.asarray([[1 + 2 * 2**-8], [2 + 2**-8]], jnp.float32).astype(jnp.bfloat16)
    chex.assert_trees_all_equal(step(params_W, np.int32(1)), expected_W)


def test_branch_0_does_not_touch_the_parameters():
    bank = xor_bank(4)

    def step(tree, branch):
        return mix(tree, branch, lambda own, received: own * jnp.nan, bank, WORKER)

    tree_W = make_tree(4)
    for run in (on_one_device(step), on_a_device_each(step, 4)):
        chex.assert_trees_all_equal(run(tree_W, np.int32(0)), tree_W)


def compile_mix(workers, params_W, bank):
    def step(params, branch):
        return mix(params, branch, lambda own, received: (own + received) / 2, bank, WORKER)

    run = on_a_device_each(step, workers, donate_argnums=0)
    return run.lower(params_W, np.int32(1)).compile()


def test_the_program_holds_one_collective_permute_a_branch_and_group_and_gathers_nothing():
    bank = xor_bank(8)
    params_W = {  # two groups: rows of 16 (three arrays in one message) and rows of 32
        "up": jnp.ones((8, 64, 16)),
        "layers": jnp.ones((8, 4, 16, 16)),
        "norm": jnp.ones((8, 4, 16)),
        "down": jnp.ones((8, 16, 32)),
    }
    text = compile_mix(8, params_W, bank).as_text()
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
