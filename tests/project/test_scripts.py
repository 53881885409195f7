"""Every script explains itself at once, and answers a missing input with one line."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRESENT = {path.name for path in (ROOT / "scripts").glob("*.py")}
DOCUMENTED = {
    "train_speed.py",
    "sampling_speed.py",
    "run_persyn.py",
    "calibrate.py",
    "score.py",
    "train_router.py",
    "route.py",
    "generate.py",
    "train_student.py",
    "evaluate.py",
    "evaluate_benchmarks.py",
    "export_data.py",
    "import_answers.py",
    "replay_check.py",
    "resume_check.py",
    "fuzz_loaders.py",
    "report.py",
    "serve_router.py",
    "serve_teacher.py",
    "service_load.py",
    "compile_report.py",
    "gossip_consensus.py",
    "gossip_bench.py",
    "check_pod.py",
    "run_batch.py",
    "check_endpoint.py",
    "client_speed.py",
    "study.py",
    "routing_scale.py",
    "router_study.py",
    "gain_audit.py",
}
# Those that ask an endpoint, or make files for a run, take no config; each with arguments whose
# input is missing.
WITHOUT_CONFIG = {
    "run_batch.py": ["-i", "nowhere.yaml", "-o", "out", "--base-url", "http://localhost:9/v1"],
    "check_endpoint.py": ["nowhere.yaml"],
    "import_answers.py": ["--format", "p2l", "nowhere.yaml", "--out", "out"],
}
# What else a script with a config must be told.
REQUIRED = {
    "export_data.py": ["--format", "trl", "--out", "out"],
    "evaluate_benchmarks.py": ["--lm-eval", "lm_eval"],
}
# Those that need a package which is not installed, and so get no further than saying so.
NEEDS_MORE = {"fuzz_loaders.py"}
SCRIPTS = sorted(PRESENT | DOCUMENTED)


def run(script: str, *words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """The script as a user runs it, from a folder that is not the project's."""
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def seconds_of_children() -> float:
    """Processor time, which unlike the clock does not depend on what else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_every_documented_script_is_there():
    assert set() == DOCUMENTED - PRESENT


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_needs_no_jax(tmp_path, script):
    """A `jax` that cannot be imported stands before the real one."""
    (tmp_path / "jax.py").write_text("raise ImportError('imported jax to print a help text')")
    before = seconds_of_children()
    result = run(script, "--help", folder=tmp_path, PYTHONPATH=str(tmp_path))
    seconds = seconds_of_children() - before
    assert (result.returncode, result.stderr) == (0, "")
    assert script in result.stdout
    assert ("--config" in result.stdout) == (script not in WITHOUT_CONFIG.keys() | NEEDS_MORE)
    assert seconds < 2


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - NEEDS_MORE))
def test_missing_input_is_one_line_and_exit_code_2(tmp_path, script):
    words = WITHOUT_CONFIG.get(script, ["--config", "nowhere.yaml", *REQUIRED.get(script, [])])
    result = run(script, *words, folder=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.endswith("\n")
    (line,) = result.stderr.splitlines()
    assert "nowhere.yaml" in line
    assert list(tmp_path.iterdir()) == []
