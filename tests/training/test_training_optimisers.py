"""Optimisers by name: their learning rates, their steps against NumPy, and how they see a tree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from training_tiny import tiny_params

from persyn_jax.config import ConfigError, validate
from persyn_jax.mesh import FSDP, TENSOR, WORKER, make_mesh
from persyn_jax.models import decoder
from persyn_jax.training.config import OptimiserConfig
from persyn_jax.training.optimisers import learning_rate, make_optimiser

NAMES = ["adamw", "adafactor", "muon", "sgd"]
# A constant rate of 1, no clipping, no decay: a step is the optimiser's own.
BARE = OptimiserConfig(
    learning_rate=1.0, schedule="constant", warmup_fraction=0.0, clip_norm=None, eps=1e-12
)


def bare(name: str, **changes) -> OptimiserConfig:
    eps = BARE.eps if name in ("adamw", "muon") else 1e-8
    return dataclasses.replace(BARE, name=name, eps=eps, **changes)


def steps_of(config: OptimiserConfig, gradients, params=None) -> list:
    """The updates that follow one another on these gradients; `params` stay as they are."""
    optimiser = make_optimiser(config, len(gradients))
    params = jax.tree.map(jnp.zeros_like, gradients[0]) if params is None else params
    state, updates, update_of = optimiser.init(params), [], jax.jit(optimiser.update)
    for gradient in gradients:
        update, state = update_of(gradient, state, params)
        updates.append(jax.tree.map(np.asarray, update))
    return updates


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def random_like(tree, seed: int):
    return jax.tree.map(lambda leaf: draw(*leaf.shape, seed=seed), tree)


def rates(config: OptimiserConfig, steps: int) -> np.ndarray:
    schedule = learning_rate(config, steps)
    return np.array([float(schedule(step)) for step in range(steps)])


def test_learning_rate_rises_linearly_and_falls_like_a_cosine():
    config = OptimiserConfig(learning_rate=0.5, warmup_fraction=0.2, end_fraction=0.1)
    t = np.arange(20)
    fall = 0.1 + 0.9 * (1 + np.cos(np.pi * (t - 4) / 16)) / 2
    expected = 0.5 * np.where(t < 4, (t + 1) / 4, fall)
    np.testing.assert_allclose(rates(config, 20), expected, rtol=1e-5)


def test_a_constant_learning_rate_stays_after_warm_up():
    config = OptimiserConfig(learning_rate=0.5, warmup_fraction=0.3, schedule="constant")
    expected = 0.5 * np.minimum(1, np.arange(1, 11) / 3)
    np.testing.assert_allclose(rates(config, 10), expected, rtol=1e-6)


@settings(max_examples=40)
@given(
    steps=st.integers(1, 30),
    fraction=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "constant"]),
)
def test_no_step_of_any_training_is_wasted_and_none_exceeds_the_peak(steps, fraction, schedule):
    config = OptimiserConfig(learning_rate=0.5, warmup_fraction=fraction, schedule=schedule)
    found = rates(config, steps)
    assert (found > 0).all()
    assert found.max() == pytest.approx(0.5)
    peak = found.argmax()
    assert (np.diff(found[: peak + 1]) > 0).all()
    assert (np.diff(found[peak:]) <= 0).all()


def test_gradients_are_clipped_by_their_global_norm():
    """3, 4, 12 has norm 13. By plain gradient descent the step is the clipped gradient."""
    gradient = {"a": jnp.array([3.0, 4.0]), "b": jnp.array(-12.0)}
    for clip_norm, share in ((2.0, 2 / 13), (20.0, 1.0), (None, 1.0)):
        config = bare("sgd", clip_norm=clip_norm, momentum=0.0)
        (update,) = steps_of(config, [gradient])
        np.testing.assert_allclose(update["a"], np.array([-3, -4]) * share, rtol=1e-6)
        np.testing.assert_allclose(update["b"], 12 * share, rtol=1e-6)


def test_adamw_is_adam_with_its_two_moments():
    gradients = [draw(3, 2, seed=seed) for seed in range(4)]
    found = steps_of(bare("adamw", b1=0.8, b2=0.9), gradients)
    mean = square = np.zeros((3, 2))
    for t, (gradient, update) in enumerate(zip(gradients, found, strict=True), 1):
        mean, square = 0.8 * mean + 0.2 * gradient, 0.9 * square + 0.1 * gradient**2
        expected = -mean / (1 - 0.8**t) / np.sqrt(square / (1 - 0.9**t))
        np.testing.assert_allclose(update, expected, rtol=1e-4)


def test_sgd_looks_ahead_along_its_momentum():
    gradients = [draw(3, 2, seed=seed) for seed in range(4)]
    velocity = np.zeros((3, 2))
    for gradient, update in zip(gradients, steps_of(bare("sgd"), gradients), strict=True):
        velocity = 0.9 * velocity + gradient
        np.testing.assert_allclose(update, -(gradient + 0.9 * velocity), rtol=1e-5)


def test_adafactor_keeps_row_and_column_means_of_squares():
    """Algorithm 4 of arXiv 1804.04235 with an absolute step."""
    gradients = [draw(130, 140, seed=seed) * (1 + draw(130, 1)) for seed in range(3)]
    row, column = np.zeros((130, 1)), np.zeros((1, 140))
    for t, (gradient, update) in enumerate(
        zip(gradients, steps_of(bare("adafactor"), gradients), strict=True), 1
    ):
        square, old = np.float64(gradient) ** 2, 1 - t**-0.8
        row = old * row + (1 - old) * square.mean(axis=1, keepdims=True)
        column = old * column + (1 - old) * square.mean(axis=0, keepdims=True)
        step = gradient / np.sqrt(row * column / row.mean())
        step /= max(1, np.sqrt((step**2).mean()))
        np.testing.assert_allclose(update, -step, rtol=1e-4, atol=1e-5)


def test_muon_makes_the_steps_of_matrices_orthogonal_and_leaves_the_rest_to_adam():
    params = decoder.unroll(tiny_params())
    names = ("q", "down", "attention_norm", "mlp_norm")
    params |= {"layers": ({name: params["layers"][0][name] for name in names},)}
    gradient = random_like(params, seed=1)
    (muon,) = steps_of(bare("muon"), [gradient], params)
    (adam,) = steps_of(bare("adamw"), [gradient], params)
    for layer in muon["layers"]:
        for name in ("q", "down"):
            kernel = layer[name]["kernel"]
            # Five Newton-Schulz steps bring every singular value near 1, not onto it.
            size = np.linalg.svd(kernel, compute_uv=False) / (0.2 * np.sqrt(max(kernel.shape)))
            assert size.min() > 0.5, name
            assert size.max() < 1.3, name
    for group in ("embed", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, muon[group], adam[group])
    for layer, by_adam in zip(muon["layers"], adam["layers"], strict=True):
        for name in ("attention_norm", "mlp_norm"):
            np.testing.assert_array_equal(layer[name]["scale"], by_adam[name]["scale"])


def test_muon_leaves_heads_to_adam():
    params = {"kernel": draw(5, 3), "bias": draw(5)}, {"head": {"kernel": draw(7, 3)}}
    for tree in params:
        gradient = random_like(tree, seed=2)
        found, expected = (steps_of(bare(name), [gradient], tree) for name in ("muon", "adamw"))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def wide_params() -> dict:
    """Layers large enough to be factored, beside vectors and a head."""
    return {
        "embed": {"embedding": draw(150, 130)},
        "layers": {
            "up": {"kernel": draw(2, 140, 130), "bias": draw(2, 140)},
            "mlp_norm": {"scale": draw(2, 130)},
        },
        "final_norm": {"scale": draw(130)},
        "head": {"kernel": draw(150, 130)},
    }


@pytest.mark.parametrize("name", NAMES)
def test_stacked_and_unrolled_layers_take_the_same_steps(name):
    config = bare(name, weight_decay=0.1, clip_norm=3.0)
    stacked = wide_params()
    # One layer's gradient is far longer: what is per matrix must not see its neighbour's.
    gradients = [random_like(stacked, seed) for seed in range(3)]
    for gradient in gradients:
        gradient["layers"]["up"]["kernel"][1] *= 100
        gradient["layers"]["mlp_norm"]["scale"][0] *= 100
    unrolled = [decoder.unroll(gradient) for gradient in gradients]
    found = steps_of(config, gradients, stacked)
    expected = steps_of(config, unrolled, decoder.unroll(stacked))
    for one, other in zip(found, expected, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            decoder.unroll(one),
            other,
        )


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_spares_norms_and_biases_and_goes_with_the_learning_rate(name):
    config = bare(name, weight_decay=0.25)
    config = dataclasses.replace(config, learning_rate=0.5)
    params = wide_params()
    (update,) = steps_of(config, [jax.tree.map(np.zeros_like, params)], params)
    shrunk = {"embedding", "kernel"}
    for path, leaf in jax.tree.leaves_with_path(update):
        before = params
        for key in path:
            before = before[key.key]
        expected = -0.125 * before if path[-1].key in shrunk else np.zeros_like(before)
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, err_msg=str(path))


@pytest.mark.parametrize("name", NAMES)
def test_an_update_keeps_dtypes_and_shapes_and_compiles_once_for_all_workers(name):
    """optax's contract, under the vmap that puts many workers on one device."""
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), tiny_params())
    optimiser = make_optimiser(OptimiserConfig(name=name, weight_decay=0.1), 5)
    state = jax.vmap(optimiser.init)(params)
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (params, state))

    @jax.jit
    def step(params, state, gradients):
        updates, state = jax.vmap(optimiser.update)(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(3):
        params, state = step(params, state, random_like(params, seed))
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (params, state)) == described
    assert step._cache_size() == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", NAMES)
