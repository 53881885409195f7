"""Stage train_router: preference pairs, a coefficient head on a backbone, and the verdict.

The head learns standardised states (AdamW then needs no tuning to a backbone's scale); the
standardisation is folded into the head that is kept. Here the backbone is frozen; what is shared
with one that learns (`train_backbone`) stands here, too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from persyn_jax import gossip
from persyn_jax import mesh as meshes
from persyn_jax.config import ConfigError
from persyn_jax.models import router
from persyn_jax.models.decoder import Array, Params
from persyn_jax.records import Prompt, Reward
from persyn_jax.routing.preferences import (
    PairWeights,
    Preferences,
    make_preferences,
    pair_accuracy,
    reward_matrix,
)
from persyn_jax.routing.strategies import Calibration
from persyn_jax.routing.verdict import judge_router
from persyn_jax.streams import numpy_stream
from persyn_jax.training.config import GossipConfig, LoraConfig, OptimiserConfig
from persyn_jax.training.loop import run_steps, uniform_mean
from persyn_jax.training.losses import Pairs, Standardisation, bradley_terry_loss
from persyn_jax.training.optimisers import make_optimiser
from persyn_jax.training.step import (
    LossFunction,
    StepMetrics,
    TrainState,
    compiled_programs,
    init_state,
    make_train_step,
    on_mesh,
    stack_on_mesh,
)

_STEPS_BETWEEN_METRICS = 10


@dataclass(frozen=True)
class RouterTraining:
    """What the router's training needs to know; see `pipeline.config.RouterConfig`."""

    held_out: float
    steps: int
    pairs: int
    optimiser: OptimiserConfig
    neighbours: int
    gossip: GossipConfig
    seed: int
    pair_weights: PairWeights = "equal"
    lora: LoraConfig | None = None
    """Of a backbone that learns; null: all of it does."""
    backbone_optimiser: OptimiserConfig | None = None
    """Of a backbone that learns."""


class Lessons(NamedTuple):
    """What calibration tells a router."""

    total_NM: np.ndarray
    """float64, the rewards."""
    prompt_N: Sequence[str]
    """The id of each prompt."""
    source_N: np.ndarray
    """Where each prompt comes from."""
    seen_N: np.ndarray
    """Indices of the prompts that the router learns from."""
    held_out_N: np.ndarray
    """Those that judge it."""
    preferences: Preferences
    """Of the seen prompts."""


class Task(NamedTuple):
    """What gossiping workers learn."""

    loss: LossFunction
    params: Params
    """What every worker starts from, NumPy."""
    optimiser: optax.GradientTransformation
    batch_at: Callable[[int], Any]
    """Number of a step -> batches of all workers, NumPy [W, B, ...]."""
    batch_shapes: int = 1
    """How many there are: for each a program is compiled."""
    frozen: tuple[Params, ...] = ()
    """What the loss takes besides, NumPy."""


class Programs(NamedTuple):
    """What gossiping workers run; compiled at their first use."""

    schedule: gossip.Schedule
    start: jax.stages.Wrapped
    step: jax.stages.Wrapped


def train_router(
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    teachers: Sequence[str],
    state_ND: np.ndarray,
    config: RouterTraining,
    mesh: Mesh,
    on_metrics: Callable[[dict[str, Any]], None],
) -> tuple[Params, dict[str, Any]]:
    """Trains the head on one part of the calibration prompts and judges it on the other.

    prompts: the calibration prompts. state_ND: the backbone's pooled state of each, float32.
    on_metrics: called with a row every ten steps. Returns (head for raw pooled states, router
    metrics as in `routing.verdict`, and the ids of the prompts that they are of). Imported rewards
    (`pipeline.router_data`) may leave out some teachers of a prompt: then the metrics are
    `held_out`, `held_out_pairs` and `pair_accuracy`.

    Raises ConfigError when either part would be empty, RuntimeError when the rewards give too few
    preference pairs.
    """
    lessons = make_lessons(prompts, rewards, teachers, config)
    seen_ND, preferences = state_ND[lessons.seen_N], lessons.preferences
    head = fit_head(seen_ND, preferences, len(teachers), config, mesh, on_metrics)
    return head, judge(head, state_ND, lessons, teachers, config.neighbours)


