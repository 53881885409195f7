"""Likelihoods and pooled states of many token rows, on the mesh, in length buckets."""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from persyn_jax import mesh as meshes
from persyn_jax.models import rows
from persyn_jax.models.rows import Conversation
from persyn_jax.models.weights import Model

_ROWS = 4  # rows of a batch, per worker
_GRAIN = 32  # lengths are rounded up to a multiple of this


def mean_log_likelihoods(
    model: Model, conversations: Sequence[Conversation], mesh: Mesh
) -> np.ndarray:
    """Mean log-likelihood of a response token, in nats, for each conversation (PerSyn eq. 1), float64 [N].

    Equal conversations are computed once. Raises ValueError for an empty response.
    """
    distinct = list(dict.fromkeys(conversations))
    if any(not conversation.response for conversation in distinct):
        raise ValueError("a response without tokens has no likelihood")
    responses = _round_up(max((len(c.response) for c in distinct), default=1), 8)
    compiled = jax.jit(functools.partial(rows.response_log_likelihoods, model.config))

    def run(params, batch: list[Conversation], length: int) -> np.ndarray:
        packed = rows.pack([[conversation] for conversation in batch], length, responses)
        log_likelihood_BR = np.asarray(compiled(params, jax.device_put(packed, meshes.per_worker(mesh))))
        sums_B = log_likelihood_BR.sum(axis=1, dtype=np.float64)
        return sums_B / np.maximum(packed.weights.sum(axis=1), 1)

    means = _in_buckets(model, distinct, [c.length for c in distinct], run, mesh)
    place = {conversation: index for index, conversation in enumerate(distinct)}
    return np.array([means[place[conversation]] for conversation in conversations])


def pooled_states(model: Model, prompts: Sequence[tuple[int, ...]], mesh: Mesh) -> np.ndarray:
    """The backbone's final hidden state of each prompt's last token, float32 [N, D]."""
    compiled = jax.jit(functools.partial(rows.last_states, model.config))

    def run(params, batch: list[tuple[int, ...]], length: int) -> np.ndarray:
        tokens = np.zeros((len(batch), length), np.int32)
        lengths = np.array([max(len(prompt), 1) for prompt in batch], np.int32)
        for row, prompt in enumerate(batch):
            tokens[row, : len(prompt)] = prompt
        placed = jax.device_put((tokens, lengths), meshes.per_worker(mesh))
        return np.asarray(compiled(params, *placed))

    return np.array(_in_buckets(model, prompts, [len(prompt) for prompt in prompts], run, mesh))


def _in_buckets(model: Model, items: Sequence, lengths: list[int], run: Callable, mesh: Mesh) -> list:
    """`run(params, batch, length)` over batches of items of similar length; results in the order of `items`.

    Every batch has the same number of rows (the last one repeats its last item), sharded over the workers.
    """
    if not items:
        return []
    params = jax.device_put(model.params, meshes.replicated(mesh))
    batch_rows = _ROWS * mesh.shape[meshes.WORKER]
    results: list = [None] * len(items)
    by_bucket: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_bucket.setdefault(_round_up(length, _GRAIN), []).append(index)
    for length, indices in sorted(by_bucket.items()):
        for start in range(0, len(indices), batch_rows):
            chosen = indices[start : start + batch_rows]
            padded = chosen + [chosen[-1]] * (batch_rows - len(chosen))
            output = run(params, [items[index] for index in padded], length)
            for row, index in enumerate(chosen):
                results[index] = output[row]
    return results


def _round_up(value: int, grain: int) -> int:
    return -(-value // grain) * grain