def test_a_worker_in_shards_takes_the_steps_of_a_whole_one(name):
    """Norms, row means and orthogonal steps are those of whole matrices, however they lie."""
    mesh = make_mesh(workers=2, fsdp=2, tensor=2)
    optimiser = make_optimiser(bare(name, clip_norm=0.5, weight_decay=0.1), 2)
    params = {"layers": {"up": {"kernel": draw(2, 3, 128, 132)}}, "head": {"kernel": draw(2, 8, 4)}}
    gradients = [random_like(params, seed) for seed in range(2)]
    shards = NamedSharding(mesh, PartitionSpec(WORKER, None, FSDP, TENSOR))
    heads = NamedSharding(mesh, PartitionSpec(WORKER, FSDP, TENSOR))
    placing = {"layers": {"up": {"kernel": shards}}, "head": {"kernel": heads}}

    def two_steps(params, *gradients):
        state = optimiser.init(params)
        for gradient in gradients:
            update, state = optimiser.update(gradient, state, params)
        return update

    def of_one(*trees):
        return jax.tree.map(
            lambda leaf: leaf[None],
            two_steps(*jax.tree.map(lambda leaf: leaf[0], trees)),
        )

    row = PartitionSpec(WORKER)
    sharded = jax.shard_map(of_one, mesh=mesh, in_specs=row, out_specs=row, axis_names={WORKER})
    found = jax.jit(sharded)(*(jax.device_put(tree, placing) for tree in (params, *gradients)))
    expected = jax.jit(jax.vmap(two_steps))(params, *gradients)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_optimiser_comes_down_a_slope(name):
    target = 0.3 * draw(6, 4)
    params = {"layers": ({"up": {"kernel": jnp.zeros((6, 4))}},)}
    config = OptimiserConfig(name=name, learning_rate=0.05, clip_norm=None)
    optimiser = make_optimiser(config, 100)
    state = optimiser.init(params)

    def loss(params):
        return jnp.sum((params["layers"][0]["up"]["kernel"] - target) ** 2) / 2

    @jax.jit
    def step(params, state):
        updates, state = optimiser.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    before = loss(params)
    for _ in range(100):
        params, state = step(params, state)
    assert loss(params) < before / 10


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"name": "lion"}, "name: input should be 'adamw', 'adafactor', 'muon' or 'sgd'"),
        ({"momentum": 0.9}, "momentum 0.9: adamw has none (sgd and muon do)"),
        ({"name": "adafactor", "momentum": 0.5}, "momentum 0.5: adafactor has none"),
        ({"name": "sgd", "b2": 0.95}, "b1, b2, eps: sgd has none (adamw and muon do)"),
        ({"schedule": "constant", "end_fraction": 0.1}, "end_fraction 0.1: a constant schedule"),
        ({"clip_norm": 0}, "clip_norm: input should be greater than 0"),
    ],
)
def test_what_does_not_go_together_is_refused(values, complaint):
    with pytest.raises(ConfigError) as refused:
        validate(OptimiserConfig, values, where="x.yaml")
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)
