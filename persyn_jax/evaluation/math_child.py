"""The program of a process that compares answers of mathematics: see `math_answers`.

`math_child.py SECONDS`: lines of JSON on standard input, [answer text, reference] each; for each a
line with the verdict. Before that, the line "started".
"""

import json
import logging
import os
import re
import resource
import signal
import sys
from pathlib import Path

_MEMORY_BYTES = 1 << 30


def main() -> None:
    logging.disable()  # the packages tell at length of what they cannot read
    verdicts = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # whatever they print, it is no verdict
    from math_verify import parse, verify

    def compare(text: str, reference: str) -> str:
        expected = parse(_marked(reference), parsing_timeout=0)
        if not expected:
            return "unreadable"
        found = parse(text, parsing_timeout=0)
        return "right" if verify(expected, found, timeout_seconds=0) else "wrong"

    cpu_seconds = float(sys.argv[1])
    compare("$1$", "$1$")  # loads what is loaded late
    _limit_memory()
    print("started", file=verdicts, flush=True)
    for line in sys.stdin:
        # The signal's default action ends the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            verdict = compare(*json.loads(line))
        except MemoryError:
            verdict = "stopped"
        except Exception:  # SymPy raises whatever it meets
            verdict = "wrong"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, file=verdicts, flush=True)


def _marked(reference: str) -> str:
    """The reference as mathematics: an expression that nothing marks as such stands between `$`."""
    expression = reference.rpartition("####")[2].strip()
    marked = re.search(r"\$|\\boxed|\\\(|\\\[", expression)
    return expression if marked else f"${expression}$"


def _limit_memory() -> None:
    """What the imports took, and so much more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
