"""The study of strategies: on a tiny model with an endpoint that costs nothing, in two sittings."""

import json
import os
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from persyn_jax import config as configs
from persyn_jax import store
from persyn_jax.config import ConfigError
from persyn_jax.intervals import Interval
from persyn_jax.pipeline import study
from persyn_jax.pipeline.examine import Examination
from persyn_jax.pipeline.study import (
    StudyConfig,
    Trial,
    all_trials,
    route_config,
    run_study,
    trial_config,
)
from persyn_jax.pipeline.study_table import (
    agreement,
    answer_cost,
    markdown_lines,
    power_lines,
    study_results,
    verdict_sentence,
)
from persyn_jax.records import Answer, Reward

ROOT = Path(__file__).parents[2]
SMALL_STUDY = ROOT / "configs" / "study_small.yaml"
CALIBRATION, TRAIN, EVAL, TEACHERS = 8, 10, 6, 3
WHERE = "http://127.0.0.1:9/v1"
TINY = (
    "run.name=tiny",
    "sources={adding: {kind: reasoning_gym, task: basic_arithmetic, settings: {min_terms: 2,"
    " max_terms: 2, min_digits: 1, max_digits: 2}, counts:"
    f" {{calibration: {CALIBRATION}, train: {TRAIN}, eval: {EVAL}}}}}}}",
    "service=null",
    "student={weights: 'random:tiny'}",
    "routing.family=[]",
    # Itself: what is routed for the other student must then be what is routed for this one.
    "study={strategies: [router, oracle], seeds: [1, 2], other_student: {weights: 'random:tiny'},"
    " variants: {natural: {rewards: {alpha: 1.0}, router: {pair_weights: difference}}},"
    " gain_audit: {rows: 2, steps: 1, held_out: 3}}",
    "router={steps: 4, pairs: 4}",
    "gossip.workers=1",
    "training={rows: 4, row_tokens: 192, row_response_tokens: 64, held_out: 2, measure_every: 9}",
    "evaluation={max_tokens: 2, engine: {slots: 2, cache_length: 192, prefill_rows: 2,"
    " prefill_chunk: 32, prefix_blocks: 8}}",
)


