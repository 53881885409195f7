"""Stage train_router with a backbone that learns, as a whole or by adapters.

The paper's router: the Bradley-Terry loss reaches the backbone through the state of each prompt's
last token, so every step reads its prompts anew. They come in a few static shapes: batches of
prompts of about one length, padded to 32, 64, 128, ... tokens.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from persyn_jax.models import router
from persyn_jax.models.adapters import Adapters, init_adapters, merge
from persyn_jax.models.decoder import Params
from persyn_jax.models.router import Router
from persyn_jax.models.weights import Model
from persyn_jax.pipeline.train_router import (
    Lessons,
    RouterTraining,
    Task,
    fit,
    fold_standardisation,
    judge,
    make_lessons,
    standardisation,
)
from persyn_jax.records import Prompt, Reward
from persyn_jax.sampling.scoring import pooled_states
from persyn_jax.streams import numpy_stream
from persyn_jax.training.losses import PromptPairs, Standardisation, router_loss
from persyn_jax.training.optimisers import by_part, make_optimiser

_SHORTEST = 32  # tokens; every next length is twice as long


def train_backbone(
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    teachers: Sequence[str],
    backbone: Model,
    tokens: Sequence[tuple[int, ...]],
    config: RouterTraining,
    mesh: Mesh,
    on_metrics: Callable[[dict[str, Any]], None],
) -> tuple[Router, dict[str, Any]]:
    """`train_router.train_router`, with a backbone that learns what `config.lora` says.

    tokens: of each prompt, through the chat template. Returns (router, its metrics). Raises as
    that, ConfigError as `adapters.adapter_shapes`, and ValueError for a prompt without tokens.
    """
    lessons = make_lessons(prompts, rewards, teachers, config)
    seen = [tokens[n] for n in lessons.seen_N]
    standard = standardisation(pooled_states(backbone, seen, mesh))
    task = _task(lessons, seen, backbone, standard, len(teachers), config)
    learned = fit(task, config, mesh, on_metrics)
    if config.lora is None:
        trained = whole = replace(backbone, params=learned["backbone"])
    else:
        trained = Adapters(learned["backbone"], config.lora.alpha)
        whole = replace(backbone, params=merge(backbone.params, trained))
    # As the kept backbone says: adapters that are applied, not merged, differ by rounding.
    state_ND = pooled_states(whole, tokens, mesh)
    head = fold_standardisation(learned["head"], *standard)
    metrics = judge(head, state_ND, lessons, teachers, config.neighbours)
    return Router(head, state_ND, trained), metrics


def _task(
    lessons: Lessons,
    seen: Sequence[tuple[int, ...]],
    backbone: Model,
    standard: Standardisation,
    teachers: int,
    config: RouterTraining,
) -> Task:
    shape, frozen, params = backbone.config, (), backbone.params
    if config.lora is not None:
        lora = config.lora
        params = init_adapters(shape, lora.rank, lora.targets, config.seed, "router adapter")
        shape = replace(shape, lora_scale=Adapters(params, lora.alpha).scale)
        frozen = (backbone.params,)
    buckets = deal(lessons, seen, config)
    sizes = np.array([bucket.pairs for bucket in buckets])

    def batch_at(number: int) -> PromptPairs:
        draw = numpy_stream(config.seed, "draw prompt length", number)
        bucket = buckets[draw.choice(len(buckets), p=sizes / sizes.sum())]
        return _draw(bucket, number, lessons, seen, config)

    assert config.backbone_optimiser is not None, "a backbone that learns has an optimiser"
    optimisers = {"backbone": config.backbone_optimiser, "head": config.optimiser}
    made = {part: make_optimiser(own, config.steps) for part, own in optimisers.items()}
    start: Params = {"backbone": params, "head": router.init_head(teachers, shape.d_model)}
    loss = functools.partial(router_loss, shape, standard)
    return Task(loss, start, by_part(made), batch_at, len(buckets), frozen)


class Bucket(NamedTuple):
    """Preference pairs whose prompts have room in one shape."""

    length: int
    """Tokens."""
    pairs: int
    shares: list[np.ndarray]
    """Indices of each worker's pairs, at least one: where there are too few, some have the same."""


def deal(lessons: Lessons, seen: Sequence[tuple[int, ...]], config: RouterTraining) -> list[Bucket]:
    """All pairs by the length of their prompts, each length's dealt among the workers."""
    workers = config.gossip.workers
    length_P = np.array([_padded(len(seen[n])) for n in lessons.preferences.prompt_index_P])

    def bucket(length: int) -> Bucket:
        own = np.flatnonzero(length_P == length)
        dealt = numpy_stream(config.seed, "deal pairs", length).permutation(own)
        dealt = np.resize(dealt, max(len(own), workers))  # repeats what is too short
        return Bucket(length, len(own), np.array_split(dealt, workers))

    return [bucket(length) for length in np.unique(length_P).tolist()]


def _padded(length: int) -> int:
    return _SHORTEST << max(0, (length - 1) // _SHORTEST).bit_length()


def _draw(
    bucket: Bucket,
    number: int,
    lessons: Lessons,
    seen: Sequence[tuple[int, ...]],
    config: RouterTraining,
) -> PromptPairs:
    chosen_WB = np.stack(
        [
            numpy_stream(config.seed, "draw pairs", number, worker).choice(share, config.pairs)
            for worker, share in enumerate(bucket.shares)
        ]
    )
    preferences = lessons.preferences
    tokens_WBT = np.zeros((*chosen_WB.shape, bucket.length), np.int32)
    length_WB = np.zeros(chosen_WB.shape, np.int32)
    for place, pair in np.ndenumerate(chosen_WB):
        prompt = seen[preferences.prompt_index_P[pair]]
        tokens_WBT[place][: len(prompt)] = prompt
        length_WB[place] = len(prompt)
    return PromptPairs(
        tokens=tokens_WBT,
        lengths=length_WB,
        winner=preferences.winner_P[chosen_WB],
        loser=preferences.loser_P[chosen_WB],
        weights=preferences.weight_P[chosen_WB],
    )
