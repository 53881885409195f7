"""The answer store: what was committed stays, exactly once, through kills, races and damage."""

import contextlib
import dataclasses
import hashlib
import json
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persyn_jax.config import ConfigError
from persyn_jax.store import AnswerStore, StoredAnswer, answer_key

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def answer(key: str, text: str = "4", **changes) -> StoredAnswer:
    plain = StoredAnswer(
        key=key,
        teacher="specialist",
        teacher_fingerprint="f00d",
        sample_index=0,
        text=text,
        token_ids=[1, 2, 3],
        finish_reason="stop",
        prompt_tokens=10,
        completion_tokens=3,
        usd=None,
        licence="Apache-2.0",
        error=None,
        server="http://127.0.0.1:1/v1",
        latency_seconds=0.25,
    )
    return dataclasses.replace(plain, **changes)


# Puts keys first..last one by one and prints each key after its commit.
WRITER = """
import sys
from pathlib import Path
from persyn_jax.store import AnswerStore, StoredAnswer
path, name, first, last = sys.argv[1:]
with AnswerStore(Path(path)) as store:
    for number in range(int(first), int(last)):
        store.put(StoredAnswer(
            key=str(number), teacher=name, teacher_fingerprint="f", sample_index=0,
            text=name * 50, token_ids=None, finish_reason="stop", prompt_tokens=1,
            completion_tokens=1, usd=0.5, licence="", error=None, server=name,
            latency_seconds=0.0))
        print(number, flush=True)
"""


