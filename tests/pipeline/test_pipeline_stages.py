"""How a stage is run, skipped or refused; and that the table of the real stages hangs together."""

import inspect
import json
import re
from pathlib import Path

import pytest
import yaml
from pipeline_runs import SMOKE, small_config

from persyn_jax import config as configs
from persyn_jax import provenance, store
from persyn_jax.config import ConfigError
from persyn_jax.models import spec
from persyn_jax.pipeline.config import RunConfig
from persyn_jax.pipeline.report_records import left_beside
from persyn_jax.pipeline.run import Stage, open_run, path_fingerprint, run_stage
from persyn_jax.pipeline.run_files import GAIN_AUDIT, REWARDS
from persyn_jax.pipeline.stages import STAGES


def make_config(folder: Path, *overrides: str) -> RunConfig:
    return small_config(f"run.folder={folder}", *overrides)


def run(stage: Stage, config: RunConfig, overwrite: bool = False) -> store.Manifest:
    with open_run(config, overwrite) as opened:
        return run_stage(stage, opened)


def make_stage(
    work,
    reads=(),
    section=lambda config: {"router": {"steps": config.router.steps}},
    may_read=(),
):
    return Stage(
        name="copy",
        modules=("persyn_jax.records",),
        reads=reads,
        writes=("copy.txt",),
        section=section,
        models=lambda config: (config.student,),
        files=lambda config: (),
        work=work,
        may_read=may_read,
    )


class Copying:
    """The work of a stage: writes a file with what it is told to, and counts."""

    def __init__(self):
        self.done = 0
        self.fails = False
        self.checkpoints: list[Path] = []

    def __call__(self, run, checkpoints: Path):
        self.done += 1
        self.checkpoints.append(checkpoints)
        checkpoints.mkdir(exist_ok=True)
        (checkpoints / "state").write_text("half way")
        if self.fails:
            raise RuntimeError("the machine is on fire")
        (run.folder / "copy.txt").write_text(f"copy {self.done}")
        return {"number": self.done, "measured": {"speed": 3.0}}


def test_a_finished_stage_is_not_run_again(tmp_path, capsys):
    work = Copying()
    first = run(make_stage(work), make_config(tmp_path))
    assert run(make_stage(work), make_config(tmp_path)) == first
    assert work.done == 1
    assert first.summary["number"] == 1
    assert first.summary["measured"]["speed"] == 3.0
    assert first.summary["measured"]["peak_memory_gb"] > 0.01
    assert first.config == {"router.steps": "20"}
    assert list(first.inputs) == ["model random:tiny"]
    assert capsys.readouterr().err.splitlines()[-1] == "copy: finished before"
    saved = configs.load(RunConfig, tmp_path / "smoke" / "config.yaml")
    assert saved == make_config(tmp_path)


def test_the_commit_of_a_model_from_the_hub_stands_in_the_manifest(tmp_path, monkeypatch):
    assert "hub_commits" not in run(make_stage(Copying()), make_config(tmp_path / "a")).summary
    monkeypatch.setattr(spec, "commit", lambda model: f"commit of {model.weights}")
    manifest = run(make_stage(Copying()), make_config(tmp_path / "b"))
    assert manifest.summary["hub_commits"] == {"random:tiny": "commit of random:tiny"}


def test_a_changed_config_is_refused_by_key_and_overwritten_on_request(tmp_path):
    work = Copying()
    run(make_stage(work), make_config(tmp_path))
    unchanged = (tmp_path / "smoke" / "config.yaml").read_text()
    other = make_config(tmp_path, "router.steps=30")
    with pytest.raises(ConfigError, match=r"config router\.steps changed \(20 -> 30\)\. --overwr"):
        run(make_stage(work), other)
    assert work.done == 1
    assert (tmp_path / "smoke" / "config.yaml").read_text() == unchanged
    assert run(make_stage(work), other, overwrite=True).summary["number"] == 2
    assert (tmp_path / "smoke" / "copy.txt").read_text() == "copy 2"


def test_what_a_stage_does_not_read_may_change(tmp_path):
    work = Copying()
    run(make_stage(work), make_config(tmp_path))
    run(make_stage(work), make_config(tmp_path, "training.epochs=9", "client.attempts=2"))
    assert work.done == 1


def test_a_changed_input_is_refused_and_a_missing_one_named(tmp_path):
    work = Copying()
    stage = make_stage(work, reads=("source.txt",))
    with pytest.raises(ConfigError, match=r"stage copy needs source\.txt; run the stage before it"):
        run(stage, make_config(tmp_path))
    source = tmp_path / "smoke" / "source.txt"
    source.write_text("one")
    run(stage, make_config(tmp_path))
    source.write_text("two")
    with pytest.raises(ConfigError, match=r"input source\.txt changed"):
        run(stage, make_config(tmp_path))
    assert work.done == 1


