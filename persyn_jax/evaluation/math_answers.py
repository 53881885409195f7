"""Answers of mathematics, compared by math-verify: `1/2` is `0.5`, whatever is said around it.

SymPy may work on an answer for ever, or take all memory (`9^{9^{9^9}}`), so the comparing is done
by a few other processes: each has a time and 1 GB of memory an answer, and a new one takes its
place when it dies of that. The time is the process's own on the processor, from when it begins with
the answer: neither a queue nor a busy machine makes a right answer wrong.
"""

import collections
import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, cast

from persyn_jax.evaluation import math_child

CPU_SECONDS = 5.0
"""Processor time that an answer may take; nearly all take milliseconds."""

Verdict = Literal["right", "wrong", "stopped", "unreadable"]
"""`stopped`: out of time, or of memory where math-verify does not take that for wrong.
`unreadable`: nothing in the reference reads as mathematics, so nothing can be right."""

_CHILD = Path(math_child.__file__)  # imported, so that a stage's fingerprint covers its source
_PAIRS_PER_CHILD = 16  # a process takes about as long to start as to compare so many
_CLOCK_SECONDS = 600.0  # for a process that does not even run


class _Task(NamedTuple):
    place: int
    """Of the pair."""
    since: float


def compare(pairs: Sequence[tuple[str, str]], cpu_seconds: float = CPU_SECONDS) -> list[Verdict]:
    """The verdict on each (answer text, reference), in order.

    Of an answer, what stands in `\\boxed{}` counts first, then LaTeX, then plain numbers. A
    reference is one expression, with or without `$` around it, or a text whose last line holds it
    after `####`.
    """
    verdicts: list[Verdict] = ["stopped"] * len(pairs)
    waiting = collections.deque(range(len(pairs)))
    with _Children(cpu_seconds) as children:
        for _ in range(min(_cores(), -(-len(pairs) // _PAIRS_PER_CHILD))):
            children.begin(pairs, waiting.popleft())
        while children.tasks:
            for place, verdict in children.finished():
                verdicts[place] = verdict
                if waiting:
                    children.begin(pairs, waiting.popleft())
    return verdicts


class _Children:
    """The processes, and what each is at."""

    def __init__(self, cpu_seconds: float):
        self._cpu_seconds = cpu_seconds
        self._selector = selectors.DefaultSelector()
        self._started: set[subprocess.Popen[bytes]] = set()
        self._idle: list[subprocess.Popen[bytes]] = []
        self.tasks: dict[subprocess.Popen[bytes], _Task] = {}

    def begin(self, pairs: Sequence[tuple[str, str]], place: int) -> None:
        """Gives the pair to an idle process, or to a new one."""
        child = self._idle.pop() if self._idle else self._start()
        self.tasks[child] = _Task(place, time.monotonic())
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it died of shows at its other end
            data = memoryview(json.dumps(pairs[place]).encode() + b"\n")
            while data:
                data = data[child.stdin.write(data) :]

    def finished(self) -> Iterator[tuple[int, Verdict]]:
        """Waits for some of them: (place of the pair, verdict) of those that have one.

        Raises RuntimeError if a process ends before it has begun.
        """
        for key, _ in self._selector.select(timeout=self._cpu_seconds):
            child = key.data
            assert child.stdout is not None
            word = child.stdout.readline().decode().strip()  # one: what follows stays in the pipe
            if not word and child not in self._started:
                raise RuntimeError("the process that compares mathematics does not start")
            self._started.add(child)
            if word == "started":
                continue
            task = self.tasks.pop(child)
            if word:
                self._idle.append(child)
            else:
                self._end(child)
            yield task.place, cast(Verdict, word or "stopped")
        late = time.monotonic() - _CLOCK_SECONDS
        for child, task in list(self.tasks.items()):
            if task.since < late:
                del self.tasks[child]
                self._end(child)
                yield task.place, "stopped"

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD), str(self._cpu_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        assert child.stdout is not None
        self._selector.register(child.stdout, selectors.EVENT_READ, child)
        return child

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        self._selector.unregister(child.stdout)
        child.kill()
        child.communicate()

    def __enter__(self) -> "_Children":
        return self

    def __exit__(self, *exception) -> None:
        for child in (*self.tasks, *self._idle):
            self._end(child)
        self._selector.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0))
