"""A router whose backbone learns: it sees what a frozen one cannot, and comes back as it was."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipeline_runs import small_config
from test_pipeline_train_router import TEACHERS, make_prompt, make_rewards, training

from persyn_jax import gossip
from persyn_jax.config import ConfigError
from persyn_jax.mesh import make_mesh
from persyn_jax.models import adapters, router, weights
from persyn_jax.models.spec import ModelConfig
from persyn_jax.pipeline import router_service, stages
from persyn_jax.pipeline.run import Run
from persyn_jax.pipeline.train_backbone import deal, train_backbone
from persyn_jax.pipeline.train_router import Lessons, train_router
from persyn_jax.records import Answer, Route
from persyn_jax.routing.preferences import Preferences
from persyn_jax.sampling.scoring import pooled_states
from persyn_jax.training.config import GossipConfig, LoraConfig, OptimiserConfig

TINY = ModelConfig(weights="random:tiny")
BACKBONE = weights.load(TINY)
LORA = LoraConfig(rank=8, alpha=16)
PROMPTS = [make_prompt(f"p{n}") for n in range(300)]


def make_answer(prompt_id: str, teacher: str) -> Answer:
    return Answer(
        key=f"{prompt_id}/{teacher}",
        prompt_id=prompt_id,
        teacher=teacher,
        sample_index=0,
        text="yes",
        finish_reason="stop",
        prompt_tokens=5,
        completion_tokens=1,
        usd=None,
        licence="MIT",
        error=None,
    )


def planted() -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Every prompt names the four teachers, in any order, and the one named last is the best.

    Random states hold little of an order, and what all prompts end with is the same.
    """
    draw = np.random.default_rng(0)
    tokens, best = [], []
    for _ in PROMPTS:
        order = draw.permutation(len(TEACHERS))
        before = draw.integers(20, 60, draw.integers(2, 12))
        tokens.append((*before.tolist(), *(10 + order).tolist(), 1, 2))
        best.append(order[-1])
    return tokens, np.eye(len(TEACHERS))[best]


TOKENS, TOTAL_NM = planted()
REWARDS = make_rewards(PROMPTS, TOTAL_NM)