class Handler(BaseHTTPRequestHandler):
    """Three models, each of which leaves a quarter of the questions without an answer."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        drawn = zlib.crc32(asked["messages"][-1]["content"].encode())
        said = {"a": "4", "b": f"the sum is {drawn % 90}", "c": "7 7 7"}[asked["model"]]
        silent = drawn >> 2 * "abc".index(asked["model"]) & 3 == 0
        message = {"role": "assistant", "content": "" if silent else said}
        usage = {"prompt_tokens": 20, "completion_tokens": 5}
        body = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
        reply = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


def tiny_study(folder: Path, url: str) -> StudyConfig:
    teachers = [{"name": name, "licence": "MIT", "base_url": url, "model": name} for name in "abc"]
    places = [f"run.folder={folder}", f"run.answers={folder / 'answers.sqlite'}"]
    words = [*TINY, *places, f"teachers={json.dumps(teachers)}"]
    return configs.load(StudyConfig, SMALL_STUDY, words)


def load(*words: str) -> StudyConfig:
    return configs.load(StudyConfig, SMALL_STUDY, words)


OTHER = (f"teachers.3.base_url={WHERE}", f"teachers.4.base_url={WHERE}")


def test_the_small_study_is_what_was_asked_for():
    config = load(*OTHER)
    assert len(config.study.strategies) == 11
    assert len(config.study.seeds) == 3
    assert len(config.sources) >= 4
    assert "2.7 points" in power_lines(config)[0]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ((), "teachers.3.base_url: is required for teacher 'other_short': the endpoint that"),
        (OTHER[:1], "teachers.4.base_url: is required for teacher 'other_long'"),
        ((*OTHER, "study.strategies=[random, car]"), "must hold router"),
        ((*OTHER, "study.seeds=[1, 1]"), "study.seeds: one is given twice"),
        ((*OTHER, "routing.family=[]"), "family_strong needs routing.family"),
        (
            (*OTHER, "rewards.learnability=rsr"),
            "car needs rewards.learnability mean_log_likelihood",
        ),
        ((*OTHER, "training.seed=1"), "the study sets them itself"),
        (
            (*OTHER, "study.variants={knn: {}}"),
            "study.variants: 'knn' is the name of something else",
        ),
        (
            (*OTHER, "study.variants={bold: {rewards: {alpha: 2}}}"),
            r"bold-1: rewards\.alpha: .* less than or equal to 1",
        ),
        ((*OTHER, "study.gain_audit={teachers: [x]}"), "gain_audit.teachers: no teacher 'x', only"),
        (
            ("teachers.3.model=null", "teachers.4.model=null"),
            "one must be another model than the student",
        ),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_one_line(words, match):
    with pytest.raises(ConfigError, match=match) as refused:
        load(*words)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """(config, where it stood, and what was there, after its first student, where it ended)."""
    folder = tmp_path_factory.mktemp("study")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = tiny_study(folder, f"http://127.0.0.1:{server.server_port}/v1")
        asked_again = count()
        with pytest.MonkeyPatch.context() as patch:
            # Programs of a few tiny students fit into memory, and compiling them takes most time.
            patch.setattr("persyn_jax.pipeline.study._forget_programs", lambda: None)
            # Seed 2 trains everyone, so that it can be compared with seed 1, which need not.
            twin = study._twin
            patch.setattr(
                study, "_twin", lambda c, t, all_: twin(c, t, all_) if t.seed == 1 else None
            )
            stopped = run_study(config, may_go_on=lambda: next(asked_again) < 6)
            at_stop = sorted(path.name for path in config.folder.iterdir() if path.is_dir())
            standing = run_study(config)
        server.shutdown()
    return config, stopped, at_stop, standing


@pytest.mark.slow
def test_a_sitting_ends_after_its_unit_and_the_next_one_goes_on(studied):
    config, stopped, at_stop, standing = studied
    assert [(t.strategy, t.seed) for t in stopped.trials] == [("router", 1)]
    assert at_stop == ["base", "natural-1", "oracle-1", "other", "router-1"]
    assert [(t.strategy, t.seed) for t in standing.trials] == [
        (strategy, seed)
        for seed in (1, 2)
        for strategy in ("router", "oracle", "natural", "swapped")
    ]
    assert study_results(config, stopped)["verdict"]["score"].startswith("Undecided")


@pytest.mark.slow
def test_every_student_trains_on_equally_many_answers_of_its_own(studied):
    config, _, _, standing = studied
    left_out_of = {}
    for trial in standing.trials:
        folder = config.folder / f"{trial.strategy}-{trial.seed}"
        answers = store.read_records(folder / "answers.parquet", Answer)
        left_out = store.read_manifest(folder, "trial").summary["left_out"]
        assert sum(answer.usable for answer in answers) - len(left_out) == standing.examples
        assert not (folder / "student").exists()
        left_out_of[trial.strategy] = len(left_out)
    assert min(left_out_of.values()) == 0 < left_out_of["oracle"], "it alone knows who is silent"


@pytest.mark.slow
def test_the_table_counts_answers_and_pairs_items(studied):
    config, _, _, standing = studied
    results = study_results(config, standing)
    rows = {row["strategy"]: row for row in results["strategies"]}
    prompts = CALIBRATION + TRAIN
    assert rows["router"]["answers_generated"] == prompts + CALIBRATION * (TEACHERS - 1)
    chosen = store.read_records(config.folder / "router-1" / "answers.parquet", Answer)
    assert answer_cost(config, "random", chosen)["answers_generated"] == prompts
    assert rows["oracle"]["answers_generated"] == prompts * TEACHERS
    assert rows["router"]["difference"] is None

    def likelihoods(strategy):
        folders = [config.folder / f"{strategy}-{seed}" for seed in (1, 2)]
        found = [store.read_records(f / "examination.parquet", Examination) for f in folders]
        return np.array([[each.reference_log_likelihood for each in one] for one in found])

    difference = likelihoods("oracle") - likelihoods("router")
    assert difference.shape == (2, EVAL)
    found = rows["oracle"]["log_likelihood_difference"]
    assert found["mean"] == pytest.approx(difference.mean())
    assert found["ci95"][0] <= found["mean"] <= found["ci95"][1]
    text = "\n".join(markdown_lines(json.loads(json.dumps(results, allow_nan=False))))
    assert "| oracle | 2 |" in text
    assert "8 of 8 students finished" in text
    units = results["gain_audit"]["units"]
    assert {unit["teacher"] for unit in units} == set("abc")
    assert f"| adding | a | {units[0]['gain']:+.4f} [" in text


@pytest.mark.slow
def test_a_variant_has_rewards_and_a_router_of_its_own_and_measures_nothing_again(studied):
    config, _, _, standing = studied
    for name in ("natural-1", "natural-2"):
        folder = config.folder / name
        score = store.read_manifest(folder, "score").summary
        assert score["measured_answers"] == 0 < score["reused_answers"]
        rewards = store.read_records(folder / "rewards.parquet", Reward)
        assert all(reward.total == reward.learnability_standardised for reward in rewards)
    own, base = (config.folder / name / "rewards.parquet" for name in ("router-1", "base"))
    assert own.read_bytes() == base.read_bytes()
    assert (config.folder / "natural-1" / "router" / "head.safetensors").exists()
    results = study_results(config, standing)
    rows = {row["strategy"]: row for row in results["strategies"]}
    assert rows["natural"]["answers_generated"] == rows["router"]["answers_generated"]
    line = "natural: PerSyn with rewards.alpha 1.0, router.pair_weights difference."
    assert line in markdown_lines(results)


@pytest.mark.slow
def test_a_student_swapped_with_itself_is_the_same_student(studied):
    config, _, _, standing = studied
    results = study_results(config, standing)
    assert results["swap"]["agreement"] == 1
    assert results["swap"]["by_chance"] < 1
    rows = {row["strategy"]: row for row in results["strategies"]}
    assert rows["swapped"]["seeds"] == [1, 2]
    nothing = {"mean": 0, "ci95": [0, 0], "corrected": [0, 0]}
    assert rows["swapped"]["log_likelihood_difference"] == nothing
    assert rows["swapped"]["answers_generated"] == rows["router"]["answers_generated"]
    for name in ("routes.parquet", "rewards.parquet"):
        one, other = (config.folder / folder / name for folder in ("router-1", "other"))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_students_on_the_same_answers_are_trained_once(studied):
    config, *_ = studied
    taken, trained, different = (
        store.read_manifest(config.folder / name, "trial")
        for name in ("swapped-1", "swapped-2", "oracle-1")
    )
    assert taken == store.read_manifest(config.folder / "router-1", "trial")
    assert trained != store.read_manifest(config.folder / "router-2", "trial"), "its own seconds"
    assert different != taken


def test_one_process_at_a_time_works_on_a_study(tmp_path):
    config = tiny_study(tmp_path, WHERE)
    store.prepare(config.folder, holds=())
    with (
        store.hold(config.folder),
        pytest.raises(ConfigError, match=f"tiny: in use by process {os.getpid()}"),
    ):
        run_study(config)


@pytest.mark.slow
def test_a_finished_study_does_nothing_and_another_config_is_refused(studied, monkeypatch):
    config, _, _, standing = studied

    def never(*_, **__):
        raise AssertionError("loaded a model again")

    monkeypatch.setattr("persyn_jax.models.weights.load", never)
    monkeypatch.setattr("persyn_jax.pipeline.states.load_backbone", never)
    assert run_study(config) == standing
    values = configs.to_values(config)
    values["training"]["epochs"] = 2
    changed = configs.validate(StudyConfig, values, where="changed")
    with pytest.raises(ConfigError, match=r"stage trial is finished, but config training\.epochs"):
        run_study(changed)


def test_the_other_student_has_routes_of_its_own_and_is_not_the_one_that_is_trained():
    config = load(*OTHER, "study.other_student={weights: 'random:tiny'}")
    assert [trial.strategy for trial in all_trials(config)][12::13] == ["swapped"] * 3
    other = route_config(config, "swapped")
    assert other.student == config.study.other_student
    assert other.router_backbone == config.student, "personal is the reward, not the router's size"
    assert other.routing.strategy == "router"
    trained = trial_config(config, Trial("swapped", 2), examples=50)
    assert trained.student == config.student
    assert trained.run_folder not in (other.run_folder, route_config(config, "router").run_folder)
    assert "swapped" not in [trial.strategy for trial in all_trials(load(*OTHER))]


def test_agreement_by_hand():
    found = agreement(["a", "a", "b", "b"], ["a", "b", "b", "b"])
    assert found["agreement"] == 0.75
    assert found["ci95"][0] < 0.75 < found["ci95"][1]
    assert found["by_chance"] == pytest.approx(0.5 * 0.25 + 0.5 * 0.75)
    assert agreement(["a"] * 5, ["a"] * 5) == {"agreement": 1, "ci95": [1, 1], "by_chance": 1}


def between(low, high):
    return Interval((low + high) / 2, low, high)


def test_the_verdict_says_what_the_intervals_say():
    better, worse, unsure = between(-0.3, -0.1), between(0.1, 0.2), between(-0.1, 0.2)
    found = {"car": better, "oracle": worse, "knn": unsure, "strong": between(0.0, 0.0)}
    text = verdict_sentence("score", found, seeds=2)
    assert text.startswith("By the score, PerSyn is better than car; worse than oracle; ")
    assert "undecided against knn; the same students as strong" in text
    assert "prompts x seeds, corrected for 4 comparisons" in text
    text = verdict_sentence("score", {"knn": unsure}, seeds=2, detectable=0.031)
    assert text.startswith("Undecided by the score: no strategy differs from PerSyn")
    assert "3.1 points" in text


def test_one_seed_decides_nothing_whatever_its_prompts_say():
    text = verdict_sentence("score", {"car": between(-0.3, -0.1)}, seeds=1)
    assert text.startswith("Undecided by the score, because one seed")
    assert "PerSyn's is better than car (95 % intervals over prompts alone" in text
