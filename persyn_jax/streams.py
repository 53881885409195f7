"""Named random streams: every random choice folds (run seed, purpose, indices...).

So no choice depends on the order in which others are made.
"""

import zlib

import numpy as np


def _purpose_id(purpose: str) -> int:
    return zlib.crc32(purpose.encode())


def numpy_stream(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """The generator of (seed, purpose, indices): for choices on the host."""
    # The count stands before the indices: a seed sequence takes [1] and [1, 0] for the same.
    return np.random.default_rng([seed, _purpose_id(purpose), len(indices), *indices])


def jax_stream(seed: int, purpose: str, *indices: int):
    """The typed key of (seed, purpose, indices): for choices inside a compiled program."""
    import jax

    key = jax.random.fold_in(jax.random.key(seed), _purpose_id(purpose))
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key
