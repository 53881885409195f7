"""A run on answers that exist already, from files to a data set: no endpoint, no eval prompts."""

import dataclasses
import json
from types import SimpleNamespace
from typing import ClassVar

import pytest
import yaml
from pipeline_runs import run_here

from persyn_jax import store
from persyn_jax.config import ConfigError, load
from persyn_jax.pipeline.answers import teacher_fingerprint
from persyn_jax.pipeline.config import RunConfig
from persyn_jax.pipeline.export import RunOutputs, make_rows, push_to_hub
from persyn_jax.pipeline.run import open_run, run_stage
from persyn_jax.pipeline.run_files import ANSWERS, PROMPTS, REWARDS, ROUTES
from persyn_jax.pipeline.stages import STAGES
from persyn_jax.records import Answer, Prompt, Reward, Route

CONFIG = """
run: {name: own, folder: FOLDER/runs, answers: FOLDER/runs/answers.sqlite}
sources:
  mine: {kind: file, path: FOLDER/prompts.jsonl, licence: CC0-1.0}
teachers:
  - {name: short, answers: FOLDER/short.jsonl, licence: MIT}
  - {name: long, model: someone/large, answers: FOLDER/long.jsonl, licence: llama3.1}
student: {weights: "random:tiny"}
router: {steps: 10, pairs: 8}
gossip: {workers: 1}
training: {row_tokens: 320, row_response_tokens: 128}
"""
CALIBRATION, TRAIN = 10, 8
MISSING = "calibration-3"  # has no answer in the file of `short`


def words(prompt_id: str) -> str:
    return f"Tell me of {prompt_id}."


@pytest.fixture(scope="module")
def own_run(tmp_path_factory) -> SimpleNamespace:
    """The stages up to generate, in this process."""
    folder = tmp_path_factory.mktemp("own")
    ids = [f"calibration-{n}" for n in range(CALIBRATION)] + [f"train-{n}" for n in range(TRAIN)]
    prompts = [{"id": i, "prompt": words(i), "split": i.partition("-")[0]} for i in ids]
    write(folder / "prompts.jsonl", prompts)
    write(folder / "short.jsonl", [{"id": i, "text": "Yes."} for i in ids if i != MISSING])
    long = [{"prompt": words(i), "completion": f"It is long, {i}."} for i in ids]
    write(folder / "long.jsonl", long)
    (folder / "run.yaml").write_text(CONFIG.replace("FOLDER", str(folder)))
    config = load(RunConfig, folder / "run.yaml")
    with open_run(config) as run:
        summaries = {stage.name: run_stage(stage, run).summary for stage in STAGES[:5]}
        outputs = RunOutputs(
            run.read(PROMPTS, Prompt),
            run.read(REWARDS, Reward),
            run.read(ROUTES, Route),
            run.read(ANSWERS, Answer),
        )
    return SimpleNamespace(folder=folder, config=config, summaries=summaries, outputs=outputs)


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def script(tmp_path, own_run, monkeypatch, capfd):
    def run(name: str, *words: str):
        arguments = ("--config", str(own_run.folder / "run.yaml"), *words)
        return run_here(name, *arguments, folder=tmp_path, monkeypatch=monkeypatch, capfd=capfd)

    return run


def test_files_of_answers_go_to_routes_with_nobody_asked(own_run):
    asked = own_run.summaries["calibrate"]["measured"]["asked"]
    assert asked == own_run.summaries["generate"]["measured"]["asked"] == {}
    assert own_run.summaries["calibrate"]["failed_answers"] == 1
    assert own_run.summaries["generate"]["answers_generated"] == CALIBRATION * 2 + TRAIN
    (missing,) = [reward for reward in own_run.outputs.rewards if not reward.usable]
    assert (missing.prompt_id, missing.teacher) == (MISSING, "short")
    texts = {(a.prompt_id, a.teacher): a.text for a in own_run.outputs.answers}
    for route in own_run.outputs.routes:
        expected = f"It is long, {route.prompt_id}." if route.teacher == "long" else "Yes."
        assert texts[route.prompt_id, route.teacher] in (expected, "")


def test_a_changed_file_of_answers_is_a_changed_input(own_run, script):
    path = own_run.folder / "short.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + b'{"id": "more", "text": "No."}\n')
    try:
        ended = script("generate.py")
    finally:
        path.write_bytes(before)
    assert ended.code == 2
    assert f"input {path} changed" in ended.error


def test_the_whole_run_wants_eval_prompts_but_says_what_it_costs_without(script):
    complaint = "sources: no eval prompt has a reference answer to score the student by"
    assert complaint in script("run_persyn.py", "run.name=other").error
    ended = script("run_persyn.py", "--dry-run")
    assert ended.code == 0
    assert f"up to train_student, the evaluation will refuse: {complaint}" in ended.stdout
    assert "tokens in all" in ended.stdout


