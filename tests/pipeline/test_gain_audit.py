"""The gain audit on a tiny student and files of answers, of which it is known who helps."""

import json

import numpy as np
import pytest
from pipeline_runs import SMOKE

from persyn_jax import config as configs
from persyn_jax import store
from persyn_jax.config import ConfigError
from persyn_jax.mesh import make_mesh
from persyn_jax.models.spec import ModelConfig
from persyn_jax.models.weights import load
from persyn_jax.pipeline import gain
from persyn_jax.pipeline.gain_audit import (
    GainAuditConfig,
    GainAuditSection,
    audit_lines,
    audit_run,
    correlations,
    make_units,
    sweep_alpha,
)
from persyn_jax.pipeline.prompts import make_prompts
from persyn_jax.pipeline.run import open_run, run_stage
from persyn_jax.pipeline.run_files import CALIBRATION_ANSWERS, PROMPTS, REWARDS
from persyn_jax.pipeline.stages import STAGES
from persyn_jax.pipeline.tokens import conversations
from persyn_jax.records import Answer, Prompt, Reward
from persyn_jax.training.config import LoraConfig, OptimiserConfig, TrainConfig

TEACHERS = ("right", "mixed", "wrong")
TRAINING = TrainConfig(
    rows=4,
    row_tokens=192,
    row_response_tokens=32,
    optimiser=OptimiserConfig(learning_rate=3e-3),
)


def make_config(folder, *words) -> GainAuditConfig:
    teachers = [
        {"name": name, "licence": "MIT", "answers": str(folder / f"{name}.jsonl")}
        for name in TEACHERS
    ]
    return configs.load(
        GainAuditConfig,
        SMOKE,
        [
            f"run.folder={folder}",
            f"run.answers={folder / 'answers.sqlite'}",
            *(
                f"sources.{source}.counts={{calibration: 8, train: 1, eval: 6}}"
                for source in ("reversing", "adding")
            ),
            "service=null",
            f"teachers={json.dumps(teachers)}",
            "rewards.alpha=0.1",
            "gossip.workers=1",
            f"training={json.dumps(configs.to_values(TRAINING))}",
            "gain_audit={rows: 8, steps: 6}",
            *words,
        ],
    )


