"""A finished run: its summary, its report against its records, its student, and its rerun."""

import json
import time

import jax
import numpy as np
import pytest
from pipeline_runs import (
    CALIBRATION,
    EVAL,
    TEACHERS,
    TRAIN,
    small_config,
    snapshot,
    stored_answers,
    student_rows,
)

from persyn_jax import config, store
from persyn_jax.models import weights
from persyn_jax.models.rows import pack, response_log_likelihoods
from persyn_jax.models.spec import ModelConfig
from persyn_jax.pipeline.config import RunConfig
from persyn_jax.pipeline.tokens import conversations
from persyn_jax.records import Answer, Example, Prompt, Reward, Route, Score


@pytest.fixture(scope="module")
def run(finished_run):
    return finished_run.place.run


@pytest.fixture(scope="module")
def report(run):
    return json.loads((run / "report.json").read_text())


def test_the_terminal_ends_with_ten_lines_and_the_path_of_the_report(finished_run):
    lines = finished_run.ended.stdout.splitlines()
    labels = [line.split()[0] for line in lines]
    assert labels == [
        *("run", "prompts", "teachers", "router", "regret"),
        *("answers", "score", "training", "gossip", "time"),
        "report:",
    ]
    assert (finished_run.place.folder / lines[-1].removeprefix("report: ")).is_file()
    assert f"{CALIBRATION} calibration, {TRAIN} train, {EVAL} eval" in lines[1]


def test_json_is_the_report(finished_run, report):
    assert json.loads((finished_run.place.folder / "summary.json").read_text()) == report


def test_answers_cost_what_route_then_generate_costs(finished_run, report):
    """|X| + |X_cal| (|M| - 1), by the report, by the store and by the records."""
    expected = CALIBRATION + TRAIN + CALIBRATION * (TEACHERS - 1)
    cost = report["cost"]
    assert cost["answers_generated"] == cost["answers_expected"] == expected
    assert cost["answers_generate_then_select"] == (CALIBRATION + TRAIN) * TEACHERS
    stored = stored_answers(finished_run.place.answers)
    assert len(stored) == expected
    asked = [
        answer.key
        for name in ("calibration_answers", "answers")
        for answer in store.read_records(finished_run.place.run / f"{name}.parquet", Answer)
    ]
    assert set(asked) == set(stored)


def test_records_of_the_stages_fit_together(run):
    def read(name, kind):
        return store.read_records(run / f"{name}.parquet", kind)

    prompts = {prompt.id: prompt for prompt in read("prompts", Prompt)}
    routes = read("routes", Route)
    answers, examples = read("answers", Answer), read("examples", Example)
    split = {name: [i for i, p in prompts.items() if p.split == name] for name in ("eval", "train")}
    rewards = read("rewards", Reward)
    assert len(rewards) == CALIBRATION * TEACHERS
    assert {route.prompt_id for route in routes} == set(prompts) - set(split["eval"])
    names = [teacher.name for teacher in small_config().teachers]
    for route in routes:
        assert route.teacher == names[int(np.argmax(route.coefficients))]
    assert [(a.prompt_id, a.teacher) for a in answers] == [(r.prompt_id, r.teacher) for r in routes]
    usable = [answer for answer in answers if answer.usable]
    assert 0 < len(usable) < len(answers), "the smoke run must meet both kinds"
    assert [(e.id, e.messages[-1]["content"]) for e in examples] == [
        (a.prompt_id, a.text) for a in usable
    ]
    scores = read("scores", Score)
    assert [score.prompt_id for score in scores] == 2 * split["eval"]


def test_the_report_counts_what_the_records_say(run, report):
    rows = student_rows(run)
    examples = store.read_records(run / "examples.parquet", Example)
    scores = store.read_records(run / "scores.parquet", Score)
    assert report["student"]["training_examples"] == len(examples)
    assert report["student"]["training_tokens"] == sum(row["tokens"] for row in rows)
    for name in ("before", "after"):
        mean = np.mean([score.score for score in scores if score.model == name])
        assert report["student"][name]["mean"] == pytest.approx(mean)
    routed = [teacher["routed"] for teacher in report["teachers"]["by_teacher"].values()]
    assert sum(routed) == CALIBRATION + TRAIN
    assert report["router"]["held_out"] + report["router"]["trained_on"] == CALIBRATION
    assert set(report["router"]["regret"]) == {
        *("router", "best_constant", "best_per_source", "knn", "random", "oracle")
    }


