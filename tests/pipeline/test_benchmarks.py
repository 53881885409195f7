"""Benchmarks through an lm-eval that is not there: what is asked, kept, read, and not run."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
from pipeline_runs import SMOKE, run_here, small_config

from persyn_jax import store
from persyn_jax.config import ConfigError
from persyn_jax.models.spec import ModelConfig
from persyn_jax.pipeline import benchmarks
from persyn_jax.pipeline.benchmark_scores import BENCHMARKS, collect, read_scores, summary_lines
from persyn_jax.pipeline.benchmarks import models_to_examine, run_benchmarks
from persyn_jax.pipeline.run import open_run
from persyn_jax.pipeline.run_files import BENCHMARK_SUMMARY, PROMPTS
from persyn_jax.records import BenchmarkScore, Prompt

TINY = ModelConfig(weights="random:tiny")
BOTH = {"before": TINY, "after": TINY}
SVAMP = "{name: svamp_local, num_fewshot: 0, metric: exact_match, filter: last-number, data: DATA}"
GENERATED = "{name: persyn_generated, metric: verifier}"
GSM8K = "{name: gsm8k, num_fewshot: 5, metric: exact_match, filter: flexible-extract}"
IFEVAL = "{name: ifeval, metric: prompt_level_strict_acc}"
CHOICE = "{name: choice, asks: likelihoods, metric: exact_match, data: DATA}"
PROBLEMS = [{"Body": f"{n} pens.", "Question": "How many?", "Answer": n} for n in range(5)]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The command, its calls so far, and a service that says whom it would serve."""
    command = tmp_path / "lm_eval"
    script = Path(__file__).with_name("fake_lm_eval.py")
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    command.chmod(0o755)
    calls, served = tmp_path / "calls.jsonl", []
    monkeypatch.setenv("FAKE_CALLS", str(calls))

    @contextlib.contextmanager
    def running_service(config, platform):
        served.append(config)
        yield "http://127.0.0.1:9/v1"

    monkeypatch.setattr(benchmarks, "running_service", running_service)

    class Fake:
        served_configs = served

        def run(self, config, models=BOTH, limit=None, overwrite=False):
            with open_run(config, overwrite) as run:
                ran = run_benchmarks(run, command, models, limit)
                return ran, *collect(run, limit)

        def calls(self):
            return [json.loads(line) for line in calls.read_text().splitlines()]

        def called(self):
            return [(call["examined"], call["tasks"]) for call in self.calls()]

    Fake.command = command
    return Fake()


@pytest.fixture
def make_config(tmp_path):
    def make(*tasks: str, **engine):
        data = tmp_path / "problems.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
        joined = ", ".join(tasks).replace("DATA", str(data))
        config = small_config(f"run.folder={tmp_path}/runs", f"benchmarks.tasks=[{joined}]")
        config.run_folder.mkdir(parents=True, exist_ok=True)
        prompts = [
            Prompt(f"eval-{n}", [{"role": "user", "content": f"{n}?"}], "s", "eval", *rest)
            for n, rest in enumerate(
                [("0", "first_line_match", "MIT"), ("1", "exact_match", "MIT")]
            )
        ]
        store.write_records(config.run_folder / PROMPTS, prompts, Prompt)
        return config

    return make


def test_scores_of_items_and_the_paired_difference(fake, make_config):
    config = make_config(SVAMP)
    ran, scores, summary = fake.run(config)
    assert (ran.impossible, ran.failed) == ({}, [])
    of_model = {
        model: {s.item.split("-")[0]: s.score for s in scores if s.model == model} for model in BOTH
    }
    items = [f"svamp_local/{n}" for n in range(5)]
    assert of_model["before"] == dict(zip(items, [1, 0, 1, 0, 1], strict=True))
    assert of_model["after"] == dict.fromkeys(items, 1)
    values = summary["svamp_local"]
    assert values["models"]["before"]["mean"] == pytest.approx(3 / 5)
    assert values["after_minus_before"]["mean"] == pytest.approx(2 / 5)
    assert 0 <= values["after_minus_before"]["low"] < 2 / 5 < values["after_minus_before"]["high"]
    assert any("after - before" in line and "+0.400" in line for line in summary_lines(summary))
    assert store.read_records(config.run_folder / BENCHMARKS, BenchmarkScore) == scores
    assert store.read_json(config.run_folder / BENCHMARK_SUMMARY) == {
        "inputs": {PROMPTS: store.sha256_of(config.run_folder / PROMPTS)},
        "tasks": summary,
    }


