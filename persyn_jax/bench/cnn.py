"""The small CNN of the GoSGD papers' CIFAR-10 experiment, as pure functions over a dict.

conv 5x5x64, max-pool 2, conv 5x5x128, max-pool 2, conv 3x3x64, dense 10, with ReLU between: 286,154
parameters for 28x28x3. Every convolution is a gather of patches and one matrix product: with an
axis of workers in front, XLA's CPU runs that as a batched product, but a convolution with kernels
of its own for each worker as a grouped convolution, many times slower.
"""

import chex
import jax
import jax.numpy as jnp
from jax import lax

SIDE = 28
CLASSES = 10


def init(key: jax.Array, channels: int) -> dict:
    """He-normal kernels [out, in], zero biases, float32. channels: of the images."""
    shapes = {
        "conv1": (64, 5 * 5 * channels),
        "conv2": (128, 5 * 5 * 64),
        "conv3": (64, 3 * 3 * 128),
        "dense": (CLASSES, 2 * 2 * 64),
    }
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    return {
        name: {
            "kernel": jax.random.normal(keys[name], shape) * (2 / shape[1]) ** 0.5,
            "bias": jnp.zeros(shape[0]),
        }
        for name, shape in shapes.items()
    }


def logits(params: dict, images_BHWC: jax.Array) -> jax.Array:
    """uint8[B, 28, 28, C] -> float32[B, 10]."""
    chex.assert_shape(images_BHWC, (None, SIDE, SIDE, None))
    x_BHWC = images_BHWC.astype(jnp.float32) / 255
    x_BHWC = jax.nn.relu(_max_pool(_convolve(x_BHWC, params["conv1"], 5)))
    x_BHWC = jax.nn.relu(_max_pool(_convolve(x_BHWC, params["conv2"], 5)))
    x_BHWC = jax.nn.relu(_convolve(x_BHWC, params["conv3"], 3))
    x_BD = x_BHWC.reshape(len(x_BHWC), -1)
    return x_BD @ params["dense"]["kernel"].T + params["dense"]["bias"][None]


def loss(params: dict, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean cross-entropy, nats. batch: (uint8[B, 28, 28, C], int[B])."""
    images_BHWC, labels_B = batch
    log_p_BK = jax.nn.log_softmax(logits(params, images_BHWC))
    return -jnp.take_along_axis(log_p_BK, labels_B[:, None].astype(jnp.int32), axis=1).mean()


def loss_by_convolutions(params: dict, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """`loss`, of the network as everybody would write it: the peer in timings and in tests."""
    images_BHWC, labels_B = batch

    def convolve(x_BHWC, layer, size):
        kernel = layer["kernel"].reshape(-1, size, size, x_BHWC.shape[-1]).transpose(1, 2, 3, 0)
        layout = ("NHWC", "HWIO", "NHWC")
        found = lax.conv_general_dilated(x_BHWC, kernel, (1, 1), "VALID", dimension_numbers=layout)
        return jax.nn.relu(found + layer["bias"][None, None, None])

    def pool(x_BHWC):
        return lax.reduce_window(x_BHWC, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    x_BHWC = pool(convolve(images_BHWC.astype(jnp.float32) / 255, params["conv1"], 5))
    x_BHWC = convolve(pool(convolve(x_BHWC, params["conv2"], 5)), params["conv3"], 3)
    x_BD = x_BHWC.reshape(len(x_BHWC), -1)
    logits_BK = x_BD @ params["dense"]["kernel"].T + params["dense"]["bias"][None]
    log_p_BK = jax.nn.log_softmax(logits_BK)
    return -jnp.take_along_axis(log_p_BK, labels_B[:, None].astype(jnp.int32), axis=1).mean()


def _convolve(x_BHWC: jax.Array, layer: dict, size: int) -> jax.Array:
    """A valid convolution with kernel [out, size * size * C], in the order (row, column, C)."""
    B, H, W, C = x_BHWC.shape
    h, w = H - size + 1, W - size + 1
    patches = [x_BHWC[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]
    columns_ND = jnp.concatenate(patches, axis=-1).reshape(B * h * w, size * size * C)
    return (columns_ND @ layer["kernel"].T + layer["bias"][None]).reshape(B, h, w, -1)


def _max_pool(x_BHWC: jax.Array) -> jax.Array:
    """2x2 by halves: the gradient of XLA's own window reduction is slow on a CPU."""
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H // 2, 2, W // 2, 2, C)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])
