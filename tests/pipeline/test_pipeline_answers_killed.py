"""Asking is killed at random moments; what was committed is never asked again."""

import contextlib
import json
import random
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from persyn_jax.bench.mock_endpoint import mock_endpoint
from persyn_jax.pipeline.answers import teacher_fingerprint
from persyn_jax.sampling.config import TeacherConfig
from persyn_jax.store import answer_key

QUESTIONS, CONCURRENCY, KILLS = 800, 8, 3
ASK = """
import sys
from pathlib import Path
from persyn_jax.pipeline.answers import Ask, collect_answers
from persyn_jax.records import Prompt
from persyn_jax.sampling.config import ClientConfig, TeacherConfig
from persyn_jax.store import AnswerStore

path, url, questions, concurrency = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
teacher = TeacherConfig(name="mock", base_url=url, model="mock", licence="MIT")
asks = [
    Ask(Prompt(n, [{"role": "user", "content": n}], "", "train", None, "", "MIT"), teacher)
    for n in map(str, range(questions))
]
with AnswerStore(path) as store:
    client = ClientConfig(concurrency=concurrency)
    collect_answers(asks, None, store, client, lambda: ("", ""), "ask")
"""


def start(answers: Path, url: str) -> subprocess.Popen:
    words = [sys.executable, "-c", ASK, str(answers), url, str(QUESTIONS), str(CONCURRENCY)]
    return subprocess.Popen(words, stderr=subprocess.DEVNULL)


def committed(answers: Path) -> set[str]:
    """The keys in the store."""
    if not answers.exists():
        return set()
    with contextlib.closing(sqlite3.connect(f"file:{answers}?mode=ro", uri=True)) as connection:
        try:
            return {key for (key,) in connection.execute("SELECT key FROM answers")}
        except sqlite3.OperationalError:  # its table is being made
            return set()


def asked(url: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{url}/asked") as response:
        return json.load(response)


def test_a_kill_loses_at_most_what_was_under_way_and_nothing_committed_is_asked_twice(tmp_path):
    """The endpoint counts what it is asked."""
    answers, moments = tmp_path / "answers.sqlite", random.Random()
    with mock_endpoint(0.02) as url:
        teacher = TeacherConfig(name="mock", base_url=url, model="mock", licence="MIT")
        mark = teacher_fingerprint(teacher, None)
        key_of = {
            name: answer_key([{"role": "user", "content": name}], mark, 0)
            for name in map(str, range(QUESTIONS))
        }
        kept: dict[str, int] = {}  # what was committed before a kill, and how often asked by then
        lost = 0
        for _ in range(KILLS):
            before = committed(answers)
            child = start(answers, url)
            while committed(answers) == before and child.poll() is None:
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.3))
            child.kill()
            assert child.wait() != 0, "it was done before the kill"
            time.sleep(0.1)  # the endpoint reads what was still on its way
            counts, keys = asked(url), committed(answers)
            assert 0 <= sum(counts.values()) - len(keys) - lost <= CONCURRENCY
            lost = sum(counts.values()) - len(keys)
            kept |= {name: counts[name] for name, key in key_of.items() if key in keys}
        assert start(answers, url).wait() == 0
        counts = asked(url)
    assert committed(answers) == set(key_of.values())
    assert {name: counts[name] for name in kept} == kept
    assert sum(counts.values()) == QUESTIONS + lost