def test_an_input_that_may_be_missing_counts_from_when_it_is_there(tmp_path):
    work = Copying()
    stage = make_stage(work, may_read=("audit.json",))
    assert "audit.json" not in run(stage, make_config(tmp_path)).inputs
    (tmp_path / "smoke" / "audit.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"input audit\.json changed \(none -> .*--overwrite"):
        run(stage, make_config(tmp_path))
    assert "audit.json" in run(stage, make_config(tmp_path), overwrite=True).inputs
    assert work.done == 2


def test_the_report_takes_what_was_made_from_the_runs_own_files_alone(tmp_path, capsys):
    with open_run(make_config(tmp_path)) as opened:
        assert left_beside(opened, GAIN_AUDIT) is None
        (opened.folder / REWARDS).write_text("rewards")
        inputs = {REWARDS: path_fingerprint(opened.folder / REWARDS)}
        store.write_json(opened.folder / GAIN_AUDIT, {"inputs": inputs, "rows": 3})
        assert left_beside(opened, GAIN_AUDIT) == {"rows": 3}
        (opened.folder / REWARDS).write_text("other rewards")
        assert left_beside(opened, GAIN_AUDIT) is None
        assert "gain_audit.json: left out of the report: rewards.parquet" in capsys.readouterr().err
        (opened.folder / REWARDS).unlink()
        assert left_beside(opened, GAIN_AUDIT) is None


def test_a_folder_as_input_is_known_by_the_names_and_bytes_in_it(tmp_path):
    stage = make_stage(Copying(), reads=("router",))
    folder = tmp_path / "smoke" / "router"
    folder.mkdir(parents=True)
    (folder / "head").write_text("h")
    run(stage, make_config(tmp_path))
    (folder / "head").rename(folder / "heart")
    with pytest.raises(ConfigError, match="input router changed"):
        run(stage, make_config(tmp_path))


def test_a_stage_that_failed_keeps_its_checkpoints_and_is_run_again(tmp_path):
    work = Copying()
    work.fails = True
    with pytest.raises(RuntimeError, match="on fire"):
        run(make_stage(work), make_config(tmp_path))
    (kept,) = (tmp_path / "smoke" / "checkpoints").iterdir()
    assert (kept / "state").read_text() == "half way"
    work.fails = False
    run(make_stage(work), make_config(tmp_path))
    assert work.checkpoints == [kept, kept], "the same work finds its own checkpoints"
    assert list((tmp_path / "smoke" / "checkpoints").iterdir()) == []


def test_other_work_does_not_find_those_checkpoints(tmp_path):
    work = Copying()
    work.fails = True
    for steps in (20, 30):
        with pytest.raises(RuntimeError, match="on fire"):
            run(make_stage(work), make_config(tmp_path, f"router.steps={steps}"))
    assert len(set(work.checkpoints)) == 2


def test_config_keys_are_named_as_an_override_names_them(tmp_path):
    """Taken as overrides of a file with the same keys and no values, they give the same config."""
    stage = make_stage(Copying(), section=configs.to_values)
    config = make_config(tmp_path)
    overrides = [f"{key}={value}" for key, value in run(stage, config).config.items()]
    assert 'teachers.0.sampling.stop.1="e"' in overrides
    assert "sources.adding.counts.eval=4" in overrides
    (tmp_path / "blank.yaml").write_text(json.dumps(blank(configs.to_values(config))))
    assert configs.load(RunConfig, tmp_path / "blank.yaml", overrides) == config


def blank(values):
    """The same keys and indices, with null at every end."""
    if isinstance(values, dict) and values:
        return {key: blank(value) for key, value in values.items()}
    if isinstance(values, list) and values:
        return [blank(value) for value in values]
    return None


def test_every_stage_reads_only_what_an_earlier_one_wrote():
    written = {"metrics.jsonl"}
    for stage in STAGES:
        assert set(stage.reads) <= written, stage.name
        assert not set(stage.writes) & written, stage.name
        written |= set(stage.writes)


def test_the_source_of_every_stage_can_be_found():
    for stage in STAGES:
        for module in stage.modules:
            provenance.source_fingerprint(module)


# How endpoints are asked, where things lie, and the shapes of engines whose tokens are kept.
# Benchmarks are run apart, each with a manifest of its own.
WITHOUT_STAGE = {"run", "client", "service", "benchmarks"}


def test_every_key_of_the_config_belongs_to_a_stage():
    """Else a change of it would pass unnoticed. Models are known by their weights."""
    config = small_config("router.backbone={weights: other}")
    read = {"student", "router.backbone"}
    for stage in STAGES[:-1]:
        section = stage.section(config)
        assert section.pop("run") == {"seed": 0}
        read |= set(section)
    values = configs.to_values(config)
    assert {name for name in values if name not in read} == WITHOUT_STAGE
    del values["benchmarks"]
    assert STAGES[-1].section(config) == values


@pytest.mark.parametrize("stage", STAGES[:-1], ids=lambda stage: stage.name)
def test_a_stage_looks_at_no_part_of_the_config_that_its_fingerprint_leaves_out(stage):
    """By its source. How endpoints are asked and where things lie decides no result."""
    config = small_config("router.backbone={weights: other}")
    looked_at = set(re.findall(r"\bconfig\.(\w+)", inspect.getsource(stage.work)))
    models = [
        name
        for name in ("student", "router_backbone")
        if getattr(config, name) in stage.models(config)
    ]
    assert looked_at <= {"run", "client", *stage.section(config), *models}


def test_models_and_prompt_files_are_inputs_of_the_stages_that_read_them(tmp_path):
    config = small_config("sources.mine={kind: file, path: mine.jsonl}")
    files = {stage.name: [str(path) for path in stage.files(config)] for stage in STAGES}
    assert files == {stage.name: [] for stage in STAGES} | {"calibrate": ["mine.jsonl"]}
    models = {stage.name: len(stage.models(config)) for stage in STAGES}
    assert models == {stage.name: 1 for stage in STAGES} | {"report": 0}


def test_the_smoke_config_states_what_it_changes_and_nothing_else_is_hidden():
    """Its resolved form loads to the same config, through YAML and through JSON."""
    config = configs.load(RunConfig, SMOKE)
    for text in (configs.to_yaml(config), json.dumps(configs.to_values(config))):
        assert configs.validate(RunConfig, yaml.safe_load(text), where="resolved") == config