def write_answers(folder, prompts) -> None:
    """`right` says the reference answer, `wrong` never does, `mixed` every other time."""
    for name in TEACHERS:
        lines = []
        for number, prompt in enumerate(prompts):
            right = name == "right" or (name == "mixed" and number % 2)
            row = {"id": prompt.id, "text": prompt.answer if right else "~~ ## ~~ ## ~~"}
            lines.append(json.dumps(row))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The config of a run whose calibrate and score are finished."""
    folder = tmp_path_factory.mktemp("gain")
    config = make_config(folder)
    write_answers(folder, make_prompts(config))
    with open_run(config) as run:
        for stage in STAGES[:2]:
            run_stage(stage, run)
    return config


@pytest.fixture(scope="module")
def tunings():
    """All that were made: each compiles a program of its own."""
    return []


@pytest.fixture(scope="module")
def audited(scored, tunings):
    make_tuning = gain.make_tuning

    def made(*arguments):
        tunings.append(make_tuning(*arguments))
        return tunings[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gain, "make_tuning", made)
        return audit_run(scored)


def test_one_program_serves_all_fine_tunings(audited, tunings):
    (tuning,) = tunings
    assert tuning.step._cache_size() == 1


def test_whoever_helps_more_has_the_larger_gain_and_reward(audited):
    assert (audited["rows"], audited["steps"]) == (8, 6)
    units = {(unit["slice"], unit["teacher"]): unit for unit in audited["units"]}
    assert list(units) == [(s, teacher) for s in ("reversing", "adding") for teacher in TEACHERS]
    for source in ("reversing", "adding"):
        right, mixed, wrong = (units[source, teacher] for teacher in TEACHERS)
        assert right["gain"] > mixed["gain"] > wrong["gain"]
        assert right["total"] > mixed["total"] > wrong["total"]
        assert right["gain_ci95"][0] > 0
        assert right["after"] - right["before"] == pytest.approx(right["gain"])
        assert right["before"] == wrong["before"]
    assert audited["correlation_within_slices"]["total"]["spearman"] > 0.8
    assert audited["correlation"]["quality"]["spearman"] > 0.5


def test_what_is_measured_is_not_measured_again(scored, audited, tunings, monkeypatch):
    kept = sorted((scored.run_folder / "gain_audit").iterdir())
    assert len(kept) == 6
    kept[2].unlink()
    real, tuned = gain.fine_tune, []

    def counted(tuning, tokens):
        tuned.append(len(tokens))
        return real(tuning, tokens)

    monkeypatch.setattr(gain, "fine_tune", counted)
    monkeypatch.setattr(gain, "make_tuning", lambda *_: tunings[0])  # compiled already
    assert audit_run(scored) == audited  # to the last bit
    assert tuned == [8]
    assert store.read_json(scored.run_folder / "gain_audit.json") == audited
    assert audited["inputs"] == {
        name: store.sha256_of(scored.run_folder / name)
        for name in (PROMPTS, CALIBRATION_ANSWERS, REWARDS)
    }
    fewer = make_config(scored.run.folder, "gain_audit.teachers=[right]")
    assert len(audit_run(fewer)["units"]) == 2
    assert tuned == [8]


def test_the_table_names_everything(audited):
    lines = audit_lines(json.loads(json.dumps(audited, allow_nan=False)))
    assert sum(line.startswith(("| reversing |", "| adding |")) for line in lines) == 6
    firsts = [line.split(" | ")[0] for line in lines]
    start = firsts.index("| total")
    assert firsts[start : start + 3] == ["| total", "| quality", "| learnability"]
    assert firsts[-11:] == [f"| {step / 10}" for step in range(11)]


def test_adapters_learn_too_and_leave_the_student_as_it_was(scored):
    student = load(ModelConfig(weights="random:tiny"))
    before = {path: leaf.copy() for path, leaf in student.params["layers"]["q"].items()}
    config = configs.validate(
        TrainConfig, configs.to_values(TRAINING) | {"lora": {"rank": 4, "alpha": 8}}, where="lora"
    )
    assert isinstance(config.lora, LoraConfig)
    prompts = store.read_records(scored.run_folder / PROMPTS, Prompt)
    answers = store.read_records(scored.run_folder / CALIBRATION_ANSWERS, Answer)
    right = [answer for answer in answers if answer.teacher == "right"]
    tokens = conversations(student.tokenizer, prompts, right)
    tuned = gain.fine_tune(gain.make_tuning(student, config, 6, seed=0), tokens)
    held_out = [prompt for prompt in prompts if prompt.split == "eval"]
    likelihood, likelihood_before = (
        gain.reference_log_likelihoods(model, held_out, make_mesh(1)).mean()
        for model in (tuned, student)
    )
    assert likelihood > likelihood_before
    for path, leaf in student.params["layers"]["q"].items():
        np.testing.assert_array_equal(leaf, before[path])


def units_of(scored, **section):
    folder = scored.run_folder
    return make_units(
        store.read_records(folder / PROMPTS, Prompt),
        store.read_records(folder / CALIBRATION_ANSWERS, Answer),
        store.read_records(folder / REWARDS, Reward),
        TEACHERS,
        GainAuditSection(**section),
        seed=0,
    )


def test_slices_are_disjoint_and_all_teachers_answer_the_same_prompts(scored):
    units = units_of(scored, slices=2, rows=3, held_out=4)
    assert len(units) == 2 * 2 * 3
    asked = {}
    for unit in units:
        assert [answer.teacher for answer in unit.answers] == [unit.teacher] * 3
        assert [r.key for r in unit.rewards] == [a.key for a in unit.answers]
        asked.setdefault(unit.slice.name, set()).add(tuple(a.prompt_id for a in unit.answers))
        assert {p.source for p in unit.slice.held_out} == {unit.slice.name.split()[0]}
        assert [p.split for p in unit.slice.held_out] == ["eval"] * 4
    assert [len(prompts) for prompts in asked.values()] == [1] * 4
    every = [prompt for prompts in asked.values() for one in prompts for prompt in one]
    assert len(set(every)) == 4 * 3


def test_too_many_slices_and_unknown_teachers_are_one_line(scored):
    with pytest.raises(ConfigError, match=r"gain_audit\.slices 9: source 'reversing' has 8"):
        units_of(scored, slices=9)
    with pytest.raises(ConfigError, match=r"gain_audit\.teachers: no teacher 'x', only right"):
        make_config(scored.run.folder, "gain_audit.teachers=[x]")


def test_within_slices_what_a_slice_gives_to_all_does_not_count():
    """In each slice the reward orders the gains; over all, the second slice turns it round."""
    rows = [
        {
            "teacher": str(reward),
            "slice": name,
            "total": reward + shift,
            "quality": 0.0,
            "learnability": -reward,
        }
        | {"gain": reward - 3 * shift}
        for name, shift in (("one", 0.0), ("two", 5.0))
        for reward in (1.0, 2.0, 3.0)
    ]
    found = correlations(rows)
    assert found["correlation"]["total"]["spearman"] < 0
    assert found["correlation_within_slices"]["total"]["spearman"] == pytest.approx(1)
    assert found["correlation_within_slices"]["learnability"]["spearman"] == pytest.approx(-1)
    assert found["correlation"]["quality"] == {"spearman": None, "p_value": None}


def test_what_another_alpha_would_have_chosen_by_hand():
    """The gain is in quality; learnability would have the other teacher in one of two slices."""
    rows = [
        {"teacher": teacher, "slice": name, "total": 0.0, "quality": quality}
        | {"learnability": learnability, "gain": gain}
        for teacher, name, quality, learnability, gain in (
            ("a", "one", 1.0, -1.0, 0.5),
            ("b", "one", -1.0, 1.0, 0.1),
            ("a", "two", 0.5, 1.0, 0.4),
            ("b", "two", -0.5, -1.0, 0.2),
        )
    ]
    found = sweep_alpha(rows)
    gains = {row["alpha"]: row["gain"] for row in found["by_alpha"]}
    assert gains[0.0] == gains[0.4] == found["best_gain"] == pytest.approx(0.45)
    assert gains[0.6] == gains[1.0] == pytest.approx((0.1 + 0.4) / 2)
    assert found["mean_gain"] == pytest.approx(0.3)
    spearman = [row["spearman"] for row in found["by_alpha"]]
    assert spearman[0] == pytest.approx(1)
    assert spearman[-1] == pytest.approx(-2 / np.sqrt(4 * 5)), "two pairs of equal ranks"