def test_answers_to_the_runs_own_prompts_are_scored_by_their_verifiers(fake, make_config):
    """All answers go on after their first line, which only one of the two verifiers forgives; that
    of lm-eval, exact_match, says otherwise."""
    _, scores, _ = fake.run(make_config(GENERATED), {"after": TINY})
    assert {s.item: s.score for s in scores} == {"eval-0": 1.0, "eval-1": 0.0}


def test_a_finished_benchmark_is_not_run_again(fake, make_config, monkeypatch):
    config = make_config(SVAMP, GENERATED)
    monkeypatch.setenv("FAKE_FAILS", "persyn_generated")
    ran, *_ = fake.run(config, {"before": TINY})
    assert ran.finished == [("before", "svamp_local")]
    (failed,) = ran.failed
    assert "persyn_generated" in failed
    assert "400, message='Bad Request'" in failed
    monkeypatch.delenv("FAKE_FAILS")
    first, scores, _ = fake.run(config)
    again, scores_again, _ = fake.run(config)
    assert fake.called() == [
        ("before", "svamp_local"),
        ("before", "persyn_generated"),
        ("before", "persyn_generated"),
        ("after", "svamp_local"),
        ("after", "persyn_generated"),
    ]
    assert sorted(first.finished) == sorted(again.finished)
    assert len(first.finished) == 4
    assert scores_again == scores
    assert len(fake.served_configs) == 3  # none where nothing is left to ask


def test_asking_otherwise_needs_overwrite_and_scoring_otherwise_does_not(fake, make_config):
    fake.run(make_config(SVAMP), {"after": TINY})
    fewer = make_config(SVAMP.replace("num_fewshot: 0", "num_fewshot: 2"))
    with pytest.raises(ConfigError, match=r"num_fewshot changed \(0 -> 2\)"):
        fake.run(fewer, {"after": TINY})
    fake.run(fewer, {"after": TINY}, overwrite=True)
    assert [call["num_fewshot"] for call in fake.calls()] == [0, 2]
    strict = SVAMP.replace("last-number", "strict-match").replace("fewshot: 0", "fewshot: 2")
    _, scores, _ = fake.run(make_config(strict), {"after": TINY})
    assert {s.score for s in scores} == {0.0}
    assert len(fake.calls()) == 2


def test_changed_data_of_a_task_is_noticed(fake, make_config, tmp_path):
    config = make_config(SVAMP)
    fake.run(config, {"after": TINY})
    with (tmp_path / "problems.jsonl").open("a") as file:
        file.write(json.dumps(PROBLEMS[0]) + "\n")
    with pytest.raises(ConfigError, match=r"input svamp_local\.jsonl changed"):
        fake.run(config, {"after": TINY})


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set"),
        ("LocalEntryNotFoundError", "not reachable (LocalEntryNotFoundError)"),
    ],
)
def test_missing_data_is_one_line_and_the_others_run(fake, make_config, monkeypatch, reason, told):
    monkeypatch.setenv("FAKE_HUB", reason)
    ran, _, summary = fake.run(make_config(GSM8K, IFEVAL, SVAMP))
    assert set(summary) == {"svamp_local"}
    line = ran.impossible["gsm8k"]
    assert "\n" not in line
    for word in ("gsm8k", "openai/gsm8k", told):
        assert word in line
    assert "langdetect" in ran.impossible["ifeval"]
    assert ran.failed == []
    assert [call for call in fake.called() if call[1] == "gsm8k"] == [("before", "gsm8k")]


def test_exit_codes_and_the_summary_file(fake, make_config, tmp_path, monkeypatch, capfd):
    make_config(SVAMP)  # lays the data and the prompts

    def script(tasks: str, *words: str):
        arguments = ("--config", str(SMOKE), "--lm-eval", str(fake.command), "--model", "before")
        overrides = (f"run.folder={tmp_path}/runs", f"benchmarks.tasks=[{tasks}]")
        return run_here(
            "evaluate_benchmarks.py",
            *(*arguments, *words, *overrides),
            folder=tmp_path,
            monkeypatch=monkeypatch,
            capfd=capfd,
        )

    nothing = script(GSM8K)
    assert nothing.code == 2
    assert "no benchmark could be run: gsm8k: its data set openai/gsm8k" in nothing.error
    some = script(f"{GSM8K}, {GENERATED}", "--json", str(tmp_path / "summary.json"), "--limit", "1")
    assert some.code == 0
    assert "not run: gsm8k: its data set openai/gsm8k" in some.stdout
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["tasks"]["persyn_generated"]["models"]["before"]["items"] == 1
    assert len(told["not_run"]) == 1
    monkeypatch.setenv("FAKE_FAILS", "persyn_generated")
    assert script(GENERATED, "--overwrite").code == 1
    assert "no such command" in script(GENERATED, "--lm-eval", "nowhere").error


