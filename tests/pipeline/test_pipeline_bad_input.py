"""Bad input ends with one line that names what and where, the right exit code, and no traceback."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
from pipeline_runs import ROOT, SMOKE, Ended, run_here, small_config

from persyn_jax.config import ConfigError
from persyn_jax.pipeline.run import Run

PROMPTS = [
    {
        "id": f"{split}-{number}",
        "prompt": f"Say {split} {number}",
        "answer": str(number),
        "split": split,
    }
    for split in ("calibration", "train", "eval")
    for number in range(2)
]
SOURCES = "sources={mine: {kind: file, path: prompts.jsonl}}"


@pytest.fixture
def script(tmp_path, monkeypatch, capfd):
    """Runs a script here, in an empty folder but for six good prompts."""
    write_prompts(tmp_path, PROMPTS)

    def run(name: str, *words: str, config=SMOKE) -> Ended:
        arguments = ("--config", str(config), SOURCES, *words)
        return run_here(name, *arguments, folder=tmp_path, monkeypatch=monkeypatch, capfd=capfd)

    return run


def write_prompts(folder, rows: list[dict]) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def refused(ended: Ended, *fragments: str, code: int = 2) -> None:
    assert (ended.code, ended.stdout) == (code, "")
    for fragment in fragments:
        assert fragment in ended.error


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("training.epoks=2", ["training.epoks: unknown key"]),
        ("rewards.alpha=1.5", ["rewards.alpha", "less than or equal to 1", "1.5"]),
        ("training.optimiser.warmup_fraction=2", ["training.optimiser.warmup_fraction", "2"]),
        ("gossip.workers=0", ["gossip.workers", "greater than or equal to 1", "0"]),
        ("run.name=..", ["run.name", "'..'"]),
        ("service=null", ["teachers", "'plain'", "no base_url", "no service section"]),
        ("teachers.1.name=plain", ["teachers", "'plain' is given twice"]),
        ("teachers.0.max_tokens=5", ["teachers.0.max_tokens: unknown key"]),
        ("training.rows", ["override 'training.rows'", "section.key=value"]),
    ],
)
def test_impossible_values_are_refused_before_anything_is_made(
    script, tmp_path, override, fragments
):
    refused(script("run_persyn.py", override), *fragments)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_a_missing_config_is_named(script):
    refused(script("run_persyn.py", config="nowhere.yaml"), "nowhere.yaml: no such config file")


def test_a_missing_prompt_file_is_named(script, tmp_path):
    (tmp_path / "prompts.jsonl").unlink()
    refused(script("run_persyn.py"), "prompts.jsonl: no such file")
    refused(script("run_persyn.py", "--dry-run"), "prompts.jsonl: no such file")


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        ({"id": "x", "split": "train"}, ["prompts.jsonl:7", "`messages` or `prompt`"]),
        (
            {"id": "x", "split": "train", "messages": []},
            ["prompts.jsonl:7", "at least one message"],
        ),
        (
            {"id": "train-1", "split": "train", "prompt": "Say 9"},
            ["prompts.jsonl:7", "'train-1' is also that of prompts.jsonl:4"],
        ),
        ({"id": "x", "prompt": "Say 9"}, ["prompts.jsonl:7", "no split"]),
    ],
)
def test_a_bad_prompt_is_named_by_file_and_line(script, tmp_path, row, fragments):
    write_prompts(tmp_path, [*PROMPTS, row])
    refused(script("run_persyn.py"), *fragments)


def test_nothing_to_score_the_student_by_is_said_at_the_start(script, tmp_path):
    write_prompts(tmp_path, [{k: v for k, v in row.items() if k != "answer"} for row in PROMPTS])
    refused(script("run_persyn.py"), "no eval prompt has a reference answer")


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        (
            "training.row_tokens=99",
            ["context too long: prompt 'calibration-0'", "exceeds training.row_tokens 99"],
        ),
        (
            "training.row_response_tokens=63",
            ["training.row_response_tokens 63", "largest max_tokens, 64"],
        ),
        (
            "service.engine.cache_length=128",
            ["prompt 'calibration-0'", "64 of teacher 'terse'", "service.engine.cache_length 128"],
        ),
        (
            "evaluation.engine.cache_length=32",
            ["prompt 'eval-0'", "evaluation.max_tokens 16", "evaluation.engine.cache_length 32"],
        ),
    ],
)
def test_a_context_that_is_too_long_is_found_before_anyone_is_asked(
    script, tmp_path, override, fragments
):
    refused(script("run_persyn.py", override), *fragments)
    refused(script("run_persyn.py", override, "--dry-run"), *fragments)
    assert not (tmp_path / "runs" / "answers.sqlite").exists()


def test_a_teacher_endpoint_that_is_down_is_named_after_all_retries(script, tmp_path):
    with socket.socket() as unused:  # bound and not listening: refuses every connection
        unused.bind(("127.0.0.1", 0))
        base_url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        elsewhere = [
            f"teachers.{number}.{key}={value}"
            for number in range(3)
            for key, value in (("base_url", base_url), ("model", "there"))
        ]
        ended = script("run_persyn.py", *elsewhere, "client.attempts=2")
    refused(ended, f"at {base_url}", "failed 2 times", code=1)
    assert not (tmp_path / "runs" / "smoke" / "prompts.parquet").exists()


def test_a_port_that_is_taken_is_named(script):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = script("serve_teacher.py", "--port", str(port))
    refused(ended, f"cannot listen on 127.0.0.1:{port}: Address already in use")


def test_a_service_that_the_config_does_not_have_is_not_served(script):
    elsewhere = [
        f"teachers.{number}.{key}={value}"
        for number in range(3)
        for key, value in (("base_url", "http://127.0.0.1:1/v1"), ("model", "there"))
    ]
    refused(script("serve_teacher.py", "service=null", *elsewhere), "has no service section")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(100), bytes(1000)])
def test_a_corrupt_gguf_file_is_named(script, tmp_path, content):
    (tmp_path / "student.gguf").write_bytes(content)
    refused(script("run_persyn.py", "student.weights=student.gguf"), "student.gguf")


def test_weights_that_are_not_there_or_not_the_expected_ones_are_named(script, tmp_path):
    refused(script("run_persyn.py", "student.weights=./student"), "'./student'", "no such file")
    (tmp_path / "student.gguf").write_bytes(b"other")
    other = "a" * 64
    changed = f"service.model={{weights: student.gguf, sha256: {other}}}"
    refused(script("run_persyn.py", changed), "student.gguf", "SHA-256", f"expected {other}")


def test_a_corrupt_safetensors_file_stops_the_service_with_its_name(tmp_path, finished_run):
    """In a process of its own: the service ends its process."""
    folder = shutil.copytree(finished_run.place.run / "student", tmp_path / "student")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    ended = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "serve_teacher.py", "--config", SMOKE),
            *("--port", "0", f"service.model.weights={folder}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2
    assert str(weights) in Ended(ended.returncode, ended.stdout, ended.stderr).error


@pytest.mark.parametrize(
    ("stage", "missing"),
    [
        ("score", "prompts.parquet"),
        ("train_router", "prompts.parquet"),
        ("generate", "prompts.parquet"),
        ("report", "prompts.parquet"),
    ],
)
def test_a_stage_before_its_time_says_what_it_needs(script, stage, missing):
    refused(
        script(f"{stage}.py"), f"stage {stage} needs {missing}", "run the stage before it first"
    )


def test_a_dry_run_counts_and_leaves_no_trace(script, tmp_path):
    """6 prompts: 2 of them for calibration, which all 3 teachers answer."""
    ended = script("run_persyn.py", "--dry-run")
    assert ended.code == 0, ended.stderr
    assert "2 calibration, 2 train, 2 eval" in ended.stdout
    assert f"{2 + 2 + 2 * 2} (every teacher on every prompt: {(2 + 2) * 3})" in ended.stdout
    for stage in ("calibrate", "score", "generate", "train_student", "evaluate"):
        assert f"tokens {stage}" in ended.stdout
    assert "up to the report" in ended.stdout
    assert "GB" in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_more_workers_than_devices_is_an_error_of_the_config():
    """The tests run with eight host devices."""
    with pytest.raises(ConfigError, match=r"gossip\.workers x mesh\..*: 9 devices are needed, and"):
        Run(small_config("gossip.workers=9")).mesh()
