"""LoRA adapters: how they start, what merging makes of them, and their PEFT folder."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import numpy_llama
import pytest
from safetensors.numpy import load_file, save_file

from persyn_jax.config import ConfigError
from persyn_jax.models import adapters, decoder, weights
from persyn_jax.models import folder as folders
from persyn_jax.models.adapters import Adapters
from persyn_jax.models.spec import ModelConfig

CONFIG = numpy_llama.small_config(tied=True)
PHI3 = dataclasses.replace(CONFIG, family="phi3")
PARAMS = numpy_llama.random_params(CONFIG, seed=1)
PARITY = Path(__file__).parent / "parity"
ALL = ("q", "k", "v", "o", "gate", "up", "down")


def random_adapters(targets=ALL, rank=3, alpha=6, config=CONFIG) -> Adapters:
    """None of their entries 0, so that all of them count."""
    rng = np.random.default_rng(2)
    shapes = adapters.adapter_shapes(config, rank, targets)
    drawn = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)
    return Adapters(drawn, alpha)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens_BT):
    segments_BT = np.ones(tokens_BT.shape, np.int32)
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    attend = decoder.attend_causally(segments_BT)
    hidden_BTD, _ = decoder.hidden_states(config, params, tokens_BT, positions_BT, attend)
    return decoder.logits(config, params, hidden_BTD)


def test_merged_parameters_say_what_adapters_do():
    found = random_adapters()
    assert found.scale == 2
    tokens_BT = np.random.default_rng(0).integers(0, 31, (3, 13)).astype(np.int32)
    adapted = dataclasses.replace(CONFIG, lora_scale=found.scale)
    beside = logits_of(adapted, adapters.with_adapters(PARAMS, found.params), tokens_BT)
    within = logits_of(CONFIG, adapters.merge(PARAMS, found), tokens_BT)
    spread = np.abs(beside).max()
    np.testing.assert_allclose(within, beside, rtol=0, atol=1e-5 * spread)
    assert np.abs(beside - logits_of(CONFIG, PARAMS, tokens_BT)).max() > 0.1 * spread


def test_merging_leaves_what_has_no_adapter_alone():
    before = jax.tree.map(np.copy, PARAMS)
    merged = adapters.merge(PARAMS, random_adapters(("v", "down")))
    changed = {
        jax.tree_util.keystr(path)
        for path, same in jax.tree.leaves_with_path(jax.tree.map(np.array_equal, merged, before))
        if not same
    }
    assert changed == {"['layers']['v']['kernel']", "['layers']['down']['kernel']"}
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, PARAMS, before)))


def test_new_adapters_change_nothing_and_are_drawn_by_name():
    start = functools.partial(adapters.init_adapters, CONFIG, 4, purpose="test")
    made = start(("q", "down"), seed=0)["layers"]
    for part, width in (("q", CONFIG.d_model), ("down", CONFIG.d_ff)):
        assert not made[part]["lora_b"].any()
        assert made[part]["lora_a"].shape == (CONFIG.layers, 4, width)
        # Uniform within 1 / sqrt(in): a standard deviation of that over the square root of 3.
        assert np.abs(made[part]["lora_a"]).max() <= width**-0.5
        assert made[part]["lora_a"].std() == pytest.approx((3 * width) ** -0.5, rel=0.2)
    alone, other = start(("down",), seed=0)["layers"], start(("down",), seed=1)["layers"]
    np.testing.assert_array_equal(alone["down"]["lora_a"], made["down"]["lora_a"])
    assert not np.array_equal(alone["down"]["lora_a"], other["down"]["lora_a"])


@pytest.fixture
def folder(tmp_path):
    adapters.write_adapters(tmp_path / "adapter", random_adapters(), CONFIG, "owner/base", "abc")
    return tmp_path / "adapter"


def test_round_trip_is_bitwise(folder):
    expected, found = random_adapters(), adapters.read_adapters(folder, CONFIG)
    assert found.alpha == expected.alpha
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_the_folder_is_as_peft_documents_it(tmp_path):
    """Keys of a checkpoint and of its config, from PEFT's own guide to them, version 0.20."""
    found = random_adapters(("q", "down"))
    adapters.write_adapters(tmp_path, found, CONFIG, "owner/base", None)
    layers = found.params["layers"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    assert set(tensors) == {
        stem.format(layer, module, factor)
        for layer in range(CONFIG.layers)
        for module in ("self_attn.q_proj", "mlp.down_proj")
        for factor in "AB"
    }
    for layer in range(CONFIG.layers):
        lora_a = tensors[stem.format(layer, "mlp.down_proj", "A")]  # [r, in]
        lora_b = tensors[stem.format(layer, "mlp.down_proj", "B")]  # [out, r]
        assert lora_a.shape == (3, CONFIG.d_ff)
        np.testing.assert_array_equal(lora_a, layers["down"]["lora_a"][layer])
        np.testing.assert_array_equal(lora_b, layers["down"]["lora_b"][layer])
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "owner/base",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["down_proj", "q_proj"],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
    }
    assert expected.items() <= described.items()


