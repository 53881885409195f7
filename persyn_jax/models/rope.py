"""Rotary position embedding (RoFormer, arXiv 2104.09864) and how its frequencies are scaled."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for positions beyond those of pre-training.

    A model with `longrope` is used up to its original positions, which are its `max_positions`: its
    long factors would change what the keys of earlier tokens are as a row grows.
    """

    kind: Literal["linear", "llama3", "longrope"]
    factor: float = 1.0
    """Of `linear` and `llama3`: by how much low frequencies are divided."""
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192
    """Of `llama3`, where its two factors are counted from; of `longrope`."""
    short_factors: tuple[float, ...] = ()
    """Of `longrope`: what divides each of the E/2 frequencies up to the original positions."""
    long_factors: tuple[float, ...] = ()
    """Of `longrope`, beyond them; kept to be written out again: rows never get that long here."""
    attention_factor: float = 1.0
    """Of `longrope`: multiplies sine and cosine."""


class Rotation(NamedTuple):
    """By how much positions turn."""

    frequencies_F: jax.Array
    """float32 [E / 2], radians a token."""
    amplitude: float = 1.0
    """Multiplies sine and cosine."""


class Turns(NamedTuple):
    """How each token's heads are turned: the same in every layer of a kind."""

    cos_BTF: jax.Array
    """float32 [B, T, E / 2]"""
    sin_BTF: jax.Array
    """float32 [B, T, E / 2]"""


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Rotation:
    """The rotation of heads of width E."""
    half = head_dim // 2
    frequencies_F = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None:
        return Rotation(frequencies_F)
    divisors_F = _divisors(half, theta, scaling).astype(np.float32)
    return Rotation(frequencies_F / divisors_F, scaling.attention_factor)


def _divisors(half: int, theta: float, s: RopeScaling) -> np.ndarray:
    if s.kind == "longrope":
        return np.array(s.short_factors)
    if s.kind == "linear":
        return np.full(half, s.factor)
    # Llama 3: a smooth way from frequencies that turn often within the original positions, and are
    # kept, to those that never turn as much as once, and are divided.
    turns_F = s.original_max_positions / (2 * np.pi) * theta ** (-np.arange(half) / half)
    span = s.high_frequency_factor - s.low_frequency_factor
    kept_F = np.clip((turns_F - s.low_frequency_factor) / span, 0, 1)
    return 1 / (kept_F + (1 - kept_F) / s.factor)


def make_turns(positions_BT: jax.Array | np.ndarray, rotation: Rotation) -> Turns:
    """How heads of tokens at these positions, int32 [B, T], are turned."""
    angles_BTF = positions_BT[:, :, None].astype(jnp.float32) * rotation.frequencies_F[None, None]
    cos_BTF, sin_BTF = jnp.cos(angles_BTF), jnp.sin(angles_BTF)
    if rotation.amplitude != 1.0:
        cos_BTF, sin_BTF = cos_BTF * rotation.amplitude, sin_BTF * rotation.amplitude
    return Turns(cos_BTF, sin_BTF)


def rotate(x_BTHE: jax.Array, turns: Turns) -> jax.Array:
    """Turns each head; rotate-half form, as in Hugging Face code."""
    half = x_BTHE.shape[-1] // 2
    cos, sin = turns.cos_BTF[:, :, None], turns.sin_BTF[:, :, None]
    x1, x2 = x_BTHE[..., :half], x_BTHE[..., half:]
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return rotated.astype(x_BTHE.dtype)
