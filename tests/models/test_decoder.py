"""The decoder against its equations in NumPy, and its two layouts against each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import pytest

from persyn_jax.models import decoder

TOKENS_BT = np.random.default_rng(0).integers(0, 31, (3, 13)).astype(np.int32)


def positions(tokens_BT):
    return np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)


@functools.partial(jax.jit, static_argnums=(0, 4))
def forward(config, params, tokens_BT, segments_BT=None, recompute=False):
    segments_BT = np.ones_like(TOKENS_BT) if segments_BT is None else segments_BT
    attend = decoder.attend_causally(segments_BT)
    hidden_BTD, _ = decoder.hidden_states(
        config, params, tokens_BT, positions(tokens_BT), attend, recompute=recompute
    )
    return hidden_BTD


@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_equations_of_llama(tied):
    config = numpy_llama.small_config(tied)
    params = numpy_llama.random_params(config, seed=1)
    hidden_BTD = forward(config, params, TOKENS_BT)
    log_probabilities_BTV = jax.nn.log_softmax(decoder.logits(config, params, hidden_BTD))
    for row, tokens in enumerate(TOKENS_BT):
        expected = numpy_llama.hidden_states(config, params, tokens)
        np.testing.assert_allclose(hidden_BTD[row], expected, rtol=0, atol=2e-4)
        expected = numpy_llama.log_probabilities(config, params, tokens)
        np.testing.assert_allclose(log_probabilities_BTV[row], expected, rtol=0, atol=1e-3)


def test_random_parameters_have_the_documented_shapes():
    for tied in (True, False):
        config = numpy_llama.small_config(tied)
        wanted = jax.tree.map(np.shape, numpy_llama.random_params(config, seed=0))
        params = jax.eval_shape(functools.partial(decoder.init, config), jax.random.key(0))
        assert jax.tree.map(np.shape, params) == wanted
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_stacked_and_unrolled_layers_say_the_same():
    config = numpy_llama.small_config(tied=False)
    params = numpy_llama.random_params(config, seed=2)
    unrolled = decoder.unroll(params)
    assert len(unrolled["layers"]) == config.layers
    np.testing.assert_allclose(
        forward(config, params, TOKENS_BT), forward(config, unrolled, TOKENS_BT), rtol=0, atol=1e-5
    )


def test_the_gradient_through_recomputed_layers_is_the_difference_quotient():
    config = numpy_llama.small_config(tied=True)
    params, direction = (numpy_llama.random_params(config, seed) for seed in (2, 3))

    def loss(params):  # in float64
        return (numpy_llama.hidden_states(config, params, TOKENS_BT[0]) ** 2 / 2).sum()

    def moved(size):
        return jax.tree.map(lambda p, d: p.astype(np.float64) + size * d, params, direction)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(forward(config, params, TOKENS_BT, None, recompute=True)[0] ** 2) / 2

    products = jax.tree.map(np.vdot, gradient(params), direction)
    expected = (loss(moved(1e-5)) - loss(moved(-1e-5))) / 2e-5
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), expected, rtol=1e-3)


def test_a_token_sees_earlier_tokens_of_its_own_segment_only():
    config = numpy_llama.small_config(tied=True)
    params = numpy_llama.random_params(config, seed=3)
    segments_BT = np.array([[1] * 5 + [2] * 6 + [0] * 2], np.int32)
    before = np.asarray(forward(config, params, TOKENS_BT[:1], segments_BT))
    for changed in range(13):
        tokens_BT = TOKENS_BT[:1].copy()
        tokens_BT[0, changed] = (tokens_BT[0, changed] + 1) % 31
        differs_T = (np.asarray(forward(config, params, tokens_BT, segments_BT)) != before)[0].any(
            1
        )
        own = segments_BT[0] == segments_BT[0, changed]
        np.testing.assert_array_equal(differs_T, own & (np.arange(13) >= changed))


def test_each_layer_gets_its_own_memory_and_its_new_one_comes_back():
    config = numpy_llama.small_config(tied=True)
    params = decoder.unroll(numpy_llama.random_params(config, seed=4))
    causally = decoder.attend_causally(np.ones_like(TOKENS_BT))

    def attend(q, k, v, rule, memory):
        return causally(q, k, v, rule, None)[0], (memory + 1, k)

    @jax.jit
    def run(memory):
        place = positions(TOKENS_BT)
        return decoder.hidden_states(config, params, TOKENS_BT, place, attend, memory)

    hidden_BTD, memory = run((10, 20))
    assert [int(number) for number, _ in memory] == [11, 21]
    assert {keys.shape for _, keys in memory} == {(3, 13, config.kv_heads, config.head_dim)}
    np.testing.assert_allclose(hidden_BTD, forward(config, params, TOKENS_BT), rtol=0, atol=1e-5)


def test_stacked_layers_take_no_memory():
    config = numpy_llama.small_config(tied=True)
    params = numpy_llama.random_params(config, seed=0)
    attend = decoder.attend_causally(np.ones_like(TOKENS_BT))
    with pytest.raises(ValueError, match="unroll"):
        decoder.hidden_states(
            config, params, TOKENS_BT, positions(TOKENS_BT), attend, memory=(None,) * 2
        )


def test_an_adapter_adds_its_product_to_the_kernel():
    config = dataclasses.replace(numpy_llama.small_config(tied=True), lora_scale=0.5)
    params = numpy_llama.random_params(config, seed=5)
    rng = np.random.default_rng(6)
    adapted, merged = dict(params["layers"]), dict(params["layers"])
    for name in ("q", "o", "down"):
        kernel = params["layers"][name]["kernel"]
        depth, wide, narrow = kernel.shape
        a_Lri, b_Lor = (
            rng.normal(0, 0.3, s).astype(np.float32) for s in ((depth, 3, narrow), (depth, wide, 3))
        )
        adapted[name] = {"kernel": kernel, "lora_a": a_Lri, "lora_b": b_Lor}
        merged[name] = {"kernel": kernel + 0.5 * b_Lor @ a_Lri}
    found, expected = (
        forward(config, params | {"layers": layers}, TOKENS_BT) for layers in (adapted, merged)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