def test_what_lm_eval_is_asked(fake, make_config):
    fake.run(make_config(GENERATED, CHOICE), {"after": TINY}, limit=3)
    chat, likelihoods = fake.calls()
    assert chat["model"] == "local-chat-completions"
    assert likelihoods["model"] == "local-completions"
    assert chat["apply_chat_template"]
    assert "base_url=http://127.0.0.1:9/v1/chat/completions" in chat["model_args"]
    assert chat["gen_kwargs"] == f"max_gen_toks={small_config().evaluation.max_tokens}"
    assert not likelihoods["apply_chat_template"]
    assert "base_url=http://127.0.0.1:9/v1/completions" in likelihoods["model_args"]
    assert "tokenized_requests=True" in likelihoods["model_args"]
    assert {chat["limit"], likelihoods["limit"]} == {3}


def test_other_versions_of_lm_eval_are_not_compared(fake, make_config, monkeypatch, capfd):
    config = make_config(SVAMP)
    fake.run(config, {"before": TINY})
    monkeypatch.setenv("FAKE_VERSION", "0.5.0")
    _, _, summary = fake.run(config, {"after": TINY})
    assert summary["svamp_local"]["after_minus_before"] is None
    assert "lm-eval was 0.4.13, then 0.5.0" in capfd.readouterr().err


def test_other_items_are_not_compared(fake, make_config, tmp_path, capfd):
    config = make_config(SVAMP)
    fake.run(config, {"before": TINY})
    data = tmp_path / "problems.jsonl"
    data.write_text(data.read_text().replace("pens", "cups"))
    _, _, summary = fake.run(config, {"after": TINY})
    assert summary["svamp_local"]["after_minus_before"] is None
    assert "their items differ" in capfd.readouterr().err


def test_an_unknown_metric_is_named_with_those_there_are(fake, make_config):
    with pytest.raises(ConfigError, match=r"exact_match of filter last-number"):
        fake.run(make_config(SVAMP.replace("exact_match", "acc")))


def test_models_by_name(make_config, tmp_path):
    with open_run(make_config(SVAMP)) as run:
        (tmp_path / "mine").mkdir()
        found = models_to_examine(run, ["before", str(tmp_path / "mine")])
        assert found == {"before": TINY, "mine": ModelConfig(weights=str(tmp_path / "mine"))}
        with pytest.raises(ConfigError, match="train_student is not finished"):
            models_to_examine(run, ["after"])
        with pytest.raises(ConfigError, match="must be before, after, or a path"):
            models_to_examine(run, ["nowhere"])


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("{name: gsm8k, metric: verifier}", "metric verifier"),
        (CHOICE.replace("asks", "max_tokens: 8, asks"), "there is no answer"),
        (f"{SVAMP}, {SVAMP}", "is given twice"),
        ("{name: ../out, metric: acc}", "name"),
    ],
)
def test_impossible_tasks_are_refused(make_config, task, told):
    with pytest.raises(ConfigError, match=told):
        make_config(task)


def test_the_papers_six_and_their_examples():
    tasks = {task.name: task.num_fewshot for task in small_config().benchmarks.tasks}
    assert tasks.pop("gsm8k") == 5
    assert set(tasks.values()) == {0}
    paper = {"ifeval", "truthfulqa_mc2", "livebench", "minerva_math", "svamp"}
    assert set(tasks) == paper | {"persyn_generated"}


@pytest.mark.parametrize("value", ["NaN", "[true, false]"])
def test_a_metric_that_is_no_finite_number_is_refused(tmp_path, make_config, value):
    """As truthfulqa_mc2 gives where all probabilities underflow, and IFEval's inst_level_strict_acc
    gives for every item."""
    (task,) = make_config(IFEVAL).benchmarks.tasks
    sample = (
        '{"doc_id": 0, "filter": "none", "metrics": ["prompt_level_strict_acc"], '
        f'"doc_hash": "f2bdb822", "prompt_level_strict_acc": {value}}}\n'
    )
    (tmp_path / "samples_ifeval_2026-11-27T07-33-59.572537.jsonl").write_text(sample)
    with pytest.raises(ConfigError, match=r"ifeval.*no finite number"):
        read_scores(tmp_path, task, "after")
