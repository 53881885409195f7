"""Stage train_router: preference pairs from the rewards, a coefficient head on a frozen backbone, and the verdict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from persyn_jax import gossip, mesh as meshes
from persyn_jax.models import router
from persyn_jax.models.decoder import Params
from persyn_jax.records import Prompt, Reward
from persyn_jax.routing.preferences import Preferences, make_preferences, reward_matrix
from persyn_jax.routing.strategies import Calibration
from persyn_jax.routing.verdict import judge_router
from persyn_jax.streams import numpy_stream
from persyn_jax.training.config import GossipConfig, OptimiserConfig
from persyn_jax.training.loop import make_optimiser, run_steps, uniform_mean
from persyn_jax.training.losses import Pairs, bradley_terry_loss
from persyn_jax.training.step import init_state, make_train_step, on_mesh, stack_on_mesh


@dataclass(frozen=True)
class RouterTraining:
    """What the router's training needs to know."""

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
    Returns (head parameters for raw pooled states, router metrics as in `routing.verdict`).
    """
    total_NM = reward_matrix(rewards, [prompt.id for prompt in prompts], teachers)
    seen_N, held_out_N = split_calibration(prompts, config.held_out, config.seed)
    preferences = make_preferences(total_NM[seen_N])
    if not len(preferences.winner_P):
        raise RuntimeError("the teachers' totals are equal on every prompt: there is nothing to route by")
    mean_D, scale_D = state_ND[seen_N].mean(axis=0), state_ND[seen_N].std(axis=0) + 1e-6
    head = _fit(preferences, (state_ND[seen_N] - mean_D) / scale_D, len(teachers), config, mesh, on_metrics)
    head = _fold_standardisation(head, mean_D, scale_D)

    sources = np.array([prompt.source for prompt in prompts])
    parts = [
        Calibration(total_NM[part], sources[part].tolist(), state_ND[part])
        for part in (seen_N, held_out_N)
    ]
    coefficient_NM = np.asarray(router.coefficients(head, state_ND[held_out_N]))
    metrics = judge_router(*parts, coefficient_NM, teachers, config.neighbours)
    return head, {"trained_on": len(seen_N), "pairs": len(preferences.winner_P), **metrics}


def split_calibration(
    prompts: Sequence[Prompt], held_out: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(indices to train on, indices held out), int[N]: the same part of every source is held out."""
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
    mixing = gossip.gosgd(schedule.bank, meshes.WORKER)
    step = on_mesh(
        make_train_step(bradley_terry_loss, optimiser, mixing), mesh, replicated=1, donate=True
    )
    head = router.init_head(teachers, input_ND.shape[1])
    state = on_mesh(lambda params: init_state(params, optimiser, mixing), mesh)(
        stack_on_mesh(head, mesh)
    )
    shares = np.array_split(
        numpy_stream(config.seed, "deal pairs").permutation(len(preferences.winner_P)), workers
    )

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
            weights=np.ones(chosen_WB.shape, np.float32),
        )

    for number, state, metrics in run_steps(
        step, state, batch_at, schedule, range(config.steps), mesh
    ):
        if number % 10 == 0 or number == config.steps - 1:
            on_metrics({"step": number, "loss": metrics.loss.tolist()})
    assert step._cache_size() == 1, "the router's step must compile once"
    return uniform_mean(state.params)


def _fold_standardisation(head: Params, mean_D: np.ndarray, scale_D: np.ndarray) -> Params:
    """A head for raw states that says the same as `head` does for standardised ones."""
    kernel_MD = head["kernel"] / scale_D
    return {
        "kernel": kernel_MD.astype(np.float32),
        "bias": (head["bias"] - kernel_MD @ mean_D).astype(np.float32),
    }


def pooled_inputs(tokenizer, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """What the backbone reads: each prompt through the chat template."""
    from persyn_jax.models.tokenizer import prompt_ids

    return [tuple(prompt_ids(tokenizer, prompt.messages)) for prompt in prompts]
