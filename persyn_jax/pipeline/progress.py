"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

_SECONDS_BETWEEN_LINES = 15.0


class Advance(Protocol):
    """Says that `count` more pieces of work are done, with a word on how it goes."""

    def __call__(self, count: int = 1, word: str = "") -> None: ...


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """Yields a function to call whenever some of the `total` pieces of work are done.

    It shows how many are done, the time left, and the word.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            "{task.fields[word]}",
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total, word="")

            def advance(count: int = 1, word: str = "") -> None:
                bar.update(task, advance=count, word=word)

            yield advance
    else:
        yield _plain_lines(label, total)


def _plain_lines(label: str, total: int) -> Advance:
    started = last = time.monotonic()
    done = 0

    def advance(count: int = 1, word: str = "") -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES and 0 < done < total:
            left = (now - started) / done * (total - done)
            say(f"  {label} {done}/{total}, about {left:.0f} s left" + (word and f", {word}"))
            last = now

    return advance


def say(line: str) -> None:
    """A line for the person who watches; results go to files."""
    print(line, file=sys.stderr, flush=True)
