"""The router's training: a planted truth is found, noise is not, and nothing leaks."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.config import ConfigError
from persyn_jax.mesh import make_mesh
from persyn_jax.models.router import coefficients
from persyn_jax.pipeline.route import make_routes
from persyn_jax.pipeline.train_router import (
    RouterTraining,
    fold_standardisation,
    split_calibration,
    train_router,
)
from persyn_jax.records import Prompt, Reward
from persyn_jax.training.config import GossipConfig, OptimiserConfig

TEACHERS = ["a", "b", "c", "d"]
WIDTH = 12


def make_prompt(name: str, source: str = "mine", split: str = "calibration") -> Prompt:
    return Prompt(
        id=name,
        messages=[{"role": "user", "content": name}],
        source=source,
        split=split,
        answer=None,
        verifier="exact_match",
        source_licence="CC0-1.0",
    )


def make_rewards(prompts, total_NM) -> list[Reward]:
    return [
        Reward(
            key=f"{prompt.id}/{teacher}",
            prompt_id=prompt.id,
            teacher=teacher,
            usable=True,
            quality=None,
            learnability=0.0,
            response_tokens=1,
            quality_standardised=0.0,
            learnability_standardised=0.0,
            total=float(total),
        )
        for prompt, total_M in zip(prompts, total_NM, strict=True)
        for teacher, total in zip(TEACHERS, total_M, strict=True)
    ]


def training(**changes) -> RouterTraining:
    values = {
        "held_out": 0.4,
        "steps": 100,
        "pairs": 64,
        "optimiser": OptimiserConfig(learning_rate=0.3),
        "neighbours": 5,
        "gossip": GossipConfig(workers=2, exchange_probability=0.3),
        "seed": 0,
    }
    return RouterTraining(**values | changes)


def run(total_NM, state_ND, config=None, on_metrics=lambda row: None):
    config = config or training()
    prompts = [make_prompt(f"p{n}", f"s{n % 3}") for n in range(len(total_NM))]
    mesh = make_mesh(config.gossip.workers)
    rewards = make_rewards(prompts, total_NM)
    return train_router(prompts, rewards, TEACHERS, state_ND, config, mesh, on_metrics)


def make_states(count: int) -> np.ndarray:
    """Spread around a point that is not 0, by more than 1."""
    draw = np.random.default_rng(0)
    mean_D = 50 * draw.normal(size=WIDTH)
    return (20 * draw.normal(size=(count, WIDTH)) + mean_D).astype(np.float32)


@pytest.fixture(scope="module")
def planted():
    """Each teacher's total is a linear function of the state, with a little noise."""
    state_ND = make_states(200)
    draw = np.random.default_rng(1)
    direction_DM = draw.normal(size=(WIDTH, len(TEACHERS))) / 20
    utility_NM = (state_ND - state_ND.mean(axis=0)) @ direction_DM
    total_NM = utility_NM + 0.2 * draw.normal(size=utility_NM.shape)
    rows = []
    head, metrics = run(total_NM, state_ND, on_metrics=rows.append)
    return state_ND, total_NM, head, metrics, rows


def test_a_planted_truth_is_found(planted):
    *_, metrics, _ = planted
    assert metrics["hit_at_1"] > 0.8
    assert metrics["hit_at_3"] > 0.95
    regret = metrics["regret"]
    assert regret["oracle"] == 0 <= regret["router"] < regret["best_constant"] / 4
    assert metrics["verdict"].startswith("The router is better than")


def test_the_head_is_for_states_as_they_come(planted):
    """Routing the same states by the head that is kept: mostly to the best teacher."""
    state_ND, total_NM, head, _, _ = planted
    prompts = [make_prompt(f"p{n}") for n in range(len(state_ND))]
    coefficient_NM = np.asarray(coefficients(head, state_ND))
    ids, chosen_N = [prompt.id for prompt in prompts], coefficient_NM.argmax(axis=1)
    routes = list(make_routes(ids, coefficient_NM, chosen_N, TEACHERS))
    best = [TEACHERS[m] for m in total_NM.argmax(axis=1)]
    assert np.mean([r.teacher == b for r, b in zip(routes, best, strict=True)]) > 0.8
    for each, row_M in zip(routes, coefficients(head, state_ND), strict=True):
        ordered = np.sort(np.asarray(row_M))
        assert each.coefficients == pytest.approx(row_M.tolist())
        assert each.margin == pytest.approx(ordered[-1] - ordered[-2], abs=1e-5)


