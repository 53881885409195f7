"""Which activations each policy keeps, counted in the gradient's program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persyn_jax.models.recompute import remat

X = jnp.linspace(-1, 1, 24).reshape(4, 6)
KERNELS = jnp.linspace(-1, 1, 2 * 36).reshape(2, 6, 6)


def layer(x, kernels):
    return jnp.sin(jnp.sin(x @ kernels[0]) @ kernels[1])


def counted(policy: str) -> tuple[int, int]:
    """(matrix products, cosines and sines) of the gradient."""
    gradient = jax.grad(lambda k: remat(layer, policy)(X, k).sum())
    text = str(jax.make_jaxpr(gradient)(KERNELS))
    return text.count("dot_general"), text.count("= sin ") + text.count("= cos ")


@pytest.mark.parametrize("policy", ["nothing", "layers", "dots"])
def test_the_gradient_is_the_same(policy):
    expected = jax.grad(lambda k: layer(X, k).sum())(KERNELS)
    found = jax.grad(lambda k: remat(layer, policy)(X, k).sum())(KERNELS)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_dots_computes_sines_again_but_no_product_and_layers_both():
    products, waves = zip(*map(counted, ("nothing", "dots", "layers")), strict=True)
    assert products[0] == products[1] < products[2]
    assert waves[0] < waves[1] <= waves[2]