@pytest.mark.parametrize(
    ("family", "targets"), [("llama", {"q", "down"}), ("phi3", {"q", "k", "v", "gate", "up", "o"})]
)
def test_an_adapter_of_peft_is_read_and_written_alike(family, targets, tmp_path):
    """Recorded by `parity/record_parity.py`: PEFT's folder, and what torch said with it."""
    base = PARITY / family
    config = folders.read_config(base)
    params = weights.folder_params(base, config)
    found = adapters.read_adapters(base / "adapter", config)
    assert (found.alpha, found.scale) == (6, 3)
    assert found.params["layers"].keys() == targets
    adapted = dataclasses.replace(config, lora_scale=found.scale)
    tokens_BT = np.load(base / "expected.npz")["tokens"]
    logits_BTV = logits_of(adapted, adapters.with_adapters(params, found.params), tokens_BT)
    expected_BTV = np.load(base / "adapter" / "logits.npz")["logits"]
    np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=0, atol=1e-4)
    adapters.write_adapters(tmp_path, found, config, family, None)
    name = "adapter_model.safetensors"
    ours, theirs = load_file(tmp_path / name), load_file(base / "adapter" / name)
    assert ours.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    ours, theirs = (
        json.loads((path / "adapter_config.json").read_text())
        for path in (tmp_path, base / "adapter")
    )
    assert sorted(theirs["target_modules"]) == ours.pop("target_modules")
    assert ours.items() <= theirs.items()


def described_as(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without(name):
    return lambda folder: (folder / name).unlink()


def rewritten(change):
    def rewrite(folder):
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return rewrite


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q1 = Q0.replace(".0.", ".1.")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without("adapter_config.json"), "adapter_config.json: not readable"),
        (without("adapter_model.safetensors"), "holds no .*safetensors"),
        (described_as(use_dora=True), "use_dora is True, must be False"),
        (described_as(rank_pattern={"q_proj": 4}), "rank_pattern is .*, must be {}"),
        (described_as(peft_type="IA3"), "peft_type is 'IA3', must be 'LORA'"),
        (described_as(r=0), "r is 0, must be an integer from 1"),
        (described_as(r=4), r"shape \(3, 40\), expected \(4, 40\)"),
        (described_as(lora_alpha=-1), "lora_alpha is -1"),
        (rewritten(lambda t: {n: a for n, a in t.items() if n != Q1}), f"'{Q1}' is missing"),
        (rewritten(lambda t: t | {"other": t[Q0]}), "'other' has no place"),
        (rewritten(lambda t: {"other": t[Q0]}), "holds no adapter of a llama decoder"),
    ],
)
def test_a_damaged_folder_is_one_line(folder, damage, named):
    damage(folder)
    with pytest.raises(ConfigError, match=named) as caught:
        adapters.read_adapters(folder, CONFIG)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.fixture
def fused(tmp_path):
    adapters.write_adapters(tmp_path / "fused", random_adapters(config=PHI3), PHI3, "phi3", None)
    return tmp_path / "fused"


def test_a_fused_kernel_has_the_adapters_of_its_parts_side_by_side(tmp_path):
    """As PEFT merges: W + lora_alpha / r lora_B lora_A of the fused tensors. Whole numbers, so that
    their products are exact in any order."""
    shapes = adapters.adapter_shapes(PHI3, 3, ALL)
    rng = np.random.default_rng(3)
    drawn = jax.tree.map(lambda s: rng.integers(1, 5, s.shape).astype(np.float32), shapes)
    found = Adapters(drawn, 6)
    adapters.write_adapters(tmp_path, found, PHI3, "phi3", None)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert (described["r"], described["rank_pattern"]) == (3, {"qkv_proj": 9, "gate_up_proj": 6})
    written = load_file(tmp_path / "adapter_model.safetensors")
    before = folders.tensors(PHI3, PARAMS)
    after = folders.tensors(PHI3, adapters.merge(PARAMS, found))
    stem = "base_model.model.{}.lora_{}.weight"
    for name in after:
        module = name.removesuffix(".weight")
        pattern = module.rpartition(".")[2]
        if pattern not in described["target_modules"]:
            np.testing.assert_array_equal(after[name], before[name])
            continue
        lora_a, lora_b = (written.pop(stem.format(module, factor)) for factor in "AB")
        rank = described["rank_pattern"].get(pattern, described["r"])
        scale = described["alpha_pattern"].get(pattern, described["lora_alpha"]) / rank
        assert (lora_a.shape[0], lora_b.shape[1], scale) == (rank, rank, 2)
        np.testing.assert_array_equal(after[name], before[name] + scale * lora_b @ lora_a)
    assert not written, "nothing else"


def test_a_fused_round_trip_is_bitwise(fused):
    expected, found = random_adapters(config=PHI3), adapters.read_adapters(fused, PHI3)
    assert found.alpha == expected.alpha
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def dense(tensors):
    """As PEFT's own training would leave it: one adapter of the whole."""
    return {name: array + 1 if "qkv" in name else array for name, array in tensors.items()}


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (rewritten(dense), "lora_B of self_attn.qkv_proj is not block-diagonal"),
        (described_as(rank_pattern={}), "rank_pattern is {}, must be {.*'qkv_proj': 9"),
        (described_as(alpha_pattern=None), "alpha_pattern is None, must be {.*'qkv_proj': 18"),
    ],
)
def test_a_fused_adapter_that_is_not_of_its_parts_is_one_line(fused, damage, named):
    damage(fused)
    with pytest.raises(ConfigError, match=named):
        adapters.read_adapters(fused, PHI3)


def test_an_adapter_of_a_part_of_a_fused_kernel_is_refused():
    adapters.adapter_shapes(PHI3, 2, ("o", "down", "up", "gate"))
    with pytest.raises(ConfigError, match=r"lora.targets: gate, up are one .* 'up' is missing"):
        adapters.adapter_shapes(PHI3, 2, ("o", "gate"))


@pytest.mark.parametrize("read", [weights.load, weights.load_tokenizer, weights.load_config])
def test_an_adapter_is_no_model(folder, read):
    with pytest.raises(ConfigError, match="a PEFT adapter of 'owner/base', not a whole model"):
        read(ModelConfig(weights=str(folder)))
