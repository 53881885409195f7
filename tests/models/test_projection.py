import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persyn_jax.models.projection import project, project_few


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), inner=st.integers(1, 70), outer=st.integers(1, 50))
def test_few_rows_are_multiplied_as_many_are(rows, inner, outer):
    rng = np.random.default_rng([rows, inner, outer])
    x_RI, kernel_OI = rng.normal(size=(rows, inner)), rng.normal(size=(outer, inner))
    x = jnp.asarray(x_RI, jnp.float32)[:, None]
    found = jax.jit(project_few)(x, jnp.asarray(kernel_OI, jnp.float32))
    assert found.shape == (rows, 1, outer)
    np.testing.assert_allclose(found[:, 0], x_RI @ kernel_OI.T, rtol=2e-5, atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(own=st.integers(0, 7), seed=st.integers(0, 2**16))
def test_a_row_does_not_depend_on_the_others(own, seed):
    rng = np.random.default_rng(seed)
    kernel_OI = jnp.asarray(rng.normal(size=(50, 64)), jnp.float32)
    among = rng.normal(size=(8, 64)).astype(np.float32)
    others = rng.normal(size=(8, 64)).astype(np.float32)
    others[own] = among[own]
    multiply = jax.jit(project_few)
    assert np.array_equal(multiply(among, kernel_OI)[own], multiply(others, kernel_OI)[own])


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_bfloat16_is_summed_in_float32(dtype):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((8, 600), (32, 600)))
    found = jax.jit(project_few, static_argnums=2)(x, kernel, dtype)
    assert found.dtype == (dtype or jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    rounding = 1e-5 if dtype else 2**-8
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=rounding, atol=1e-3)


@pytest.mark.parametrize(("rows", "products"), [(1, 1), (8, 0), (32, 0), (33, 1)])
def test_the_compiled_program_multiplies_few_rows_without_a_matrix_product(rows, products):
    def layer(x, gate, up, down):
        gated = jax.nn.silu(project_few(x, gate)) * project_few(x, up)
        return x + project_few(gated, down)

    wide, narrow = jnp.zeros((512, 128)), jnp.zeros((128, 512))
    compiled = jax.jit(layer).lower(jnp.zeros((rows, 128)), wide, wide, narrow).compile()
    assert (" dot(" in compiled.as_text() or "custom-call" in compiled.as_text()) == bool(products)


def test_other_platforms_keep_the_matrix_product():
    exported = jax.export.export(jax.jit(project_few), platforms=["tpu"])
    arguments = jnp.zeros((8, 128)), jnp.zeros((512, 128))
    module = exported(*arguments).mlir_module()
    assert "dot_general" in module
    assert "stablehlo.reduce" not in module


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), inner=st.integers(1, 70), outer=st.integers(1, 50))
def test_the_gradient_is_that_of_the_product(rows, inner, outer):
    """Through what stands behind it too, whose cotangent is made first."""
    rng = np.random.default_rng([rows, inner, outer])
    shapes = ((2, rows, inner), (outer, inner), (2, rows, outer))
    x, kernel, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def gradients(multiply):
        behind = jax.jit(lambda x, kernel: jax.nn.silu(multiply(x, kernel)))
        return jax.vjp(behind, x, kernel)[1](dy)

    plain = gradients(lambda x, kernel: jnp.einsum("bri,oi->bro", x, kernel))
    for found, expected in zip(gradients(project), plain, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_cotangents_are_made_first_on_cpu_alone(platform):
    def gradient(x, kernel):
        return jax.grad(lambda kernel: jnp.sum(jax.nn.silu(project(x, kernel))))(kernel)

    exported = jax.export.export(jax.jit(gradient), platforms=[platform])
    module = exported(jnp.zeros((8, 128)), jnp.zeros((512, 128))).mlir_module()
    assert ("stablehlo.optimization_barrier" in module) == (platform == "cpu")
