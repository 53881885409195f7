"""The router study on a run folder: a planted truth in its rewards is found by the run's own
training, and nobody is asked."""

import json
import shutil

import jax
import numpy as np
import pytest
import test_pipeline_train_backbone as ordered
from pipeline_runs import Place, small_config, snapshot

from persyn_jax import store
from persyn_jax.config import ConfigError, to_values, validate
from persyn_jax.mesh import make_mesh
from persyn_jax.pipeline.router_study import (
    RouterStudyConfig,
    RouterStudySection,
    compare_backbones,
    judge_transfer,
    study_lines,
    study_router,
    study_run,
    tied_share,
)
from persyn_jax.pipeline.train_router import RouterTraining
from persyn_jax.records import Prompt, Reward
from persyn_jax.routing.planted import PlantedConfig, planted
from persyn_jax.training.config import GossipConfig, OptimiserConfig

TEACHERS = ["ann", "bob", "cy"]
PROMPTS = 300


def make_prompt(number: int) -> Prompt:
    return Prompt(
        id=f"p{number}",
        messages=[{"role": "user", "content": str(number)}],
        source="mine",
        split="calibration",
        answer=None,
        verifier="exact_match",
        source_licence="CC0-1.0",
    )


def make_rewards(total_NM: np.ndarray) -> list[Reward]:
    return [
        Reward(
            key=f"{n}/{m}",
            prompt_id=f"p{n}",
            teacher=TEACHERS[m],
            usable=True,
            quality=None,
            learnability=0.0,
            response_tokens=1,
            quality_standardised=0.0,
            learnability_standardised=0.0,
            total=float(total),
        )
        for (n, m), total in np.ndenumerate(total_NM)
    ]


def training(**changes) -> RouterTraining:
    values = {
        "held_out": 0.5,
        "steps": 60,
        "pairs": 64,
        "optimiser": OptimiserConfig(learning_rate=0.1),
        "neighbours": 5,
        "gossip": GossipConfig(workers=1),
        "seed": 0,
    }
    return RouterTraining(**values | changes)


def study(total_NM, state_ND, **section):
    prompts = [make_prompt(n) for n in range(len(total_NM))]
    values = {"prompts": [5, 150], "draws": 1, "anchors": [4, 150]} | section
    chosen = RouterStudySection(**values)
    return study_router(prompts, make_rewards(total_NM), state_ND, training(), chosen, make_mesh(1))


@pytest.fixture(scope="module")
def world():
    made = planted(PlantedConfig(teachers=3, between_teachers=0.2), PROMPTS, seed=1)
    return made.gain_NM, made.feature_ND.astype(np.float32)


@pytest.fixture(scope="module")
def found(world):
    return study(*world)


def test_the_runs_own_router_finds_the_planted_truth(found):
    assert (found["seen"], found["held_out"]) == (150, 150)
    few, all_of_them = found["learning_curve"]
    assert (few["prompts"], all_of_them["prompts"]) == (5, 150)
    assert (few["pairs"], all_of_them["pairs"]) == (15, 450)
    assert all_of_them["regret"] < 0.5 * few["regret"]
    assert all_of_them["regret"] < 0.5 * found["regret"]["best_constant"]
    assert found["regret"]["best_constant"] < found["regret"]["random"]
    assert all_of_them["log_loss"] < few["log_loss"]


def test_an_added_teacher_comes_near_to_full_retraining(found):
    added = found["added_teachers"]
    limit = added["retrained_on_all"]
    few, many = added["mean"]
    assert many["bilinear"] < few["bilinear"]
    assert many["bilinear"] - limit < 0.1 * (many["without"] - limit)
    assert many["retrained"] == pytest.approx(limit)  # the same answers, so the same training
    assert [(one["teacher"], one["anchors"]) for one in added["teachers"]] == [
        (teacher, anchors) for teacher in TEACHERS for anchors in (4, 150)
    ]