def start_writer(path: Path, name: str, first: int, last: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(path), name, str(first), str(last)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@settings(max_examples=25)
@given(
    text=TEXT | st.sampled_from(["\0", "a\0b\u2028", "😀"]),
    token_ids=st.none() | st.lists(st.integers(0, 2**31), max_size=5),
    usd=st.none() | st.floats(0, 100),
    error=st.none() | TEXT,
)
def test_every_field_survives(tmp_path_factory, text, token_ids, usd, error):
    path = tmp_path_factory.mktemp("store") / "answers.sqlite"
    stored = answer("k", text, token_ids=token_ids, usd=usd, error=error)
    with AnswerStore(path) as store:
        store.put(stored)
    with AnswerStore(path) as store:
        assert store.get(["k", "absent"]) == {"k": stored}


def test_a_committed_answer_is_never_overwritten(tmp_path):
    with AnswerStore(tmp_path / "answers.sqlite") as store:
        store.put(answer("k", "first"))
        store.put(answer("k", "second"))
        store.put(answer("k", "", finish_reason="error", error="down"))
        assert store.get(["k"])["k"].text == "first"
        assert store.count() == 1


def test_a_committed_failure_gives_way_to_an_answer(tmp_path):
    with AnswerStore(tmp_path / "answers.sqlite") as store:
        store.put(answer("k", "", finish_reason="error", error="503"))
        assert store.get(["k"])["k"].error == "503"
        store.put(answer("k", "4"))
        assert store.get(["k"]) == {"k": answer("k", "4")}
        assert store.count() == 1


def test_answers_together_are_committed_all_or_none(tmp_path):
    with AnswerStore(tmp_path / "answers.sqlite") as store:
        store.put(answer("a", "first"))
        store.put(answer("b", "", finish_reason="error", error="503"))
        store.put_all([answer(key, "second") for key in "abc"])
        found = store.get("abc")
        assert {key: found[key].text for key in "abc"} == {
            "a": "first",
            "b": "second",
            "c": "second",
        }
        with pytest.raises(ConfigError, match="surrogates not allowed"):
            store.put_all([answer("d", "fine"), answer("e", "half \ud83d"), answer("f", "fine")])
        assert store.count() == 3
        store.put_all([])
        store.put(answer("d", "works still"))
    with AnswerStore(tmp_path / "answers.sqlite") as store:
        assert store.count() == 4


def test_many_keys_in_one_get(tmp_path):
    with AnswerStore(tmp_path / "answers.sqlite") as store:
        for number in range(0, 40, 2):
            store.put(answer(str(number)))
        found = store.get(str(number) for number in range(50_000))
    assert set(found) == {str(number) for number in range(0, 40, 2)}


def test_kill_loses_no_committed_answer_and_doubles_none(tmp_path):
    path = tmp_path / "answers.sqlite"
    committed = 0
    for kill_after in (1, 17, 60, 3):
        with start_writer(path, "w", first=committed, last=100_000) as writer:
            lines = [writer.stdout.readline() for _ in range(kill_after)]
            writer.kill()
            lines += writer.stdout.readlines()
        committed = int([line for line in lines if line.endswith("\n")][-1]) + 1
        with AnswerStore(path) as store:
            found = store.get(str(number) for number in range(committed))
            assert len(found) == committed
            # At most the one answer that was in flight came on top.
            assert store.count() in (committed, committed + 1)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_processes_that_start_together_share_one_new_store(tmp_path):
    path = tmp_path / "answers.sqlite"
    writers = [
        start_writer(path, "a", first=0, last=80),
        start_writer(path, "b", first=40, last=120),
        start_writer(path, "c", first=0, last=120),
    ]
    for writer in writers:
        writer.communicate(timeout=60)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    with AnswerStore(path) as store:
        found = store.get(str(number) for number in range(120))
        assert len(found) == store.count() == 120
    # Each row is the work of one writer alone.
    assert all(row.text == row.teacher * 50 and row.server == row.teacher for row in found.values())


def test_openers_of_a_new_store_may_meet_at_the_change_to_wal(tmp_path):
    """SQLite refuses that change at once while another process is about to write."""
    path = tmp_path / "answers.sqlite"
    with AnswerStore(path):
        pass
    done = threading.Event()

    def follow_every_write() -> None:
        with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
            other.execute("PRAGMA journal_mode = DELETE")
            started.set()
            met = False
            while not done.is_set():
                try:
                    other.execute("BEGIN IMMEDIATE")
                    if met:  # right behind a write of the store's
                        time.sleep(0.01)
                    other.execute("ROLLBACK")
                    met = False
                except sqlite3.OperationalError:
                    met = True

    for _ in range(20):
        started = threading.Event()
        done.clear()
        thread = threading.Thread(target=follow_every_write)
        thread.start()
        started.wait()
        try:
            with AnswerStore(path) as store:
                assert store.count() == 0
        finally:
            done.set()
            thread.join()


def test_threads_share_a_store(tmp_path):
    with AnswerStore(tmp_path / "answers.sqlite") as store:

        def work(name: str) -> None:
            for number in range(50):
                store.put(answer(str(number), name))
                assert str(number) in store.get([str(number)])

        threads = [threading.Thread(target=work, args=[name]) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.count() == 50


def test_what_a_model_says_of_an_answer_is_kept_by_answer_model_and_column(tmp_path):
    path = tmp_path / "answers.sqlite"
    log_likelihood_T = np.array([-0.5, -1e-7, -30.0], np.float32)
    rank_T = np.array([1, 2**24, 3], np.int32)
    with AnswerStore(path) as store:
        store.put_measurements("s", {"k": {"log": log_likelihood_T, "rank": rank_T}, "l": {}})
        store.put_measurements("t", {"k": {"log": log_likelihood_T - 1}})
    with AnswerStore(path) as store:
        assert store.measured(["k", "l", "absent"], "s") == {"k": {"log", "rank"}}
        assert store.measured(["k"], "t") == {"k": {"log"}}
        assert store.measured(["k"], "u") == {}
        found = store.get_measurements(["k", "absent"], "s", ["log", "rank", "other"])
        assert list(found) == ["k"]
        np.testing.assert_array_equal(found["k"]["log"], log_likelihood_T)
        np.testing.assert_array_equal(found["k"]["rank"], rank_T)
        assert set(store.get_measurements(["k"], "s", ["rank"])["k"]) == {"rank"}
        assert store.count() == 0


def test_what_was_measured_stays_as_it_is(tmp_path):
    with AnswerStore(tmp_path / "answers.sqlite") as store:
        store.put_measurements("s", {"k": {"log": np.array([-1.0])}})
        store.put_measurements("s", {"k": {"log": np.array([-2.0]), "rank": np.array([1])}})
        assert store.measured(["k"], "s") == {"k": {"log", "rank"}}
        np.testing.assert_array_equal(store.get_measurements(["k"], "s", ["log"])["k"]["log"], -1)


def test_a_store_from_before_there_were_measurements_takes_them(tmp_path):
    path = tmp_path / "answers.sqlite"
    with AnswerStore(path) as store:
        store.put(answer("k"))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE measurements")
    with AnswerStore(path) as store:
        store.put_measurements("s", {"k": {"log": np.array([-1.0])}})
        assert store.measured(["k"], "s") == {"k": {"log"}}
        assert store.get(["k"]) == {"k": answer("k")}


def test_key_is_the_hash_of_canonical_json():
    messages = [{"content": "é", "role": "user"}]
    canonical = '[[{"content":"\\u00e9","role":"user"}],"f00d",2]'
    assert answer_key(messages, "f00d", 2) == hashlib.sha256(canonical.encode()).hexdigest()
    assert answer_key([{"role": "user", "content": "é"}], "f00d", 2) == answer_key(
        messages, "f00d", 2
    )
    assert answer_key(messages, "f00d", 3) != answer_key(messages, "f00d", 2)


def test_for_prompt_makes_the_record_under_the_runs_own_name():
    record = answer("k", "4", usd=0.5).for_prompt("p7", "my teacher")
    assert (record.prompt_id, record.teacher, record.text, record.usd) == (
        "p7",
        "my teacher",
        "4",
        0.5,
    )
    assert record.usable


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught, AnswerStore(path):
        pass
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_files_that_are_no_store_are_refused_and_left_alone(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a database " * 100)
    assert "not a database" in refused(text)
    assert text.read_text() == "not a database " * 100

    foreign = tmp_path / "photos.sqlite"
    with contextlib.closing(sqlite3.connect(foreign)) as connection:
        connection.execute("CREATE TABLE photos (name)")
        connection.commit()
    before = foreign.read_bytes()
    assert "another program" in refused(foreign)
    assert foreign.read_bytes() == before

    newer = tmp_path / "newer.sqlite"
    with AnswerStore(newer):
        pass
    with contextlib.closing(sqlite3.connect(newer)) as connection:
        connection.execute("PRAGMA user_version = 99")
    assert "version 99" in refused(newer)

    folder = tmp_path / "folder"
    folder.mkdir()
    refused(folder)
    refused(text / "answers.sqlite")


def test_a_damaged_store_is_named(tmp_path):
    path = tmp_path / "answers.sqlite"
    with AnswerStore(path) as store:
        for number in range(200):
            store.put(answer(str(number), "x" * 200))
    pages = bytearray(path.read_bytes())
    pages[8192:] = b"\xff" * (len(pages) - 8192)
    path.write_bytes(pages)
    with (
        pytest.raises(ConfigError, match=r"answers\.sqlite: answer store: .*malformed"),
        AnswerStore(path) as store,
    ):
        store.get(str(number) for number in range(200))


def test_a_lone_surrogate_is_refused_by_name(tmp_path):
    path = tmp_path / "answers.sqlite"
    with AnswerStore(path) as store:
        with pytest.raises(ConfigError, match=r"answers\.sqlite: answer store: .*surrogates"):
            store.put(answer("k", "\ud83d"))
        assert store.count() == 0


# Runs under a file size limit: the disk refuses in the middle of the puts, as a full one does.
FULL_DISK = """
import json, resource, sys
from pathlib import Path
from persyn_jax.config import ConfigError
from persyn_jax.store import AnswerStore, StoredAnswer
store = AnswerStore(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
committed = 0
try:
    while True:
        store.put(StoredAnswer(
            key=str(committed), teacher="t", teacher_fingerprint="f", sample_index=0,
            text="x" * 5000, token_ids=None, finish_reason="stop", prompt_tokens=1,
            completion_tokens=1, usd=None, licence="", error=None, server="s",
            latency_seconds=0.0))
        committed += 1
except ConfigError as error:
    print(json.dumps([committed, str(error)]))
"""


def test_a_full_disk_is_named_and_loses_nothing(tmp_path):
    path = tmp_path / "answers.sqlite"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=60
    )
    committed, message = json.loads(done.stdout)
    assert committed > 3
    assert message.startswith(f"{path}: answer store: ")
    with AnswerStore(path) as store:
        assert store.count() == committed
