"""Likelihoods and pooled states of many token rows, on the mesh, in length buckets."""

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
_RESPONSE_GRAIN = 8

_log_likelihoods = jax.jit(rows.response_log_likelihoods, static_argnums=0)
_last_states = jax.jit(rows.last_states, static_argnums=0)


def mean_log_likelihoods(
    model: Model, conversations: Sequence[Conversation], mesh: Mesh
) -> np.ndarray:
    """Mean log-likelihood of a response token, in nats (PerSyn eq. 1), float64 [N].

    Equal conversations are computed once. Raises ValueError for an empty prompt or response.
    """
    distinct = list(dict.fromkeys(conversations))
    if any(not conversation.response for conversation in distinct):
        raise ValueError("a response without tokens has no likelihood")
    longest = max((len(conversation.response) for conversation in distinct), default=1)
    responses = _round_up(longest, _RESPONSE_GRAIN)

    def run(params, batch: list[Conversation], length: int) -> np.ndarray:
        packed = rows.pack([[conversation] for conversation in batch], length, responses)
        placed = jax.device_put(packed, meshes.per_worker(mesh))
        log_likelihood_BR = np.asarray(_log_likelihoods(model.config, params, placed))
        counts_B = [len(conversation.response) for conversation in batch]
        return log_likelihood_BR.sum(axis=1, dtype=np.float64) / counts_B

    means = _in_buckets(model, distinct, [c.length for c in distinct], run, mesh)
    mean_of = dict(zip(distinct, means, strict=True))
    return np.array([mean_of[conversation] for conversation in conversations], np.float64)


def pooled_states(model: Model, prompts: Sequence[tuple[int, ...]], mesh: Mesh) -> np.ndarray:
    """The backbone's final hidden state of each prompt's last token, float32 [N, D].

    Raises ValueError for an empty prompt.
    """
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt without tokens has no state")

    def run(params, batch: list[tuple[int, ...]], length: int) -> np.ndarray:
        tokens_BT = np.zeros((len(batch), length), np.int32)
        length_B = np.array([len(prompt) for prompt in batch], np.int32)
        for row, prompt in enumerate(batch):
            tokens_BT[row, : len(prompt)] = prompt
        placed = jax.device_put((tokens_BT, length_B), meshes.per_worker(mesh))
        return np.asarray(_last_states(model.config, params, *placed))

    states = _in_buckets(model, prompts, [len(prompt) for prompt in prompts], run, mesh)
    return np.array(states, np.float32).reshape(len(prompts), model.config.d_model)


def _in_buckets(
    model: Model, items: Sequence, lengths: list[int], run: Callable, mesh: Mesh
) -> list:
    """`run(params, batch, length)` over batches of similar length; one result an item, in order.

    Every batch has the same number of rows, sharded over the workers; the last one repeats its last
    item.
    """
    params = jax.device_put(model.params, meshes.replicated(mesh))
    batch_rows = _ROWS * mesh.shape[meshes.WORKER]
    results: list = [None] * len(items)
    buckets: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        buckets.setdefault(_round_up(length, _GRAIN), []).append(index)
    for length, indices in sorted(buckets.items()):
        for start in range(0, len(indices), batch_rows):
            chosen = indices[start : start + batch_rows]
            padded = chosen + [chosen[-1]] * (batch_rows - len(chosen))
            output = run(params, [items[index] for index in padded], length)
            for row, index in enumerate(chosen):
                results[index] = output[row]
    return results


def _round_up(value: int, grain: int) -> int:
    return -(-value // grain) * grain