def test_without_ties_both_losses_are_nearly_one_and_the_tables_say_so(found):
    """They differ in the pairs that are drawn."""
    assert found["tied_share"] == 0
    dropped, half = found["losses"]["ties_dropped"], found["losses"]["ties_half"]
    assert half["log_loss"] == pytest.approx(dropped["log_loss"], abs=0.02)
    assert found["losses"]["by_difference"]["hit_at_1"] > 0.8 * dropped["hit_at_1"]
    assert sum(row["pairs"] for row in found["reliability"]["bins"]) == 3 * 150
    lines = study_lines(json.loads(json.dumps(found, allow_nan=False)))
    assert "0.0% of the comparisons are ties" in "\n".join(lines)
    assert f"ties_dropped {found['by_difference_minus_dropped']['mean']:+.4f}" in "\n".join(lines)
    assert f"| 150 | {found['learning_curve'][1]['pairs']:.4f} |" in "\n".join(lines)


def test_where_many_answers_are_equal_a_loss_with_ties_makes_a_less_sure_router(world):
    """Judged by comparisons that are no ties, which the other loss learns from alone."""
    total_NM, state_ND = world
    found = study((total_NM > np.median(total_NM)).astype(float), state_ND)
    assert 0.3 < found["tied_share"] < 0.8
    dropped, half = found["losses"]["ties_dropped"], found["losses"]["ties_half"]
    assert half["log_loss"] > dropped["log_loss"] + 0.05
    assert max(dropped["regret"], half["regret"]) < found["regret"]["best_constant"]


def test_tied_share_by_hand():
    assert tied_share(np.array([[1.0, 1.0, 2.0], [3.0, 3.0, 3.0]])) == pytest.approx(4 / 6)
    assert tied_share(np.array([[1.0, 2.0]])) == 0


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"prompts": [151]}, "router_study.prompts 151: the router learns from 150"),
        ({"anchors": [2, 151]}, "router_study.anchors 151: the router learns from 150"),
    ],
)
def test_more_prompts_than_there_are_is_refused(world, section, match):
    with pytest.raises(ConfigError, match=match):
        study(*world, **section)


@pytest.fixture(scope="module")
def compared():
    """Who is best is hardly to be seen by a backbone that does not learn (`ordered.planted`)."""
    values = to_values(
        small_config(
            "router={steps: 40, pairs: 32, optimiser: {learning_rate: 0.03}, lora: {rank: 8,"
            " alpha: 16}, backbone_optimiser: {learning_rate: 0.01}}"
        )
    )
    values["router_study"] = {"backbones": ["frozen", "lora", "full"]}
    config = validate(RouterStudyConfig, values, where="study")
    data = ordered.PROMPTS, ordered.REWARDS, ordered.BACKBONE, ordered.TOKENS
    return compare_backbones(config, *data, make_mesh(2))


def test_backbones_that_learn_are_found_to_be_better(compared):
    assert [one["train"] for one in compared] == ["frozen", "lora", "full"]
    frozen, *learned = compared
    assert frozen["hit_at_1"] < 0.6
    assert frozen["minus_first"] == {"mean": 0, "ci95": [0, 0]}
    for one in learned:
        assert one["hit_at_1"] > 0.85
        assert one["minus_first"]["mean"] == pytest.approx(one["regret"] - frozen["regret"])
        assert one["minus_first"]["ci95"][1] < -0.1
    for one in compared:  # the best teacher's total is 1, the others' 0
        assert one["regret"] == pytest.approx(1 - one["hit_at_1"])
        assert one["seconds"] > 0


def test_what_learns_is_counted(compared):
    c, params = ordered.BACKBONE.config, ordered.BACKBONE.params
    head = len(ordered.TEACHERS) * (c.d_model + 1)
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    sides = 2 * (c.d_model + queries) + 2 * (c.d_model + keys) + 3 * (c.d_model + c.d_ff)
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    counts = [one["trained_parameters"] for one in compared]
    assert counts == [head, head + c.layers * 8 * sides, head + whole]


def test_the_comparison_is_a_table(found, compared):
    assert not any("minus_first" in line for line in study_lines(found))
    lines = study_lines(found | {"backbones": json.loads(json.dumps(compared, allow_nan=False))})
    place = lines.index("What learns of the backbone; regret minus that of frozen:")
    heads, _, frozen, lora, full = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[place + 2 :]
    )
    assert heads == list(compared[0])
    assert [row[0] for row in (frozen, lora, full)] == ["frozen", "lora", "full"]
    assert frozen[-1] == "+0.0000 [+0.0000, +0.0000]"
    assert full[1] == str(compared[2]["trained_parameters"])


