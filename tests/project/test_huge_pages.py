"""A script asks for huge pages by starting anew, and that shows nowhere else."""

import json
import os
import subprocess
import sys

import pytest

from persyn_jax.bench.peer import Peer
from persyn_jax.huge_pages import without_huge_pages

SCRIPT = """
import json, os, sys
from persyn_jax.huge_pages import ask_for_huge_pages
if __name__ == "__main__":
    print(os.getpid(), flush=True)
    ask_for_huge_pages()
    print(json.dumps([sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), sys.stdin.read()]))
"""
MAIN = "__main__"
# On other systems nothing happens.
ASKED = (2, "glibc.malloc.hugetlb=1") if sys.platform == "linux" else (1, None)


def environment(tunables: str | None) -> dict[str, str]:
    plain = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    return plain if tunables is None else plain | {"GLIBC_TUNABLES": tunables}


@pytest.mark.parametrize(
    ("tunables", "starts", "found"),
    [
        (None, *ASKED),
        ("", 1, ""),
        ("glibc.malloc.arena_max=2", 1, "glibc.malloc.arena_max=2"),
    ],
)
def test_a_script_starts_anew_once_with_its_arguments_and_input(tmp_path, tunables, starts, found):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    words = ["--a", "b c", ""]
    ended = subprocess.run(
        [sys.executable, path, *words],
        input="asked",
        env=environment(tunables),
        capture_output=True,
        text=True,
        check=True,
    )
    *pids, told = ended.stdout.splitlines()
    assert len(pids) == starts
    assert len(set(pids)) == 1, "the process is the same: signals and its parent still find it"
    assert json.loads(told) == [words, found, "asked"]


def test_a_script_that_another_program_runs_does_not_start_that_anew(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    run = f"import runpy, sys; sys.argv = ['x']; runpy.run_path({str(path)!r}, None, {MAIN!r})"
    ended = subprocess.run(
        [sys.executable, "-c", run],
        input="asked",
        env=environment(None),
        capture_output=True,
        text=True,
        check=True,
    )
    pid, told = ended.stdout.splitlines()
    assert pid.isdigit()
    assert json.loads(told) == [[], None, "asked"]


@pytest.mark.parametrize(
    ("tunables", "left"),
    [("glibc.malloc.hugetlb=1", None), ("glibc.malloc.hugetlb=2", "glibc.malloc.hugetlb=2")],
)
def test_a_peer_starts_as_if_by_hand(monkeypatch, tunables, left):
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    told = "import json, os; print(json.dumps(os.environ.get('GLIBC_TUNABLES')), flush=True)"
    code = f"{told}\n{told}\ninput()"
    peer = Peer("one", [sys.executable, "-c", code])
    try:
        assert peer.run("\n") == left
    finally:
        peer.close()
    assert without_huge_pages(os.environ).get("GLIBC_TUNABLES") == left
