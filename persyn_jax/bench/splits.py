"""Who has which examples, and who sees which of them in which step. NumPy."""

import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.streams import numpy_stream


def split_examples(
    classes_N: np.ndarray, workers: int, split: str, concentration: float, seed: int
) -> list[np.ndarray]:
    """The examples of each worker, int64[...] a worker, sorted; together each exactly once.

    `same`: a random deal, equally many each (to one). `dirichlet`: of each class the workers get
    shares drawn from Dirichlet(concentration), as in Hsu et al. 2019 (arXiv 1909.06335); the
    smaller the concentration, the fewer workers hold most of a class. `one_class`: each worker has
    all of one class and nothing else.
    Raises ConfigError: another split, fewer examples than workers, `one_class` with more or fewer
    classes than workers.
    """
    if len(classes_N) < workers:
        raise ConfigError(f"split: {len(classes_N)} examples are too few for {workers} workers")
    if split == "same":
        order = numpy_stream(seed, "deal").permutation(len(classes_N))
        return [np.sort(order[worker::workers]) for worker in range(workers)]
    if split == "one_class":
        values = np.unique(classes_N)
        if len(values) != workers:
            raise ConfigError(
                f"split one_class: {len(values)} classes need as many workers, got {workers}"
            )
        return [np.flatnonzero(classes_N == value) for value in values]
    if split != "dirichlet":
        raise ConfigError(f"split: must be same, dirichlet or one_class, got {split!r}")
    shards: list[list[np.ndarray]] = [[] for _ in range(workers)]
    for number, value in enumerate(np.unique(classes_N)):
        rng = numpy_stream(seed, "dirichlet deal", number)
        members = rng.permutation(np.flatnonzero(classes_N == value))
        share_W = rng.dirichlet(np.full(workers, concentration))
        bounds = np.rint(share_W.cumsum()[:-1] * len(members)).astype(int)
        for shard, part in zip(shards, np.split(members, bounds), strict=True):
            shard.append(part)
    return _nobody_empty([np.sort(np.concatenate(parts)) for parts in shards])


def batch_indices(shard: np.ndarray, batch: int, seed: int, step: int, worker: int) -> np.ndarray:
    """int64[B]: the examples of a worker in a step, drawn with replacement from its shard."""
    return shard[numpy_stream(seed, "batch", step, worker).integers(len(shard), size=batch)]


def _nobody_empty(shards: list[np.ndarray]) -> list[np.ndarray]:
    """A worker that got nothing takes one example from the worker that has most."""
    for worker, shard in enumerate(shards):
        if not len(shard):
            richest = max(range(len(shards)), key=lambda w: len(shards[w]))
            shards[worker], shards[richest] = shards[richest][:1], shards[richest][1:]
    return shards
