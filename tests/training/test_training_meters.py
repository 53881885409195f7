"""Meters: FLOPs against the compiler's own count, rows against arithmetic, the clock, a profile."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persyn_jax import gossip
from persyn_jax.config import ConfigError, validate
from persyn_jax.mesh import WORKER
from persyn_jax.models import decoder
from persyn_jax.models.adapters import adapter_shapes
from persyn_jax.models.decoder import DecoderConfig
from persyn_jax.models.weights import RANDOM_TINY
from persyn_jax.training import meters
from persyn_jax.training.config import TrainConfig
from persyn_jax.training.losses import response_loss
from persyn_jax.training.memory import batch_shapes
from persyn_jax.training.profiling import profiled

MODEL = dataclasses.replace(
    RANDOM_TINY, vocab_size=1024, layers=3, d_model=256, d_ff=512, head_dim=64
)


@pytest.mark.parametrize(("row_tokens", "responses"), [(64, 64), (512, 16)])
def test_model_flops_are_what_the_compiler_counts(row_tokens, responses):
    """Of the gradient of the real loss, every token real. It counts elementwise work, too, which is
    a few per cent; attention to the past alone it computes whole, as the formula counts it."""
    config = TrainConfig(rows=2, row_tokens=row_tokens, row_response_tokens=responses)
    params = jax.eval_shape(
        lambda: decoder.unroll(decoder.init(MODEL, jax.random.key(0)))  # a scan is counted once
    )
    gradient = jax.grad(functools.partial(response_loss, MODEL, "nothing"), has_aux=True)
    counted = jax.jit(gradient).lower(params, batch_shapes(config)).cost_analysis()["flops"]
    found = meters.training_flops(MODEL, 2 * row_tokens, 2 * responses, row_tokens)
    assert 0.85 * counted < found < counted


def test_model_flops_of_adapters_are_what_the_compiler_counts():
    """Of a gradient that reaches adapters alone. The formula has it go through the first layer's
    input as well, which is not needed."""
    config = TrainConfig(rows=2, row_tokens=64, row_response_tokens=64)
    unrolled = jax.eval_shape(lambda: decoder.unroll(decoder.init(MODEL, jax.random.key(0))))
    lora = adapter_shapes(MODEL, 16, ("q", "v", "o", "down"))["layers"]

    def layers_of(stack):  # one dict a layer, as the base has them
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stack)

    def loss(adapters, batch, base):
        both = zip(base["layers"], adapters, strict=True)
        layers = (
            {part: leaves | own.get(part, {}) for part, leaves in layer.items()}
            for layer, own in both
        )
        return response_loss(MODEL, "nothing", base | {"layers": tuple(layers)}, batch)

    adapters = [layers_of(lora)] * MODEL.layers
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    lowered = gradient.lower(adapters, batch_shapes(config), unrolled)
    size = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    found = meters.training_flops(MODEL, 128, 128, 64, size)
    counted = lowered.cost_analysis()["flops"]
    assert 0.85 * counted < found < 1.05 * counted
    assert found < 0.8 * meters.training_flops(MODEL, 128, 128, 64)


def test_flops_of_a_qwen_by_hand():
    """Qwen2.5-0.5B: 357,826,560 parameters in matrices of layers; 14 heads of 64, 24 layers."""
    qwen = DecoderConfig(
        vocab_size=151936,
        layers=24,
        d_model=896,
        d_ff=4864,
        heads=14,
        kv_heads=2,
        head_dim=64,
        rope_theta=1e6,
        norm_eps=1e-6,
        tied_embeddings=True,
        max_positions=32768,
    )
    a_token = 6 * 357826560 + 12 * 24 * 14 * 64 * 1024
    assert meters.training_flops(qwen, 1000, 0, 1024) == 1000 * a_token
    a_response = 6 * 151936 * 896
    assert meters.training_flops(qwen, 1000, 10, 1024) == 1000 * a_token + 10 * a_response


def test_a_window_shortens_local_layers_only():
    full = meters.training_flops(MODEL, 1, 0, 512)
    windowed = dataclasses.replace(MODEL, window=128, local_layers=(True, False, True))
    saved = full - meters.training_flops(windowed, 1, 0, 512)
    assert saved == 12 * 4 * 64 * 2 * (512 - 128)
    assert meters.training_flops(dataclasses.replace(MODEL, window=128), 1, 0, 512) < full - saved
    assert meters.training_flops(dataclasses.replace(MODEL, window=600), 1, 0, 512) == full


def test_utilisation_is_a_part_of_the_published_peak_and_unknown_for_unknown_devices():
    assert meters.utilisation(98.94e12, 0.5, "NVIDIA H100 80GB HBM3", 2) == pytest.approx(0.1)
    assert meters.utilisation(197e12, 2.0, "TPU v5 lite", 1) == pytest.approx(0.5)
    assert meters.utilisation(1e12, 1.0, "cpu", 1) is None
    assert meters.utilisation(1e12, 1.0, "TPU v99", 1) is None


def test_a_row_splits_the_step_and_loses_no_second():
    seconds = {"input": 0.1, "compute": 0.7, "checkpoint": 0.2}
    row = meters.speed_row(seconds, 500, 197e12 / 4, "TPU v5e", 1, exchange_seconds=0.3)
    assert row == pytest.approx(
        {
            "step_seconds": 1.0,
            "input_seconds": 0.1,
            "compute_seconds": 0.4,
            "exchange_seconds": 0.3,
            "checkpoint_seconds": 0.2,
            "tokens_per_second": 500.0,
            "utilisation": 0.25,
        }
    )
    parts = ("input", "compute", "exchange", "checkpoint")
    assert sum(row[f"{part}_seconds"] for part in parts) == pytest.approx(row["step_seconds"])


def test_what_is_not_known_is_null_and_an_exchange_is_never_longer_than_its_program():
    row = meters.speed_row({"compute": 0.5}, 10, 1.0, "cpu", 1, exchange_seconds=None)
    assert (row["exchange_seconds"], row["utilisation"]) == (None, None)
    assert row["compute_seconds"] == 0.5
    hidden = meters.speed_row({"compute": 0.5}, 10, 1.0, "cpu", 1, exchange_seconds=0.8)
    assert (hidden["exchange_seconds"], hidden["compute_seconds"]) == (0.5, 0.0)
    assert meters.speed_row({}, 0, 0.0, "TPU v4", 1, None)["tokens_per_second"] is None


def test_the_clock_adds_up_by_part_also_when_a_body_fails():
    seconds: dict = {}
    for _ in range(2):
        with meters.timed(seconds, "input"):
            time.sleep(0.02)
    with pytest.raises(KeyError), meters.timed(seconds, "compute"):
        raise KeyError
    assert 0.04 <= seconds["input"] < 2
    assert 0 <= seconds["compute"] < 0.02


def test_an_exchange_alone_mixes_as_the_rule_says_and_takes_no_step():
    """Two workers that both push: GoSGD's parameters are the sender's and the receiver's mean."""
    schedule = gossip.gosgd_schedule(2, 4, 1.0, seed=0)
    mixing = gossip.gosgd(gossip.Exchange(schedule.bank, WORKER))
    params = {"w": jnp.array([[0.0, 2.0], [4.0, 8.0]])}
    state = jax.vmap(mixing.init, axis_name=WORKER, axis_size=2)(params)

    def alone(params, state, round):
        return mixing.update(jax.tree.map(jnp.zeros_like, params), state, params, round)

    exchange = jax.jit(jax.vmap(alone, (0, 0, None), axis_name=WORKER, axis_size=2))
    mixed, after = exchange(params, state, schedule.round(0))
    np.testing.assert_allclose(mixed["w"], [[2.0, 5.0], [2.0, 5.0]])
    np.testing.assert_allclose(np.sum(after.sum_weight), 1.0)
    assert 0 < meters.time_exchange(exchange, params, state, schedule.round(0)) < 1


def test_the_median_call_is_timed_and_the_first_is_not():
    pauses = iter([0.3, 0.0, 0.02, 0.3])
    assert 0.02 <= meters.time_exchange(lambda: time.sleep(next(pauses)), repeats=3) < 0.2


@pytest.mark.parametrize(("taken", "profiles"), [(range(5), 1), (range(2, 3), 1), (range(4, 6), 0)])
def test_a_profile_of_the_steps_asked_for_is_written(taken, profiles, tmp_path):
    with profiled(range(1, 4), tmp_path) as before_step:
        for number in taken:
            before_step(number)
            jax.block_until_ready(jnp.ones(3) + number)
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == profiles


def test_a_training_that_fails_while_profiled_keeps_the_profile(tmp_path):
    def train():
        with profiled(range(9), tmp_path) as before_step:
            before_step(0)
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        train()
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_profile_steps_are_a_range():
    assert validate(TrainConfig, {"profile_steps": "10:15"}, "x").profiled == range(10, 15)
    assert not TrainConfig().profiled
    for text, complaint in (("15:10", "'15:10': holds no step"), ("10", "should match pattern")):
        with pytest.raises(ConfigError, match=complaint):
            validate(TrainConfig, {"profile_steps": text}, "x")
