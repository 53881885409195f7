"""Stage train_router: preference pairs, a coefficient head on a frozen backbone, and the verdict.

The head learns standardised states (AdamW then needs no tuning to a backbone's scale); the
standardisation is folded into the head that is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from persyn_jax import gossip
from persyn_jax import mesh as meshes
from persyn_jax.config import ConfigError
from persyn_jax.models import router
from persyn_jax.models.decoder import Params
from persyn_jax.records import Prompt, Reward
from persyn_jax.routing.preferences import Preferences, make_preferences, reward_matrix
from persyn_jax.routing.strategies import Calibration
from persyn_jax.routing.verdict import judge_router
from persyn_jax.streams import numpy_stream
from persyn_jax.training.config import GossipConfig, OptimiserConfig
from persyn_jax.training.loop import run_steps, uniform_mean
from persyn_jax.training.losses import Pairs, bradley_terry_loss
from persyn_jax.training.optimisers import make_optimiser
from persyn_jax.training.step import (
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
    metrics as in `routing.verdict` and the ids of the prompts that they are of).

    Raises ConfigError when either part would be empty, RuntimeError when the rewards give too few
    preference pairs.
    """
    seen_N, held_out_N = split_calibration(prompts, config.held_out, config.seed)
    if not (len(seen_N) and len(held_out_N)):
        raise ConfigError(
            f"router.held_out {config.held_out}: leaves {len(seen_N)} calibration prompts to train "
            f"the router on and {len(held_out_N)} to judge it by"
        )
    total_NM = reward_matrix(rewards, [prompt.id for prompt in prompts], teachers)
    preferences = make_preferences(total_NM[seen_N])
    pairs = len(preferences.winner_P)
    if pairs < config.gossip.workers:
        raise RuntimeError(
            f"the rewards of {len(seen_N)} calibration prompts give {pairs} preference pairs for "
            f"{config.gossip.workers} workers: the teachers' totals are equal nearly everywhere"
        )
    # One scale for all dimensions: with one each, the many that hold only noise would weigh as much
    # as the few that tell prompts apart.
    mean_D = state_ND[seen_N].mean(axis=0)
    scale = float(np.linalg.norm(state_ND[seen_N] - mean_D, axis=1).mean()) or 1.0
    input_ND = (state_ND[seen_N] - mean_D) / scale
    head = _fit(preferences, input_ND, len(teachers), config, mesh, on_metrics)
    head = fold_standardisation(head, mean_D, scale)

    source_N = np.array([prompt.source for prompt in prompts])
    seen, held_out = (
        Calibration(total_NM[part_N], source_N[part_N].tolist(), state_ND[part_N])
        for part_N in (seen_N, held_out_N)
    )
    coefficient_NM = np.asarray(router.coefficients(head, held_out.feature_ND))
    metrics = judge_router(seen, held_out, coefficient_NM, teachers, config.neighbours)
    held_out_prompts = [prompts[n].id for n in held_out_N]
    return head, {
        "trained_on": len(seen_N),
        "pairs": pairs,
        "held_out_prompts": held_out_prompts,
        **metrics,
    }


def split_calibration(
    prompts: Sequence[Prompt], held_out: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(indices to train on, indices held out), int[N]: the same part of every source."""
    seen, apart = [], []
    for source in dict.fromkeys(prompt.source for prompt in prompts):
        own = [index for index, prompt in enumerate(prompts) if prompt.source == source]
        order = numpy_stream(seed, f"router held out {source}").permutation(own)
        count = round(held_out * len(own))
        apart += order[:count].tolist()
        seen += order[count:].tolist()
    return np.sort(np.array(seen, int)), np.sort(np.array(apart, int))


def _fit(
    preferences: Preferences,
    input_ND: np.ndarray,
    teachers: int,
    config: RouterTraining,
    mesh: Mesh,
    on_metrics: Callable[[dict[str, Any]], None],
) -> Params:
    """The trained head on standardised states: the uniform mean of the workers' heads."""
    workers = config.gossip.workers
    schedule = gossip.gosgd_schedule(
        workers, config.steps, config.gossip.exchange_probability, config.seed
    )
    optimiser = make_optimiser(config.optimiser, config.steps)
    mixing = gossip.gosgd(gossip.Exchange(schedule.bank, meshes.WORKER))
    step = on_mesh(
        make_train_step(bradley_terry_loss, optimiser, mixing), mesh, (0, 0, None), donate=True
    )
    head = router.init_head(teachers, input_ND.shape[1])
    start = on_mesh(lambda params: init_state(params, optimiser, mixing), mesh, (0,), donate=True)
    state = start(stack_on_mesh(head, mesh))
    pairs = len(preferences.winner_P)
    dealt = numpy_stream(config.seed, "deal pairs").permutation(pairs)
    shares = np.array_split(dealt, workers)

    def batch_at(number: int) -> Pairs:
        return jax.device_put(pairs_of(number), meshes.per_worker(mesh))

    def pairs_of(number: int) -> Pairs:
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
            weights=np.ones(chosen_WB.shape, np.float32),
        )

    for taken in run_steps(step, state, batch_at, schedule, range(config.steps), mesh):
        if taken.number % _STEPS_BETWEEN_METRICS == 0 or taken.number == config.steps - 1:
            on_metrics({"step": taken.number, "loss": taken.metrics.loss.tolist()})
    assert compiled_programs(step) == 1, "one batch shape must compile one program"
    return uniform_mean(taken.state.params, mesh)


def fold_standardisation(head: Params, mean_D: np.ndarray, scale: float) -> Params:
    """A head that says of raw states what `head` says of (state - mean_D) / scale."""
    kernel_MD = np.asarray(head["kernel"], np.float64) / scale
    return {
        "kernel": kernel_MD.astype(np.float32),
        "bias": (head["bias"] - kernel_MD @ mean_D).astype(np.float32),
    }
