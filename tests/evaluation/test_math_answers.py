"""Mathematics compared in other processes: what is right, and what takes too long."""

import time

import pytest

from persyn_jax.evaluation import math_answers
from persyn_jax.evaluation.math_answers import compare
from persyn_jax.evaluation.verifiers import Case, verify

RIGHT = [
    ("0.5", "1/2"),
    (r"So it is \boxed{\frac{1}{2}}.", "0.5"),
    (r"Therefore $x^2 + 2x + 1$", r"(x+1)^2"),
    (r"The solutions are $\{2, 1\}$", r"\{1,2\}"),
    ("The total is 1,234", "She sells 1000 and 234.\n#### 1,234"),
    (r"\boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt{2}}"),
    ("First 3, then 4. The answer is 7.", "7"),
]
WRONG = [
    ("0.6", "1/2"),
    (r"\boxed{2}", r"\frac{1}{2}"),
    ("I do not know.", "7"),
    ("7 or 8: the answer is 8.", "7"),
]
HANGING = r"\boxed{9^{9^{9^{9^{9}}}}}"


@pytest.fixture(scope="module")
def verdict_of():
    """Of all of these, asked one after the other of one process while it lives."""
    pairs = [*RIGHT, (HANGING, "7"), *WRONG, ("7", "")]
    began = time.monotonic()
    found = dict(zip(pairs, compare(pairs, cpu_seconds=1.0), strict=True))
    assert time.monotonic() - began < 100
    return found


def test_the_known_probes(verdict_of):
    assert [pair for pair in RIGHT if verdict_of[pair] != "right"] == []
    assert [pair for pair in WRONG if verdict_of[pair] != "wrong"] == []


def test_what_takes_too_long_is_stopped_and_those_after_it_are_compared(verdict_of):
    assert verdict_of[HANGING, "7"] == "stopped"
    assert verdict_of["7", ""] == "unreadable"


def test_zeros_that_mean_something_else_than_wrong_are_counted(monkeypatch):
    verdict_of = {"7": "right", "8": "wrong", "9": "stopped", "x": "unreadable"}
    compared = []

    def compare(pairs):
        compared.extend(pairs)
        return [verdict_of[text] for text, _ in pairs]

    monkeypatch.setattr(math_answers, "compare", compare)
    texts = ["7", "8", "9", "9", "x", "7"]
    cases = [Case("math", text, "7") for text in texts] + [Case("exact_match", "7", "7")]
    verified = verify(cases)
    assert verified.scores == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert verified.counts == {"math_stopped": 2, "math_unreadable": 1}
    assert compared == [(text, "7") for text in "789x"]  # none twice


def test_without_mathematics_no_process_is_started(monkeypatch):
    monkeypatch.setattr(math_answers.subprocess, "Popen", None)
    assert verify([Case("exact_match", "7", "7")] * 2) == ([1.0, 1.0], {})
    assert verify([]) == ([], {})


def test_a_process_that_does_not_start_is_no_verdict(monkeypatch, tmp_path):
    broken = tmp_path / "child.py"
    broken.write_text("raise SystemExit(1)")
    monkeypatch.setattr(math_answers, "_CHILD", broken)
    with pytest.raises(RuntimeError, match="does not start"):
        compare([("7", "7")])


def test_time_that_the_process_does_not_have_makes_nothing_wrong(monkeypatch, tmp_path):
    """A process that gets no processor for longer than its deadline, as on a busy machine."""
    slow = tmp_path / "child.py"
    slow.write_text(
        "import sys, time\nprint('started', flush=True)\n"
        "for line in sys.stdin:\n    time.sleep(0.5)\n    print('right', flush=True)\n"
    )
    monkeypatch.setattr(math_answers, "_CHILD", slow)
    assert compare([("7", "7")] * 3, cpu_seconds=0.1) == ["right"] * 3