def test_every_usable_answer_is_a_row_with_its_provenance(own_run):
    rows = make_rows(own_run.outputs, own_run.config, None, []).rows
    usable = {answer.prompt_id: answer for answer in own_run.outputs.answers if answer.usable}
    assert {row.id: row.answer_key for row in rows} == {i: a.key for i, a in usable.items()}
    reward_of = {reward.key: reward for reward in own_run.outputs.rewards}
    margin_of = {route.prompt_id: route.margin for route in own_run.outputs.routes}
    teacher_of = {teacher.name: teacher for teacher in own_run.config.teachers}
    for row in rows:
        assert row.messages == [
            {"role": "user", "content": words(row.id)},
            {"role": "assistant", "content": usable[row.id].text},
        ]
        assert row.margin == margin_of[row.id]
        teacher = teacher_of[row.teacher_id]
        assert (row.teacher_model, row.teacher_licence) == (teacher.model, teacher.licence)
        assert row.teacher_fingerprint == teacher_fingerprint(teacher, None)
        reward = reward_of.get(row.answer_key)
        terms = (None, None) if reward is None else (reward.learnability, reward.total)
        assert (row.learnability, row.total) == terms
        assert (reward is None) == row.id.startswith("train")
        assert (row.source, row.source_licence, row.run) == ("mine", "CC0-1.0", "own")


def test_unusable_answers_and_repeated_prompts_stay_behind(own_run):
    cut = dataclasses.replace(own_run.outputs.answers[0], finish_reason="length")
    planted = own_run.outputs.answers[1].prompt_id
    outputs = own_run.outputs._replace(answers=[cut, *own_run.outputs.answers[1:]])
    exported = make_rows(outputs, own_run.config, None, [words(planted).upper()])
    before = make_rows(own_run.outputs, own_run.config, None, [])
    assert exported.contaminated == 1
    assert exported.unusable == before.unusable + 1
    ids = {row.id for row in before.rows}
    assert {row.id for row in exported.rows} == ids - {cut.prompt_id, planted}


def test_an_eval_prompt_of_the_run_counts_as_an_evaluation_set(own_run):
    planted = dataclasses.replace(own_run.outputs.prompts[0], id="eval", split="eval")
    outputs = own_run.outputs._replace(prompts=[*own_run.outputs.prompts, planted])
    assert make_rows(outputs, own_run.config, None, []).contaminated == 1
    everything = [words(prompt.id) for prompt in own_run.outputs.prompts]
    with pytest.raises(ConfigError, match=r"no row is left: of 18 answers"):
        make_rows(own_run.outputs, own_run.config, None, everything)


def test_another_teacher_under_the_same_name_is_noticed(own_run):
    first, second = own_run.config.teachers
    swapped = [
        dataclasses.replace(first, name="long"),
        dataclasses.replace(second, name="short"),
    ]
    config = dataclasses.replace(own_run.config, teachers=swapped)
    with pytest.raises(ConfigError, match="of the config is not the one that answered"):
        make_rows(own_run.outputs, config, None, [])


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("wanted", ["trl", "llama_factory", "axolotl", "jsonl"])
def test_each_format_opens_as_a_data_set_of_conversations(
    own_run, script, tmp_path, no_cache, wanted
):
    import datasets

    ended = script("export_data.py", "--format", wanted, "--out", "data", "--json", "sum.json")
    assert ended.code == 0, ended.stderr
    summary = json.loads(ended.stdout)
    assert summary == json.loads((tmp_path / "sum.json").read_text())
    data = datasets.load_dataset(str(tmp_path / "data"), split="train")
    assert len(data) == summary["rows"] == sum(summary["teachers"].values()) > 0
    for row in data:  # what TRL calls a conversational language-modelling data set
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert set(row["messages"][0]) == {"role", "content"}
        assert row["teacher_id"] in ("short", "long")
    written = {path.name for path in (tmp_path / "data").iterdir()}
    beside = {"llama_factory": {"dataset_info.json"}, "axolotl": {"axolotl.yaml"}}
    rows = "train.parquet" if wanted == "trl" else "train.jsonl"
    assert written == {"README.md", rows} | beside.get(wanted, set())