def fit_head(
    state_ND: np.ndarray,
    preferences: Preferences,
    teachers: int,
    config: RouterTraining,
    mesh: Mesh,
    on_metrics: Callable[[dict[str, Any]], None],
    programs: Programs | None = None,
) -> Params:
    """A head for raw pooled states, trained on the preferences of those in `state_ND`; there must
    be a pair for every worker.

    programs: of `make_head_programs` with the same config and mesh, to compile for many heads once.
    """
    # One scale for all dimensions: with one each, the many that hold only noise would weigh as much
    # as the few that tell prompts apart.
    standard = standardisation(state_ND)
    task = _head_task(preferences, state_ND, standard, teachers, config)
    return fold_standardisation(fit(task, config, mesh, on_metrics, programs), *standard)


def make_lessons(
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    teachers: Sequence[str],
    config: RouterTraining,
) -> Lessons:
    """Raises ConfigError when either part of the prompts would be empty, RuntimeError when the
    rewards give too few preference pairs."""
    sources = [prompt.source for prompt in prompts]
    seen_N, held_out_N = split_calibration(sources, config.held_out, config.seed)
    if not (len(seen_N) and len(held_out_N)):
        raise ConfigError(
            f"router.held_out {config.held_out}: leaves {len(seen_N)} calibration prompts to train "
            f"the router on and {len(held_out_N)} to judge it by"
        )
    imported = all(math.isnan(reward.learnability) for reward in rewards)
    total_NM = reward_matrix(rewards, [prompt.id for prompt in prompts], teachers, partial=imported)
    preferences = make_preferences(total_NM[seen_N], config.pair_weights)
    pairs = len(preferences.winner_P)
    if pairs < config.gossip.workers:
        raise RuntimeError(
            f"the rewards of {len(seen_N)} calibration prompts give {pairs} preference pairs for "
            f"{config.gossip.workers} workers: the teachers' totals are equal nearly everywhere"
        )
    source_N = np.array(sources)
    ids = [prompt.id for prompt in prompts]
    return Lessons(total_NM, ids, source_N, seen_N, held_out_N, preferences)


def judge(
    head: Params, state_ND: np.ndarray, lessons: Lessons, teachers: Sequence[str], neighbours: int
) -> dict[str, Any]:
    """Router metrics as in `train_router`. head: for pooled states as they come."""
    learned = {
        "trained_on": len(lessons.seen_N),
        "pairs": len(lessons.preferences.winner_P),
        "held_out_prompts": [lessons.prompt_N[n] for n in lessons.held_out_N],
    }
    if np.isnan(lessons.total_NM).any():
        apart_N = lessons.held_out_N
        return learned | _judge_pairs(head, lessons.total_NM[apart_N], state_ND[apart_N])
    seen, held_out = (
        Calibration(lessons.total_NM[part_N], lessons.source_N[part_N].tolist(), state_ND[part_N])
        for part_N in (lessons.seen_N, lessons.held_out_N)
    )
    coefficient_NM = np.asarray(router.coefficients(head, held_out.feature_ND))
    return learned | judge_router(seen, held_out, coefficient_NM, teachers, neighbours)


def _judge_pairs(head: Params, total_NM: np.ndarray, state_ND: np.ndarray) -> dict[str, Any]:
    """What can be said of held-out prompts that only some teachers were compared on."""
    held_out = make_preferences(total_NM)
    if not len(held_out.winner_P):
        raise RuntimeError("the held-out prompts have no preference pair to judge the router by")
    return {
        "held_out": len(total_NM),
        "held_out_pairs": len(held_out.winner_P),
        "pair_accuracy": pair_accuracy(held_out, np.asarray(router.coefficients(head, state_ND))),
    }


