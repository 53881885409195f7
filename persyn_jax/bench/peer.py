"""A contender in a process of its own: a command that reads one JSON task a line on standard input,
and answers each with one JSON line. It says one line of its own when it is ready."""

import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any

from persyn_jax.huge_pages import without_huge_pages


class Peer:
    """Such a command, running, in the environment that this program was started in.

    Raises RuntimeError when it ends before it is closed.
    """

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=without_huge_pages(os.environ),
        )
        self._read()  # it is ready

    def run(self, line: str) -> dict[str, Any]:
        """The answer to a task, given as its line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        with self._process:  # closes its pipes
            self._process.kill()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self.close()
            raise RuntimeError(f"peer {self.name!r} ended with status {status}")
        return json.loads(line)
