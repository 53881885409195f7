"""Checks that the commands that README.md shows can be given.

    uv run python .ci/check_readme.py

The scripts, options and configs that they name must be there, and where a script knows `--dry-run`
the command is given with it, so that its overrides are checked as well. Exits with 1 after printing
every command that fails.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROMISED = (
    "pip install uv && uv run scripts/run_persyn.py --config configs/quickstart.yaml",
    "pip install uv && uv run pytest",
)


def commands(readme: str) -> list[list[str]]:
    """The words of every `uv run` in a code block, without `uv run` itself."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    blocks = [text for kind, text in fenced if kind in ("", "bash", "sh", "console")]
    indented = re.findall(r"^ {4}(.*)$", readme, re.MULTILINE)
    lines = "\n".join([*blocks, *indented]).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.removeprefix("$ ").split("&&")]
    words = [
        shlex.split(part, comments=True) for part in parts if part.strip().startswith("uv run")
    ]
    return [line[2:] for line in words]


def complaint(words: list[str]) -> str | None:
    """Why the command cannot be given, in one line; None if it can."""
    missing = [
        word
        for word in words
        if re.match(r"(scripts|configs|tests)/", word) and not (ROOT / word).exists()
    ]
    if missing:
        return f"no such file: {missing[0]}"
    script = next((word for word in words if word.startswith("scripts/")), None)
    if script is None:
        return None
    arguments = words[words.index(script) + 1 :]
    help_text = given([script, "--help"]).stdout
    options = [word.split("=")[0] for word in arguments if word.startswith("--")]
    unknown = [option for option in options if option not in help_text]
    if unknown:
        return f"{script} has no option {unknown[0]}"
    if "--dry-run" in help_text and any(word.startswith("configs/") for word in arguments):
        result = given([script, *arguments, "--dry-run"])
        if result.returncode:
            return f"exits with {result.returncode}: {result.stderr.strip()}"
    return None


def given(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


def main() -> int:
    readme = (ROOT / "README.md").read_text()
    shown = commands(readme)
    complaints = [f"not shown: {command}" for command in PROMISED if command not in readme]
    for words in shown:
        why = complaint(words)
        if why:
            complaints.append(f"uv run {shlex.join(words)}: {why}")
    print("\n".join(complaints) or f"{len(shown)} commands of README.md can be given")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