def transfer(total_NM, other_NM, state_ND):
    prompts = [make_prompt(n) for n in range(len(total_NM))]
    rewards, others = make_rewards(total_NM), make_rewards(other_NM)
    return judge_transfer(prompts, rewards, others, state_ND, training(), make_mesh(1))


def test_a_student_with_the_same_rewards_is_served_as_well_as_by_its_own_router(world, found):
    total_NM, state_ND = world
    judged = transfer(total_NM, total_NM, state_ND)
    assert judged["agreement"] == 1
    assert judged["minus_own"] == {"mean": 0, "ci95": [0, 0]}
    assert judged["regret"] == judged["own_regret"] == found["losses"]["ties_dropped"]["regret"]
    assert judged["best_constant"] == found["regret"]["best_constant"]


def test_a_student_for_whom_the_worst_teacher_is_best_is_served_badly(world, found):
    """Its router turns all coefficients around; this one's then takes the worst teacher."""
    total_NM, state_ND = world
    judged = transfer(total_NM, -total_NM, state_ND)
    assert judged["agreement"] < 0.1
    assert judged["own_hit_at_1"] > 0.6 > 0.1 > judged["hit_at_1"]
    assert judged["minus_own"]["ci95"][0] > 0
    assert judged["own_regret"] < judged["best_constant"] < judged["regret"]
    *_, heads, _, row = study_lines(found | {"transfer": judged})
    cells = dict(zip(heads.split(" | "), row.split(" | "), strict=True))
    assert cells["own_regret"] == f"{judged['own_regret']:.4f}"


def test_another_run_must_have_rewards_of_the_same_prompts(world):
    total_NM, state_ND = world
    prompts = [make_prompt(n) for n in range(len(total_NM))]
    fewer = make_rewards(total_NM)[:-1]
    with pytest.raises(ConfigError, match=r"router_study.other_run: .*p299.*cy"):
        judge_transfer(prompts, make_rewards(total_NM), fewer, state_ND, training(), make_mesh(1))


def test_a_run_that_is_not_there_is_one_line_and_stays_away(tmp_path):
    values = to_values(small_config(f"run.folder={tmp_path}"))
    config = validate(RouterStudyConfig, values, where="study")
    with pytest.raises(ConfigError, match=r"stage calibrate is not finished, and .* needs it"):
        study_run(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_script_studies_a_finished_run_and_asks_nobody(finished_run, tmp_path):
    place = Place(tmp_path / "copy", finished_run.place.cache)
    shutil.copytree(finished_run.place.folder, place.folder)
    before = snapshot(place.folder)
    words = [
        *("router_study.draws=1", "router_study.backbones=[frozen, full]"),
        "router_study.other_run=runs/smoke",
    ]
    ended = place.finish("router_study.py", "--json", "study.json", *words)
    assert ended.code == 0, ended.stderr
    found = json.loads((place.folder / "study.json").read_text())
    assert found == store.read_json(place.run / "router_study.json")
    summary = store.read_manifest(place.run, "train_router").summary["router"]
    # The run's own router again: the same training on the same prompts.
    assert found["learning_curve"][-1]["regret"] == pytest.approx(summary["regret"]["router"])
    assert found["losses"]["ties_dropped"]["hit_at_1"] == summary["hit_at_1"]
    frozen, full = found["backbones"]
    assert frozen["regret"] == pytest.approx(summary["regret"]["router"])
    assert full["trained_parameters"] > frozen["trained_parameters"]
    assert found["transfer"]["regret"] == found["transfer"]["own_regret"] == frozen["regret"]
    assert "2 workers read 16 prompts in each of 20 steps, else 12 in all" in ended.stderr
    assert "Learning curve:" in ended.stdout
    new = snapshot(place.folder).keys() - before.keys()
    assert new == {"study.json", "runs/smoke/router_study.json"}
    assert before.items() <= snapshot(place.folder).items()
    other = place.finish("router_study.py", "rewards.alpha=0.9")
    assert other.code == 2
    assert "stage score is finished, but config rewards.alpha changed" in other.error
    other = place.finish("router_study.py", "router_study.other_run=runs/none")
    assert other.code == 2
    assert "router_study.other_run runs/none: there is no rewards.parquet" in other.error