def test_metrics_say_how_the_loss_of_each_worker_fell(planted):
    *_, metrics, rows = planted
    assert [row["step"] for row in rows] == [*range(0, 100, 10), 99]
    assert rows[0]["loss"] == pytest.approx([np.log(2)] * 2)
    assert max(rows[-1]["loss"]) < 0.5
    assert rows[-1]["loss"][0] != rows[-1]["loss"][1]
    assert metrics["trained_on"] + metrics["held_out"] == 200
    _, held_out_N = split_calibration([f"s{n % 3}" for n in range(200)], 0.4, seed=0)
    assert metrics["held_out_prompts"] == [f"p{n}" for n in held_out_N]
    assert metrics["pairs"] == metrics["trained_on"] * 6


def test_noise_is_not_called_better():
    state_ND = make_states(200)
    total_NM = np.random.default_rng(2).normal(size=(200, len(TEACHERS)))
    _, metrics = run(total_NM, state_ND)
    assert not metrics["verdict"].startswith("The router is better than")
    assert metrics["hit_at_1"] < 0.5


def test_held_out_prompts_do_not_reach_the_head(planted):
    """Turning their rankings round changes the verdict, moving their states the routes: no more."""
    state_ND, total_NM, head, metrics, _ = planted
    _, held_out_N = split_calibration([f"s{n % 3}" for n in range(200)], 0.4, seed=0)
    turned_NM, moved_ND = total_NM.copy(), state_ND.copy()
    turned_NM[held_out_N] *= -1
    moved_ND[held_out_N] += 1000
    turned, judged = run(turned_NM, state_ND)
    moved, _ = run(total_NM, moved_ND)
    for name, array in head.items():
        np.testing.assert_array_equal(turned[name], array)
        np.testing.assert_array_equal(moved[name], array)
    assert judged["hit_at_1"] < metrics["hit_at_1"] / 4


@given(seed=st.integers(0, 1000))
def test_folding_keeps_what_the_head_says(seed):
    draw = np.random.default_rng(seed)
    mean_D = draw.normal(size=WIDTH).astype(np.float32)
    scale = draw.uniform(0.1, 10)
    head = {
        "kernel": draw.normal(size=(3, WIDTH)).astype(np.float32),
        "bias": draw.normal(size=3).astype(np.float32),
    }
    state_ND = draw.normal(size=(5, WIDTH)) * scale + mean_D
    expected_NM = (state_ND - mean_D) / scale @ head["kernel"].T + head["bias"]
    folded = fold_standardisation(head, mean_D, scale)
    assert {array.dtype for array in folded.values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(
        state_ND @ folded["kernel"].T + folded["bias"], expected_NM, rtol=1e-4, atol=1e-4
    )


sources = st.lists(st.sampled_from("uvw"), min_size=1, max_size=60)


@given(source_N=sources, held_out=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_the_same_part_of_every_source_is_held_out(source_N, held_out, seed):
    seen_N, held_out_N = split_calibration(source_N, held_out, seed)
    assert sorted([*seen_N, *held_out_N]) == list(range(len(source_N)))
    in_all, apart = Counter(source_N), Counter(source_N[n] for n in held_out_N)
    for source, count in in_all.items():
        assert apart[source] == round(held_out * count)


def test_the_split_of_a_source_depends_on_the_seed_and_on_no_other_source():
    own, others = ["u"] * 20, ["v"] * 10
    _, alone = split_calibration(own, 0.4, seed=0)
    _, beside = split_calibration(own + others, 0.4, seed=0)
    assert alone.tolist() == [n for n in beside if n < 20]
    assert alone.tolist() != split_calibration(own, 0.4, seed=1)[1].tolist()


@pytest.mark.parametrize("held_out", [0.1, 0.9])
def test_a_part_without_prompts_is_refused(held_out):
    with pytest.raises(ConfigError, match=rf"router\.held_out {held_out}: leaves \d calibration"):
        run(np.eye(4)[:3], make_states(3), training(held_out=held_out))


def test_teachers_who_are_equal_everywhere_give_nothing_to_learn_from():
    with pytest.raises(RuntimeError, match="give 0 preference pairs for 2 workers"):
        run(np.zeros((10, 4)), make_states(10))


def test_ties_make_no_pairs():
    """One prompt has a single winner among equals, 3 pairs; the others are equal throughout."""
    total_NM = np.zeros((20, 4))
    total_NM[:, 0] = 1
    _, metrics = run(total_NM, make_states(20), training(steps=2))
    assert metrics["pairs"] == 3 * metrics["trained_on"]
    assert metrics["regret"]["best_constant"] == 0
