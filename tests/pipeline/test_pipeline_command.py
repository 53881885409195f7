"""How scripts end, and what they say meanwhile."""

import io
import json
import os
import signal
import sys
import time

import pytest

from persyn_jax.config import ConfigError
from persyn_jax.pipeline import progress as progress_file
from persyn_jax.pipeline.command import end_with_one_line, make_parser, print_summary
from persyn_jax.pipeline.progress import progress
from persyn_jax.sampling.client import EndpointError


@pytest.fixture(autouse=True)
def signals():
    """`end_with_one_line` takes SIGTERM over, for good."""
    terminate = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, terminate)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("a.yaml: no such config file"), 2, "a.yaml: no such config file"),
        (EndpointError("teacher 'a': failed 5 times"), 1, "teacher 'a': failed 5 times"),
        (FloatingPointError("training step 3: not finite"), 1, "training step 3: not finite"),
        (OSError("disk full"), 1, "disk full"),
        (RuntimeError("two\n  lines"), 1, "two lines"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here"),
    ],
)
def test_every_failure_ends_with_one_line_and_its_code(capsys, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        end_with_one_line(main)
    assert ended.value.code == code
    assert capsys.readouterr() == ("", f"error: {line}\n")


def test_a_bug_keeps_its_traceback():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        end_with_one_line(main)


def test_sigterm_ends_like_ctrl_c_on_the_way_out_of_every_block():
    left = []

    def main():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            left.append("block")

    with pytest.raises(SystemExit) as ended:
        end_with_one_line(main)
    assert (ended.value.code, left) == (130, ["block"])


def test_success_says_nothing_of_its_own(capsys):
    end_with_one_line(lambda: None)
    assert capsys.readouterr() == ("", "")


def test_overrides_may_stand_before_between_and_after_options():
    words = ["a.b=1", "--config", "c.yaml", "c=2", "--json", "s.json", "d=3"]
    arguments = make_parser("A script.").parse_intermixed_args(words)
    assert arguments.overrides == ["a.b=1", "c=2", "d=3"]
    assert (str(arguments.config), str(arguments.json)) == ("c.yaml", "s.json")


def test_a_summary_is_printed_and_written_alike(tmp_path, capsys):
    print_summary({"answers": 3, "text": "\u00fc"}, tmp_path / "summary.json")
    printed = json.loads(capsys.readouterr().out)
    assert (
        printed
        == json.loads((tmp_path / "summary.json").read_text())
        == {
            "answers": 3,
            "text": "\u00fc",
        }
    )


def test_progress_elsewhere_than_on_a_terminal_is_a_plain_line_now_and_then(capsys, monkeypatch):
    """Six seconds a piece: a line when 15 have passed since the last, none for the last piece."""
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress_file.time, "monotonic", lambda: float(next(clock)))
    with progress("score", 7) as advance:
        for _ in range(7):
            advance()
    assert capsys.readouterr() == (
        "",
        "  score 3/7, about 24 s left\n  score 6/7, about 6 s left\n",
    )


def test_progress_takes_several_pieces_at_once_and_shows_the_word(capsys, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress_file.time, "monotonic", lambda: float(next(clock)))
    with progress("calibrate", 100) as advance:
        advance(25, "1.2 answers/s")
    assert capsys.readouterr().err == "  calibrate 25/100, about 60 s left, 1.2 answers/s\n"


def test_progress_on_a_terminal_is_a_bar_with_the_word(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress("calibrate", 100) as advance:
        advance(25, "1.2 answers/s")
    shown = sys.stderr.getvalue()
    assert "25/100" in shown
    assert "1.2 answers/s" in shown