@pytest.fixture(scope="module", params=[LORA, None], ids=["lora", "full"])
def learned(request):
    """(lora, router, its metrics, rows of metrics, trees of parameters that were mixed)"""
    gosgd, rows, mixed = gossip.gosgd, [], []

    def watched(exchange):
        rule = gosgd(exchange)

        def update(updates, mix_state, params, round):
            mixed.append(jax.tree.map(lambda leaf: leaf.shape, params))
            return rule.update(updates, mix_state, params, round)

        return rule._replace(update=update)

    config = training(
        steps=40,
        pairs=32,
        lora=request.param,
        optimiser=OptimiserConfig(learning_rate=3e-2),
        backbone_optimiser=OptimiserConfig(learning_rate=1e-2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gossip, "gosgd", watched)
        data = PROMPTS, REWARDS, TEACHERS, BACKBONE, TOKENS
        found, metrics = train_backbone(*data, config, make_mesh(2), rows.append)
    return request.param, found, metrics, rows, mixed


def test_a_frozen_backbone_does_not_see_what_is_planted():
    state_ND = pooled_states(BACKBONE, TOKENS, make_mesh(2))
    config = training(steps=300)
    data = PROMPTS, REWARDS, TEACHERS, state_ND
    _, metrics = train_router(*data, config, make_mesh(2), lambda row: None)
    assert metrics["hit_at_1"] < 0.6


def test_a_backbone_that_learns_sees_it(learned):
    _, _, metrics, rows, _ = learned
    assert metrics["hit_at_1"] > 0.85
    assert metrics["regret"]["router"] < metrics["regret"]["best_constant"] / 4
    assert rows[0]["loss"] == pytest.approx([np.log(2)] * 2)
    assert max(rows[-1]["loss"]) < 0.3
    assert rows[-1]["loss"][0] != rows[-1]["loss"][1]


def test_workers_mix_what_learns_and_nothing_else(learned):
    lora, found, _, _, mixed = learned
    wanted = BACKBONE.params
    if lora:
        wanted = adapters.adapter_shapes(BACKBONE.config, lora.rank, lora.targets)
    shapes = jax.tree.map(lambda leaf: leaf.shape, {"backbone": wanted, "head": found.head})
    assert mixed
    assert all(tree == shapes for tree in mixed)


def test_it_routes_as_before_when_it_is_read_again(learned, tmp_path):
    """Every prompt to the same teacher, with the same coefficients to the last bit."""
    _, found, *_ = learned
    router.save_router(tmp_path, found, TEACHERS, TINY)
    head, teachers, state_ND = router.load_router(tmp_path)
    np.testing.assert_array_equal(state_ND, found.state_ND)
    again = router.load_backbone(tmp_path, TINY, 0)
    again_ND = pooled_states(again, TOKENS, make_mesh(2))
    assert teachers == TEACHERS
    np.testing.assert_array_equal(
        router.coefficients(head, again_ND), router.coefficients(found.head, found.state_ND)
    )
    chosen_N = np.asarray(router.coefficients(head, again_ND)).argmax(axis=1)
    assert np.mean(chosen_N == TOTAL_NM.argmax(axis=1)) > 0.85


def test_the_stages_hand_the_backbone_on(tmp_path):
    """Trained by one stage, used by the next one and by the router's service."""
    config = small_config(
        f"run.folder={tmp_path}",
        "student={weights: 'random:tiny'}",
        f"teachers={[{'name': name, 'licence': 'MIT'} for name in TEACHERS]}",
        "router={train: lora, steps: 2, pairs: 4, lora: {rank: 2, targets: [v]},"
        " backbone_optimiser: {learning_rate: 0.1}}",
    )
    work, folder = {stage.name: stage.work for stage in stages.STAGES}, config.run_folder
    run = Run(config)
    folder.mkdir(parents=True)
    calibration, rest = PROMPTS[:12], [make_prompt("other", split="train")]
    run.write(stages.PROMPTS, [*calibration, *rest], type(calibration[0]))
    rewards = make_rewards(calibration, TOTAL_NM[:12])
    run.write(stages.REWARDS, rewards, type(rewards[0]))
    answers = [make_answer(reward.prompt_id, reward.teacher) for reward in rewards]
    run.write(stages.CALIBRATION_ANSWERS, answers, Answer)
    work["train_router"](run, tmp_path)
    assert (folder / "router" / "adapter" / "adapter_model.safetensors").exists()
    work["route"](run, tmp_path)
    choose, teachers = router_service.load_router_of(run)
    assert teachers == TEACHERS
    of = {prompt.id: prompt for prompt in [*calibration, *rest]}
    routes = run.read(stages.ROUTES, Route)
    assert len(routes) == 13
    for each in (routes[0], routes[-1]):
        found = choose(of[each.prompt_id].messages)
        assert found == pytest.approx(each.coefficients, abs=1e-4)


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=12),
    workers=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_pairs_are_dealt_by_the_length_of_their_prompts(lengths, workers, seed):
    seen = [(1,) * length for length in lengths]
    pair_P = np.repeat(np.arange(len(lengths), dtype=np.int32), 3)
    preferences = Preferences(pair_P, pair_P, pair_P, np.ones(len(pair_P), np.float32))
    nothing = np.zeros(0)
    lessons = Lessons(nothing, [], nothing, nothing, nothing, preferences)
    config = training(gossip=GossipConfig(workers=workers), seed=seed)
    buckets = deal(lessons, seen, config)
    assert [b.length for b in buckets] == sorted({b.length for b in buckets})
    assert sum(bucket.pairs for bucket in buckets) == len(pair_P)
    assert {p for b in buckets for share in b.shares for p in share} == set(range(len(pair_P)))
    for bucket in buckets:
        assert bucket.length in (32, 64, 128, 256)
        assert len(bucket.shares) == workers
        longest = bucket.length
        shortest = longest // 2 if longest > 32 else 0
        for share in bucket.shares:
            assert len(share)
            assert all(shortest < lengths[pair_P[p]] <= longest for p in share)
        dealt = np.concatenate(bucket.shares)
        assert bucket.pairs < workers or len(dealt) == len(set(dealt)) == bucket.pairs


def test_a_way_to_train_that_is_none_is_one_line():
    with pytest.raises(ConfigError, match=r"router\.train"):
        small_config("router.train=some")