def split_calibration(
    source_N: Sequence[str], held_out: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(indices of prompts to train on, indices held out), int[N]: the same part of every source."""
    seen, apart = [], []
    for source in dict.fromkeys(source_N):
        own = [index for index, other in enumerate(source_N) if other == source]
        order = numpy_stream(seed, f"router held out {source}").permutation(own)
        count = round(held_out * len(own))
        apart += order[:count].tolist()
        seen += order[count:].tolist()
    return np.sort(np.array(seen, int)), np.sort(np.array(apart, int))


def standardisation(state_ND: np.ndarray) -> Standardisation:
    """Of the states that a head learns from."""
    mean_D = state_ND.mean(axis=0)
    return Standardisation(mean_D, float(np.linalg.norm(state_ND - mean_D, axis=1).mean()) or 1.0)


def _head_task(
    preferences: Preferences,
    state_ND: np.ndarray,
    standard: Standardisation,
    teachers: int,
    config: RouterTraining,
) -> Task:
    """The head, on standardised states."""
    input_ND = (state_ND - standard.mean_D) / standard.scale
    pairs = len(preferences.winner_P)
    dealt = numpy_stream(config.seed, "deal pairs").permutation(pairs)
    shares = np.array_split(dealt, config.gossip.workers)

    def batch_at(number: int) -> Pairs:
        chosen_WB = np.stack(
            [
                numpy_stream(config.seed, "draw pairs", number, worker).choice(share, config.pairs)
                for worker, share in enumerate(shares)
            ]
        )
        return Pairs(
            pooled=input_ND[preferences.prompt_index_P[chosen_WB]],
            winner=preferences.winner_P[chosen_WB],
            loser=preferences.loser_P[chosen_WB],
            weights=preferences.weight_P[chosen_WB],
        )

    head = router.init_head(teachers, input_ND.shape[1])
    optimiser = make_optimiser(config.optimiser, config.steps)
    return Task(bradley_terry_loss, head, optimiser, batch_at)


def make_programs(
    loss: LossFunction,
    optimiser: optax.GradientTransformation,
    config: RouterTraining,
    mesh: Mesh,
    frozen: int = 0,
) -> Programs:
    """Of a `Task`; frozen: how many there are of those."""
    schedule = gossip.gosgd_schedule(
        config.gossip.workers, config.steps, config.gossip.exchange_probability, config.seed
    )
    mixing = gossip.gosgd(gossip.Exchange(schedule.bank, meshes.WORKER))
    train_step = make_train_step(loss, optimiser, mixing)
    return Programs(
        schedule,
        start=on_mesh(lambda own: init_state(own, optimiser, mixing), mesh, (0,), donate=True),
        step=on_mesh(train_step, mesh, (0, 0, None, *[None] * frozen), donate=True),
    )


def make_head_programs(config: RouterTraining, mesh: Mesh) -> Programs:
    """For any number of calls of `fit_head`."""
    optimiser = make_optimiser(config.optimiser, config.steps)
    return make_programs(bradley_terry_loss, optimiser, config, mesh)


def fit(
    task: Task,
    config: RouterTraining,
    mesh: Mesh,
    on_metrics: Callable[[dict[str, Any]], None],
    programs: Programs | None = None,
) -> Params:
    """What gossiping workers have learned: the uniform mean of their parameters.

    programs: of another task that differs in its numbers only; None: made now.
    """
    if programs is None:
        programs = make_programs(task.loss, task.optimiser, config, mesh, len(task.frozen))
    schedule, start, compiled = programs
    frozen = jax.device_put(task.frozen, meshes.replicated(mesh))
    state = start(stack_on_mesh(task.params, mesh))

    def step(*arguments: Any) -> tuple[TrainState, StepMetrics]:
        return compiled(*arguments, *frozen)

    def batch_at(number: int) -> Any:
        return jax.device_put(task.batch_at(number), meshes.per_worker(mesh))

    for taken in run_steps(step, state, batch_at, schedule, range(config.steps), mesh):
        if taken.number % _STEPS_BETWEEN_METRICS == 0 or taken.number == config.steps - 1:
            on_metrics({"step": taken.number, "loss": taken.metrics.loss.tolist()})
    count = compiled_programs(compiled)
    assert count <= task.batch_shapes, f"{task.batch_shapes} batch shapes, {count} programs"
    return uniform_mean(taken.state.params, mesh)


def fold_standardisation(head: Params, mean_D: Array, scale: float) -> Params:
    """A head that says of raw states what `head` says of (state - mean_D) / scale."""
    kernel_MD = np.asarray(head["kernel"], np.float64) / scale
    return {
        "kernel": kernel_MD.astype(np.float32),
        "bias": (head["bias"] - kernel_MD @ mean_D).astype(np.float32),
    }
