"""The checks of .ci/ that are no tests themselves let good trees pass and say what is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parents[2] / ".ci"


def run(check: Path, *words: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, check, *words], capture_output=True, text=True)


def test_banned_calls_are_each_found_where_they_stand(tmp_path):
    lines = [
        ("import os, pickle", "import of pickle"),
        ("from dill import loads", "import of dill"),
        ("torch.load('weights')", "call of torch.load"),
        ("np.load('table', allow_pickle=True)", "allow_pickle in a call of np.load"),
        ("yaml.load(text)", "call of yaml.load without Loader=_StrictLoader"),
        ("yaml.load(text, Loader=yaml.Loader)", "call of yaml.load without Loader=_StrictLoader"),
        ("yaml.unsafe_load(text)", "call of yaml.unsafe_load"),
        ("eval(text)", "call of eval"),
        ("def late():  exec(text)", "call of exec"),
    ]
    path = tmp_path / "room" / "bad.py"
    path.parent.mkdir()
    path.write_text("\n".join(line for line, _ in lines))
    result = run(CHECKS / "banned_calls.py", tmp_path)
    expected = {f"{path}:{number}: {what}" for number, (_, what) in enumerate(lines, start=1)}
    assert set(result.stdout.splitlines()) == expected
    assert result.returncode == 1


def test_calls_that_only_look_alike_pass(tmp_path):
    (tmp_path / "good.py").write_text(
        "model.eval()\n"
        "np.load('table', allow_pickle=False)\n"
        "yaml.load(text, Loader=_StrictLoader)\n"
        "text = 'import pickle; eval(x)'\n"
    )
    assert run(CHECKS / "banned_calls.py", tmp_path).returncode == 0


ANSWER = {"mean": 0.5, "ci95": [0.4, 0.6]}
REPORT = {
    "run": {},
    "prompts": {},
    "teachers": {},
    "rewards": {
        "alpha": 0.4,
        "alpha_sweep": {
            alpha: {"agreement": 1.0, "share": {"a": 0.7, "b": 0.3}} for alpha in ("0", "0.4", "1")
        },
    },
    "router": {
        "strategies": {"router": {"regret": 0.1}, "oracle": {"regret": 0.0}},
        "largest_losses": [{"loss": 2.0}, {"loss": 0.5}],
        "regret": dict.fromkeys(
            ["router", "best_constant", "best_per_source", "knn", "random", "oracle"], 0.1
        ),
        "verdict": "The router is better than the best constant teacher.",
    },
    "cost": {"answers_generated": 10, "answers_generate_then_select": 30},
    "student": {"before": ANSWER, "after": ANSWER, "paired_difference": ANSWER},
    "gossip": {"workers": 2, "exchanges": 3, "sum_weight_total": 1.0, "compiled_programs": 1},
    "stages": {},
    "gain_audit": None,
    "benchmarks": None,
}


def check_report(folder: Path, report: dict, page: str = "<img src='data:image/png;base64,'>"):
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "report.html").write_text(page)
    return run(CHECKS / "check_report.py", folder)


def test_documented_report_passes(tmp_path):
    assert check_report(tmp_path, REPORT).returncode == 0


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("extra", {}),
        ("cost.answers_generated", 30),
        ("router.verdict", None),
        ("router.strategies", {"oracle": {"regret": 0.0}}),
        ("router.largest_losses", [{"loss": 0.5}, {"loss": 2.0}]),
        ("rewards.alpha_sweep", {"0.4": {"agreement": 1.0, "share": {"a": 1.0}}}),
        ("rewards.alpha", 0.5),
        ("student.after.mean", 0.7),
        ("gossip.exchanges", 0),
        ("gossip.sum_weight_total", 1.001),
    ],
)
def test_report_with_a_wrong_value_is_refused(tmp_path, path, value):
    report = json.loads(json.dumps(REPORT))
    *sections, key = path.split(".")
    target = report
    for section in sections:
        target = target[section]
    target[key] = value
    result = check_report(tmp_path, report)
    assert result.returncode == 1
    assert key in result.stderr.splitlines()[-1]


def test_report_without_a_baseline_is_refused(tmp_path):
    report = json.loads(json.dumps(REPORT))
    del report["router"]["regret"]["knn"]
    result = check_report(tmp_path, report)
    assert result.returncode == 1
    assert "knn" in result.stderr.splitlines()[-1]


def test_page_that_fetches_something_is_refused(tmp_path):
    result = check_report(tmp_path, REPORT, "<script src='https://cdn.example/plot.js'></script>")
    assert result.returncode == 1
    assert "plot.js" in result.stderr.splitlines()[-1]


README = """\
```bash
pip install uv && uv run scripts/run_persyn.py --config configs/quickstart.yaml
pip install uv && uv run pytest
```
Later:

    $ uv run scripts/run_persyn.py \\
          --config configs/quickstart.yaml seed=1   # another seed
"""
SCRIPT = """\
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--config")
parser.add_argument("--dry-run", action="store_true")
parser.add_argument("overrides", nargs="*")
arguments = parser.parse_args()
raise SystemExit(0 if arguments.dry_run and arguments.overrides in ([], ["seed=1"]) else 2)
"""


def check_readme(root: Path, readme: str) -> subprocess.CompletedProcess:
    for folder in (".ci", "scripts", "configs"):
        (root / folder).mkdir()
    shutil.copy(CHECKS / "check_readme.py", root / ".ci")
    (root / "scripts" / "run_persyn.py").write_text(SCRIPT)
    (root / "configs" / "quickstart.yaml").touch()
    (root / "README.md").write_text(readme)
    return run(root / ".ci" / "check_readme.py")


def test_readme_whose_commands_work_passes(tmp_path):
    result = check_readme(tmp_path, README)
    assert (result.returncode, result.stdout[:2]) == (0, "3 "), result.stdout


@pytest.mark.parametrize(
    ("shown", "instead", "complaint"),
    [
        ("uv run pytest", "pytest", "not shown: pip install uv && uv run pytest"),
        ("scripts/run_persyn.py \\", "scripts/run_all.py \\", "no such file: scripts/run_all.py"),
        ("quickstart.yaml seed=1", "other.yaml", "no such file: configs/other.yaml"),
        ("seed=1", "--sede", "scripts/run_persyn.py has no option --sede"),
        ("seed=1", "sede=1", "exits with 2"),
    ],
)
def test_readme_with_a_command_that_fails_is_refused(tmp_path, shown, instead, complaint):
    result = check_readme(tmp_path, README.replace(shown, instead))
    assert result.returncode == 1
    assert complaint in result.stdout