def test_rewards_are_the_verifiers_word_and_the_students_likelihood(run):
    """Learnability is what the training loss of that conversation alone would be, but for sign."""
    prompts = store.read_records(run / "prompts.parquet", Prompt)
    answers = store.read_records(run / "calibration_answers.parquet", Answer)
    rewards = store.read_records(run / "rewards.parquet", Reward)
    prompt_of = {prompt.id: prompt for prompt in prompts}
    assert [reward.key for reward in rewards] == [answer.key for answer in answers]
    for answer, reward in zip(answers, rewards, strict=True):
        right = answer.usable and answer.text.strip() == prompt_of[answer.prompt_id].answer
        assert (reward.usable, reward.quality) == (answer.usable, float(right))

    student = weights.load(small_config().student)
    tokens = conversations(student.tokenizer, prompts, answers)
    assert [reward.response_tokens for reward in rewards] == [len(t.response) for t in tokens]
    usable = [index for index, reward in enumerate(rewards) if reward.usable]
    batch = pack([[tokens[index]] for index in usable], length=320, responses=128)
    log_likelihood_BR = jax.jit(
        lambda params, rows: response_log_likelihoods(student.config, params, rows)
    )(student.params, batch)
    expected = np.asarray(log_likelihood_BR).sum(axis=1) / batch.weights.sum(axis=1)
    np.testing.assert_allclose([rewards[i].learnability for i in usable], expected, rtol=1e-4)


def test_gossip_happened_and_kept_the_total_sum_weight(run, report):
    rows, gossip = student_rows(run), report["gossip"]
    assert [row["step"] for row in rows] == list(range(gossip["rounds"]))
    assert gossip["exchanges"] == sum(row["pushes"] for row in rows) > 0
    assert gossip["compiled_programs"] == 1
    np.testing.assert_allclose([sum(row["sum_weight"]) for row in rows], 1, atol=1e-6)
    assert gossip["sum_weight_total"] == pytest.approx(1, abs=1e-6)
    assert any(row["sum_weight"][0] != row["sum_weight"][1] for row in rows)
    measured = [row for row in rows if "consensus_distance" in row]
    assert max(row["consensus_distance"] for row in measured) > 0
    for row in measured:
        by_group = row["consensus_distance_by_group"]
        assert set(by_group) == {"embed", "layers", "final_norm"}
        assert sum(by_group.values()) == pytest.approx(row["consensus_distance"])


def test_bytes_and_the_free_estimate_are_there_where_something_was_heard(run):
    """Two workers: whoever pushes, both send; and the distance of the pair is known exactly."""
    for row in student_rows(run):
        assert row["useful_bytes"] * 2 == row["wire_bytes"] * row["pushes"]
        assert (row["estimated_consensus_distance"] is None) == (row["pushes"] == 0)
        assert (row["wire_bytes"] > 0) == (row["pushes"] > 0)


def test_every_worker_trained_on_data_of_its_own_and_learned(run, report):
    """The loss is null where a worker had no data left in its epoch, never 0."""
    rows = student_rows(run)
    losses_TW = np.array([row["loss"] for row in rows], float)
    assert np.nanmin(losses_TW) > 0
    both = losses_TW[np.isfinite(losses_TW).all(axis=1)]
    assert (both[:, 0] != both[:, 1]).all()
    held_out = report["student"]["held_out_loss"]
    assert held_out["last"] < held_out["first"]


def test_training_takes_every_example_that_is_not_held_out_once_an_epoch(run):
    config = small_config()
    answers = [a for a in store.read_records(run / "answers.parquet", Answer) if a.usable]
    held_out = store.read_manifest(run, "train_student").summary["held_out"]
    assert len(set(held_out)) == config.training.held_out
    tokens = conversations(
        weights.load_tokenizer(config.student),
        store.read_records(run / "prompts.parquet", Prompt),
        [answer for answer in answers if answer.prompt_id not in held_out],
    )
    rows = student_rows(run)
    once = sum(conversation.length for conversation in tokens)
    assert sum(row["tokens"] for row in rows) == config.training.epochs * once
    measured = [row["step"] for row in rows if "held_out_loss" in row]
    assert measured == sorted({*range(0, len(rows), 4), len(rows) - 1})


def test_the_student_opens_as_a_model_and_has_been_trained(run):
    before = weights.load(small_config().student)
    after = weights.load(ModelConfig(weights=str(run / "student")))
    assert after.config == before.config
    assert jax.tree.structure(after.params) == jax.tree.structure(before.params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, before.params)
    assert all(0 < distance < 1 for distance in jax.tree.leaves(moved))
    messages = [{"role": "user", "content": "Hello"}]
    chat = [
        model.tokenizer.apply_chat_template(messages, tokenize=False) for model in (before, after)
    ]
    assert chat[0] == chat[1]


def test_checkpoints_of_a_finished_training_are_gone(run):
    assert list((run / "checkpoints").iterdir()) == []


def test_the_resolved_config_is_kept(run):
    assert config.load(RunConfig, run / "config.yaml") == small_config()


def test_a_rerun_does_nothing_and_says_the_same(finished_run):
    place = finished_run.place
    before, started = snapshot(place.folder), time.monotonic()
    again = place.finish("run_persyn.py")
    assert time.monotonic() - started < 20
    assert (again.code, again.stdout) == (0, finished_run.ended.stdout)
    assert [line.split(": ")[1] for line in again.stderr.splitlines()] == ["finished before"] * 8
    assert snapshot(place.folder) == before