def test_what_trainers_want_beside_the_rows_names_the_file(script, tmp_path):
    script("export_data.py", "--format", "llama_factory", "--out", "data")
    (info,) = json.loads((tmp_path / "data" / "dataset_info.json").read_text()).values()
    assert (info["file_name"], info["formatting"]) == ("train.jsonl", "sharegpt")
    assert (info["columns"]["messages"], info["tags"]["role_tag"]) == ("messages", "role")
    script("export_data.py", "--format", "axolotl", "--out", "data")  # another takes its place
    (section,) = yaml.safe_load((tmp_path / "data" / "axolotl.yaml").read_text())["datasets"]
    assert (section["type"], section["field_messages"]) == ("chat_template", "messages")
    assert not (tmp_path / "data" / "dataset_info.json").exists()


def test_files_to_keep_clear_of_are_read_and_named_in_the_card(script, tmp_path):
    against = [{"question": words("train-0")}, {"messages": [{"role": "user", "content": "Hi"}]}]
    write(tmp_path / "gsm8k.jsonl", against)
    ended = script("export_data.py", "--format", "trl", "--out", "data", "--against", "gsm8k.jsonl")
    assert json.loads(ended.stdout)["contaminated"] == 1
    card = (tmp_path / "data" / "README.md").read_text()
    assert "- 1 rows whose prompt" in card
    assert "gsm8k.jsonl" in card
    write(tmp_path / "odd.jsonl", [{"ask": "Hi"}])
    ended = script("export_data.py", "--format", "trl", "--out", "data", "--against", "odd.jsonl")
    assert "odd.jsonl:1: holds no prompt" in ended.error


def test_a_folder_with_other_things_and_a_run_without_answers_are_refused(script, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("mine")
    ended = script("export_data.py", "--format", "trl", "--out", "data")
    assert "data: holds 'thesis.tex', which is not of an export" in ended.error
    ended = script("export_data.py", "--format", "trl", "--out", "d", "run.name=none")
    assert "prompts.parquet: missing" in ended.error


class Hub:
    """Stands in for `huggingface_hub.HfApi`, and remembers what it was asked."""

    asked: ClassVar[list] = []

    def __init__(self, token):
        self.token = token

    def create_repo(self, repository, **given):
        if repository == "not/mine":
            raise ValueError(f"forbidden with {self.token}")
        self.asked.append((repository, self.token, given))
        return f"https://hub/{repository}"

    def upload_folder(self, **given):
        self.asked.append(given)


def test_a_push_takes_its_token_from_the_environment_and_tells_nobody(
    script, tmp_path, monkeypatch
):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    push = ("export_data.py", "--format", "trl", "--out", "data", "--push-to-hub")
    assert "needs a token in the environment variable HF_TOKEN" in script(*push, "me/data").error
    assert Hub.asked == []
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ended = script(*push, "me/data")
    assert json.loads(ended.stdout)["pushed_to"] == "https://hub/me/data"
    (repository, token, given), uploaded = Hub.asked
    assert (repository, token, given["private"]) == ("me/data", "hf_secret", True)
    assert {path.name for path in (tmp_path / uploaded["folder_path"]).iterdir()} == {
        "README.md",
        "train.parquet",
    }
    everywhere = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"hf_secret" in data for data in everywhere)
    with pytest.raises(RuntimeError, match=r"not/mine: the hub refuses: forbidden with \*\*\*$"):
        push_to_hub(tmp_path / "data", "not/mine", "hf_secret")


def test_the_import_script_prints_lines_for_a_config(tmp_path, monkeypatch, capfd):
    row = {"uuid": "u", "instruction": "Hi?", "a": {"content": "Hello."}}
    write(tmp_path / "zoo.jsonl", [row])
    here = {"folder": tmp_path, "monkeypatch": monkeypatch, "capfd": capfd}
    words = ("--format", "magpie_zoo", "zoo.jsonl", "--out", "zoo", "--json", "sum.json")
    ended = run_here("import_answers.py", *words, **here)
    assert ended.code == 0, ended.stderr
    assert yaml.safe_load(ended.stdout)["teachers"][0]["answers"] == "zoo/answers/a.jsonl"
    summary = json.loads((tmp_path / "sum.json").read_text())
    assert summary == {"format": "magpie_zoo", "prompts": 1, "answers": {"a": 1}}
    vote = {"prompt": "Hi?", "model_a": "a", "model_b": "b", "labels": [1, 0, 0]}
    write(tmp_path / "votes.jsonl", [vote])
    words = ("--format", "p2l", "votes.jsonl", "--out", "runs/votes")
    ended = run_here("import_answers.py", *words, **here)
    assert ended.code == 0, ended.stderr
    assert yaml.safe_load(ended.stdout)["run"] == {"folder": "runs", "name": "votes"}
    assert len(store.read_records(tmp_path / "runs" / "votes" / REWARDS, Reward)) == 2
