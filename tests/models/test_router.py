"""The coefficient head and the router's folder."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from persyn_jax.config import ConfigError
from persyn_jax.models import adapters, router, weights
from persyn_jax.models.router import Router
from persyn_jax.models.spec import ModelConfig

TEACHERS = ["plain", "shown", "terse"]
RNG = np.random.default_rng(0)
HEAD = {
    "kernel": RNG.normal(size=(3, 8)).astype(np.float32),
    "bias": RNG.normal(size=3).astype(np.float32),
}
STATE_ND = RNG.normal(size=(5, 8)).astype(np.float32)
TINY = ModelConfig(weights="random:tiny")


@pytest.fixture
def folder(tmp_path):
    router.save_router(tmp_path / "router", Router(HEAD, STATE_ND), TEACHERS, TINY)
    return tmp_path / "router"


def test_a_coefficient_is_linear_in_the_state():
    expected = STATE_ND.astype(np.float64) @ HEAD["kernel"].T + HEAD["bias"]
    np.testing.assert_allclose(router.coefficients(HEAD, STATE_ND), expected, atol=1e-5)


def test_an_untrained_head_prefers_nobody():
    head = router.init_head(teachers=3, d_model=8)
    assert {name: array.shape for name, array in head.items()} == {"kernel": (3, 8), "bias": (3,)}
    np.testing.assert_array_equal(router.coefficients(head, STATE_ND), np.zeros((5, 3)))


def test_round_trip_is_bitwise(folder):
    head, teachers, state_ND = router.load_router(folder)
    assert teachers == TEACHERS
    assert head.keys() == HEAD.keys()
    for name, array in HEAD.items():
        np.testing.assert_array_equal(head[name], array)
    np.testing.assert_array_equal(state_ND, STATE_ND)


def trained_adapters(model):
    shapes = adapters.adapter_shapes(model.config, 2, ("q", "down"))
    draw = jax.tree.map(lambda s: RNG.normal(0, 0.1, s.shape).astype(np.float32), shapes)
    return adapters.Adapters(draw, 4)


def test_a_backbone_that_was_frozen_is_that_of_the_config(folder):
    expected, found = weights.load(TINY, 3), router.load_backbone(folder, TINY, 3)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_a_backbone_comes_back_with_what_it_learned(tmp_path):
    model = weights.load(TINY, 3)
    learned = trained_adapters(model)
    expected = adapters.merge(model.params, learned)
    whole = dataclasses.replace(model, params=expected)
    for name, backbone in (("lora", learned), ("full", whole)):
        router.save_router(tmp_path / name, Router(HEAD, STATE_ND, backbone), TEACHERS, TINY)
        found = router.load_backbone(tmp_path / name, TINY, 3)
        jax.tree.map(np.testing.assert_array_equal, found.params, expected)
        text = "<|im_start|>user hello"
        assert found.tokenizer.encode(text) == model.tokenizer.encode(text)
        assert found.tokenizer.chat_template == model.tokenizer.chat_template
        assert router.load_router(tmp_path / name)[1] == TEACHERS
    size = {name: sum(f.stat().st_size for f in (tmp_path / name).rglob("*.safetensors"))
            for name in ("lora", "full")}  # fmt: skip
    assert size["lora"] < size["full"] / 3, "adapters alone"


def test_a_backbone_whose_adapter_is_lost_is_named(tmp_path):
    learned = trained_adapters(weights.load(TINY))
    router.save_router(tmp_path, Router(HEAD, STATE_ND, learned), TEACHERS, TINY)
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"adapter_config\.json: not readable"):
        router.load_backbone(tmp_path, TINY, 0)
    (tmp_path / "router.json").write_text(json.dumps({"teachers": TEACHERS, "train": "some"}))
    with pytest.raises(ConfigError, match="train is 'some', must be frozen, lora or full"):
        router.load_backbone(tmp_path, TINY, 0)


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-3])


def other_teachers(folder):
    (folder / "router.json").write_text(json.dumps({"teachers": ["only"]}))


def no_bias(folder):
    save_file({"kernel": HEAD["kernel"]}, folder / "head.safetensors")


def flat_kernel(folder):
    save_file(HEAD | {"kernel": HEAD["bias"]}, folder / "head.safetensors")


def narrow_states(folder):
    save_file({"states": STATE_ND[:, :4].copy()}, folder / "calibration_states.safetensors")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (remove("router.json"), "router.json"),
        (cut("router.json"), "router.json"),
        (remove("head.safetensors"), "head.safetensors"),
        (cut("head.safetensors"), "head.safetensors"),
        (no_bias, "head.safetensors.*bias"),
        (cut("calibration_states.safetensors"), "calibration_states.safetensors"),
        (other_teachers, r"kernel \(3, 8\).*for 1 teachers"),
        (flat_kernel, r"kernel \(3,\)"),
        (narrow_states, r"states \(5, 4\)"),
    ],
)
def test_a_damaged_router_is_named(folder, damage, named):
    damage(folder)
    with pytest.raises(ConfigError, match=named) as caught:
        router.load_router(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
