"""What a model says of many token rows, on the mesh, in length buckets: likelihoods and states."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from persyn_jax import mesh as meshes
from persyn_jax.models import rows
from persyn_jax.models.rows import Conversation
from persyn_jax.models.tokenizer import Tokenizer
from persyn_jax.models.weights import Model

STEPS_BEFORE = 4
"""Steps that a step is read after, besides the prompt (k of local naturalness, arXiv 2510.03988,
by a re-implementation's account: the paper's own text was not to be had)."""

_ROWS = 4  # rows of a batch, per worker
_GRAIN = 32  # lengths are rounded up to a multiple of this
_RESPONSE_GRAIN = 8
# Behind it begins another step: a sentence's last mark (the last three are Chinese) or line's end.
_STEP_END = re.compile(r"(?:[.!?][\"')\]\u2019\u201d]*\s+|[\u3002\uff01\uff1f]\s*|\n\s*)(?=\S)")

_log_likelihoods = jax.jit(rows.response_log_likelihoods, static_argnums=0)
_scores = jax.jit(rows.response_scores, static_argnums=0)
_last_states = jax.jit(rows.last_states, static_argnums=0)


def on_mesh(model: Model, mesh: Mesh) -> Model:
    """The model with its parameters on the mesh, for whoever calls the functions below more than
    once: they put them there in each call otherwise."""
    return dataclasses.replace(model, params=jax.device_put(model.params, meshes.replicated(mesh)))


def mean_log_likelihoods(
    model: Model, conversations: Sequence[Conversation], mesh: Mesh
) -> np.ndarray:
    """Mean log-likelihood of a response token, in nats (PerSyn eq. 1), float64 [N].

    Equal conversations are computed once. Raises ValueError for an empty prompt or response.
    """
    distinct = _distinct(conversations)
    longest = max((len(conversation.response) for conversation in distinct), default=1)
    responses = _round_up(longest, _RESPONSE_GRAIN)

    def run(params, batch: list[Conversation], length: int) -> np.ndarray:
        packed = _placed(batch, length, responses, mesh)
        log_likelihood_BR = np.asarray(_log_likelihoods(model.config, params, packed))
        counts_B = [len(conversation.response) for conversation in batch]
        return log_likelihood_BR.sum(axis=1, dtype=np.float64) / counts_B

    means = _in_buckets(model, distinct, [c.length for c in distinct], run, mesh)
    mean_of = dict(zip(distinct, means, strict=True))
    return np.array([mean_of[conversation] for conversation in conversations], np.float64)


class TokenScore(NamedTuple):
    """What a model says of the T response tokens of one conversation."""

    log_likelihood_T: np.ndarray
    """float32: log p(y_t | x, y_<t), in nats."""
    rank_T: np.ndarray | None
    """int32: 1 + the number of tokens that are likelier than y_t there; None if not asked for."""


def score_tokens(
    model: Model, conversations: Sequence[Conversation], mesh: Mesh, ranks: bool = False
) -> list[TokenScore]:
    """The scores of each conversation's response tokens, and their `ranks` if asked for.

    A conversation's scores are bitwise the same whatever else is scored with it: its length alone
    decides the shape of the batch that it is in. Logits exist for `rows.CHUNK` tokens of a row at a
    time. Equal conversations are computed once. Raises ValueError for an empty prompt or response.
    """
    distinct = _distinct(conversations)

    def run(params, batch: list[Conversation], length: int) -> list[TokenScore]:
        packed = _placed(batch, length, length, mesh)
        rank_BR = None
        if ranks:
            log_likelihood_BR, rank_BR = map(np.asarray, _scores(model.config, params, packed))
        else:
            log_likelihood_BR = np.asarray(_log_likelihoods(model.config, params, packed))
        return [
            TokenScore(
                log_likelihood_BR[row, : len(conversation.response)].copy(),
                None if rank_BR is None else rank_BR[row, : len(conversation.response)].copy(),
            )
            for row, conversation in enumerate(batch)
        ]

    scores = _in_buckets(model, distinct, [c.length for c in distinct], run, mesh)
    score_of = dict(zip(distinct, scores, strict=True))
    return [score_of[conversation] for conversation in conversations]


def without_prompt(tok: Tokenizer, conversation: Conversation) -> Conversation:
    """The response alone: what IFD's L(y) is measured on (arXiv 2308.12032).

    Something must precede its first token: BOS, or EOS for a tokenizer without BOS.
    """
    start = tok.eos_token_id if tok.bos_token_id is None else tok.bos_token_id
    return Conversation((start,), conversation.response)


def response_steps(tok: Tokenizer, text: str, ended: bool) -> np.ndarray:
    """The step that each token of an answer belongs to, int32 [T], from 0 without gaps.

    Steps are sentences and lines. The space behind one belongs to it, and so does EOS to the last;
    a token that reaches into the next belongs there.
    text, ended: as in `tokenizer.response_ids`, which these are the tokens of.
    """
    first, end = len(text) - len(text.lstrip()), len(text.rstrip())
    starts = [match.end() for match in _STEP_END.finditer(text, first, end)]
    encoded = tok(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    ends = [stop for _, stop in encoded["offset_mapping"]] + ([len(text)] if ended else [])
    last_T = np.maximum(np.array(ends, np.int64) - 1, 0)  # each token's last character
    step_T = np.searchsorted(starts, np.maximum.accumulate(last_T), side="right")
    return np.unique(step_T, return_inverse=True)[1].astype(np.int32)


def in_steps(conversation: Conversation, step_T: np.ndarray) -> list[Conversation]:
    """One conversation a step: after the prompt and the STEPS_BEFORE steps before it, the step.

    step_T: as from `response_steps`. Their response tokens, joined, are the response.
    """
    starts = [0, *(np.flatnonzero(np.diff(step_T)) + 1).tolist(), len(step_T)]
    response = conversation.response
    return [
        Conversation(
            conversation.prompt + response[starts[max(step - STEPS_BEFORE, 0)] : starts[step]],
            response[starts[step] : starts[step + 1]],
        )
        for step in range(len(starts) - 1)
    ]


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


def _distinct(conversations: Sequence[Conversation]) -> list[Conversation]:
    distinct = list(dict.fromkeys(conversations))
    if any(not conversation.response for conversation in distinct):
        raise ValueError("a response without tokens has no likelihood")
    return distinct


def _placed(batch: list[Conversation], length: int, responses: int, mesh: Mesh) -> rows.Rows:
    packed = rows.pack([[conversation] for conversation in batch], length, responses)
    return jax.device_put(packed, meshes.per_worker(mesh))


def _in_buckets(
    model: Model, items: Sequence, lengths: list[int], run: Callable, mesh: Mesh
) -> list:
    """`run(params, batch, length)` over batches of similar length; one result an item, in order.

    Every batch has the same number of rows, sharded over the workers; the last one repeats its last
    item.
    """
    params = on_mesh(model, mesh).params
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
