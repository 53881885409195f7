"""Batches against an endpoint that fails in every way, and runs that are killed and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import batch_server
import pytest
import tenacity
from batch_server import GOOD, entry

from persyn_jax.config import ConfigError
from persyn_jax.sampling import batch_file, batch_run
from persyn_jax.sampling.address import check_url
from persyn_jax.sampling.batch_run import Endpoint, run_batch

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_batch.py"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(batch_run, "_BACKOFF", tenacity.wait_none())
    with batch_server.serving() as server:
        yield server


def write_input(folder: Path, *entries: dict) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in entries))
    return path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def newest(path: Path) -> dict[str, dict]:
    return {row["custom_id"]: row for row in rows(path)}


def run(server, source: Path, **changed) -> dict:
    endpoint = Endpoint(
        **{
            "base_url": server.url,
            "api_key": None,
            "concurrency": 4,
            "timeout_seconds": 5.0,
            **changed,
        }
    )
    return run_batch(source, source.parent / "out.jsonl", endpoint, lambda *_: lambda: None)


def script(server, source: Path, *words: str, **environment) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        str(SCRIPT),
        "-i",
        str(source),
        "-o",
        str(source.parent / "out.jsonl"),
    ]
    return subprocess.run(
        [*command, "--base-url", server.url, *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_script_asks_every_entry_and_writes_vllms_rows(server, tmp_path):
    source = write_input(
        tmp_path, *(entry(f"q{n}") for n in range(9)), entry("chat", url="/v1/chat/completions")
    )
    server.script = lambda name, attempt: (200, {"X-Request-Id": f"id-{name}"}, GOOD)
    summary = tmp_path / "summary.json"
    done = script(server, source, "--json", str(summary), "--api-key-env", "KEY", KEY="sk-1")
    assert (done.returncode, json.loads(done.stdout)) == (0, json.loads(summary.read_text()))
    assert json.loads(done.stdout) == {
        "entries": 10,
        "answered": 10,
        "refused": 0,
        "failed": 0,
        "asked": 10,
        "prompt_tokens": 70,
        "completion_tokens": 30,
    }
    written = newest(tmp_path / "out.jsonl")
    assert set(written) == {f"q{n}" for n in range(9)} | {"chat"}
    for name, row in written.items():
        assert list(row) == ["id", "custom_id", "response", "error"]
        assert row["response"] == {"status_code": 200, "request_id": f"id-{name}", "body": GOOD}
        assert row["error"] is None
    assert len({row["id"] for row in written.values()}) == 10
    paths = {body["prompt"]: path for path, _, body in server.seen}
    assert paths["chat"] == "/v1/chat/completions"
    assert paths["q0"] == "/v1/completions"
    assert {headers["Authorization"] for _, headers, _ in server.seen} == {"Bearer sk-1"}
    assert {"model": "m", "prompt": "q3"} in [body for _, _, body in server.seen]


def test_what_passes_is_tried_again_and_what_is_final_is_not(server, tmp_path):
    failures = {"busy": 429, "down": 503, "slow": 408, "odd": 200}

    def answer(name, attempt):
        if name == "bad":
            return 400, {}, {"error": {"message": "no such field"}}
        if attempt < 3:
            return failures[name], {}, b"<html>"
        return 200, {}, GOOD

    server.script = answer
    source = write_input(tmp_path, *map(entry, [*failures, "bad"]))
    summary = run(server, source)
    assert (summary["answered"], summary["refused"], summary["failed"]) == (4, 1, 0)
    assert server.asked == {**dict.fromkeys(failures, 3), "bad": 1}
    refused = newest(tmp_path / "out.jsonl")["bad"]
    assert refused["response"]["status_code"] == 400
    assert refused["response"]["body"] == {"error": {"message": "no such field"}}
    assert refused["error"] is None
    assert run(server, source)["asked"] == 0
    assert server.asked["bad"] == 1


def test_entry_that_kept_failing_is_an_error_row_which_a_rerun_asks_again(server, tmp_path):
    source = write_input(tmp_path, entry("a"), entry("b"), entry("lost"))
    down = {"a": (500, {}, {"error": {"message": "it burns"}}), "lost": (404, {}, {"detail": "?"})}
    server.script = lambda name, attempt: down.get(name, (200, {}, GOOD))
    first = run(server, source)
    assert (first["answered"], first["failed"]) == (1, 2)
    assert server.asked == {"a": batch_run.ATTEMPTS, "b": 1, "lost": 1}
    row = newest(tmp_path / "out.jsonl")["a"]
    assert row["response"]["status_code"] == 500
    assert row["error"]["code"] == "status_500"
    assert "it burns" in row["error"]["message"]
    server.script = lambda name, attempt: (200, {}, GOOD)
    second = run(server, source)
    assert (second["asked"], second["answered"], second["failed"]) == (2, 3, 0)
    assert server.asked["b"] == 1
    assert [row["custom_id"] for row in rows(tmp_path / "out.jsonl")].count("a") == 2
    assert newest(tmp_path / "out.jsonl")["a"]["error"] is None
    assert run(server, source)["asked"] == 0


def test_no_connection_is_an_error_row_without_a_response(server, tmp_path):
    source = write_input(tmp_path, entry("a"))
    summary = run(server, source, base_url="http://127.0.0.1:9/v1")
    assert summary["failed"] == 1
    (row,) = rows(tmp_path / "out.jsonl")
    assert row["response"] is None
    assert row["error"]["code"] == "no_response"


def test_script_exits_with_1_when_an_entry_was_refused(server, tmp_path):
    server.script = lambda name, attempt: (422, {}, {"error": {"message": "no"}})
    done = script(server, write_input(tmp_path, entry("a")))
    assert done.returncode == 1
    assert "1 entries were refused and 0 failed" in done.stderr.splitlines()[-1]


def test_retry_after_is_waited_for(server, tmp_path):
    asked_at = []

    def answer(name, attempt):
        asked_at.append(time.monotonic())
        return (429, {"Retry-After": "0.4"}, b"{}") if attempt == 1 else (200, {}, GOOD)

    server.script = answer
    assert run(server, write_input(tmp_path, entry("a")))["answered"] == 1
    assert asked_at[1] - asked_at[0] >= 0.4


@pytest.mark.parametrize(("value", "least", "most"), [
    ("7", 7, 7), ("-1", 0, 0), ("soon", 0, 0), ("", 0, 0),
    ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0), ("Wed, 21 Oct 2099 07:28:00 GMT", 1e8, 1e10),
])  # fmt: skip
def test_retry_after_header(value, least, most):
    assert least <= batch_run._retry_after_seconds(value) <= most


def test_backoff_grows_to_a_cap_and_differs():
    def waits(attempt: int) -> list[float]:
        state = tenacity.RetryCallState(None, None, (), {})
        state.attempt_number = attempt
        state.set_exception((batch_run._PassingError, batch_run._PassingError("x"), None))
        return [batch_run._wait(state) for _ in range(50)]

    assert max(waits(1)) < min(waits(4))
    assert max(waits(40)) <= 31
    assert len(set(waits(1))) > 1


@pytest.mark.parametrize("status", [401, 403])
def test_missing_rights_end_the_run_and_never_show_the_key(server, tmp_path, status):
    server.script = lambda name, attempt: (
        status, {}, {"error": {"message": "wrong key sk-secret-1"}}
    )  # fmt: skip
    source = write_input(tmp_path, entry("a"))
    done = script(server, source, "--api-key-env", "KEY", KEY="sk-secret-1")
    assert done.returncode == 2
    assert f"status {status}: wrong key ***" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == b""


LONG = "x" * (1 << 20)


@pytest.mark.parametrize(("line", "complaint"), [
    ("nonsense", "not valid JSON"),
    ("[1]", "must be a JSON object, got list"),
    (b'{"custom_id": "\xff"}', "not UTF-8"),
    ("[" * 100_000, "nested too deep"),
    (json.dumps(entry("b")).replace('"m"', "NaN"), "NaN"),
    (json.dumps(entry("b")).replace('"m"', "1e999"), "too large"),
    (json.dumps(entry(LONG)), "longer than 1048576 bytes"),
    (json.dumps(entry("")), "custom_id: must be a non-empty string"),
    (json.dumps(entry("b", custom_id=3)), "custom_id: must be a non-empty string, got 3"),
    (json.dumps(entry("b", method="GET")), "method: must be 'POST', got 'GET'"),
    (json.dumps(entry("b", url="/v1/embeddings")), "url: must be one of /v1/chat/completions"),
    (json.dumps(entry("b", body="x")), "body: must be an object, got str"),
    (json.dumps(entry("b", body={"stream": True})), "body.stream: must be false"),
    (json.dumps(entry("a")), "custom_id 'a' is that of line 1 too"),
])  # fmt: skip
def test_bad_line_is_named_before_anything_is_sent(server, tmp_path, line, complaint):
    source = write_input(tmp_path, entry("a"))
    before = source.read_bytes() + b"\n"  # a blank line counts, and says nothing
    source.write_bytes(before + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ConfigError) as raised:
        run(server, source)
    assert str(raised.value).startswith(f"{source}:3: ")
    assert complaint in str(raised.value)
    assert len(str(raised.value)) < 500
    assert server.asked == {}
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_arguments_are_one_line_and_exit_code_2(server, tmp_path):
    source = write_input(tmp_path, entry("a"))
    for words, complaint in [
        (["--base-url", "localhost:8000"], "must begin with http://"),
        (["--concurrency", "0"], "--concurrency"),
        (["--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["-o", str(tmp_path / "no" / "out.jsonl")], "cannot be written"),
    ]:
        done = script(server, source, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert complaint in done.stderr.splitlines()[-1]
    assert server.asked == {}


def test_input_that_is_not_there_or_is_the_output_is_refused(server, tmp_path):
    source = write_input(tmp_path, entry("a"))
    with pytest.raises(ConfigError, match="is the input"):
        run(server, source.rename(tmp_path / "out.jsonl"))
    with pytest.raises(ConfigError, match="nowhere: cannot be read"):
        run(server, tmp_path / "nowhere")
    assert rows(tmp_path / "out.jsonl") == [entry("a")]
    assert server.asked == {}


@pytest.mark.parametrize("url", ["ftp://a/v1", "http://", "http://[", "http://a:0/v1", "http://a\x00",
    "http://a/v1?key=1", "http://me:secret@a/v1"])  # fmt: skip
def test_address_that_is_none_is_refused_without_its_password(url):
    with pytest.raises(ConfigError) as raised:
        check_url("--base-url", url)
    assert str(raised.value).startswith("--base-url")
    assert "secret" not in str(raised.value)


def test_another_run_on_the_same_output_is_refused(server, tmp_path):
    source = write_input(tmp_path, entry("a"))
    inner = []

    def answer(name, attempt):
        inner.append(script(server, source))
        return 200, {}, GOOD

    server.script = answer
    run(server, source, timeout_seconds=30.0)
    assert [done.returncode for done in inner] == [2]
    assert "another run is writing to it" in inner[0].stderr


def test_torn_last_line_is_cut_off_and_asked_again(server, tmp_path):
    source = write_input(tmp_path, *map(entry, "abc"))
    run(server, source)
    out = tmp_path / "out.jsonl"
    kept, torn = out.read_bytes().splitlines(keepends=True)[:2]
    out.write_bytes(kept + torn[:-9])
    assert run(server, source)["asked"] == 2
    assert out.read_bytes().startswith(kept)
    assert len(rows(out)) == 3
    assert set(newest(out)) == set("abc")
    out.write_bytes(out.read_bytes()[:-1])  # only the line's end is lost: the row is there
    assert run(server, source)["asked"] == 0
    assert len(rows(out)) == 3


@pytest.mark.parametrize("damage", [
    b"{}\n", b"\n", b'{"id":"x","custom_id":"a"\n', b'{"id":"x","custom_id":"a","response":{}}\n',
    b"notes of mine, without an end", b'{"custom_id"',
])  # fmt: skip
def test_damage_inside_the_output_is_refused_and_left_alone(server, tmp_path, damage):
    source = write_input(tmp_path, *map(entry, "ab"))
    out = tmp_path / "out.jsonl"
    content = batch_file.answer_row("a", 200, None, GOOD) + damage
    if damage.endswith(b"\n"):
        content += batch_file.answer_row("b", 200, None, GOOD)
    out.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{out}:2: "):
        run(server, source)
    assert out.read_bytes() == content
    assert server.asked == {}


def test_kill_loses_at_most_the_rows_in_flight(server, tmp_path):
    """Whatever was answered before a kill, up to what was under way, is not asked again."""
    names = [f"q{n}" for n in range(300)]
    source = write_input(tmp_path, *map(entry, names))
    out, concurrency = tmp_path / "out.jsonl", 8

    def answer(name, attempt):
        time.sleep(0.01)
        return 200, {}, GOOD

    server.script = answer
    command = [sys.executable, str(SCRIPT), "-i", str(source), "-o", str(out)]
    for how, least in [(signal.SIGKILL, 40), (signal.SIGKILL, 90), (signal.SIGTERM, 150)]:
        process = subprocess.Popen(
            [*command, "--base-url", server.url, "--concurrency", str(concurrency)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while sum(server.asked.values()) < least:
            time.sleep(0.005)
        process.send_signal(how)
        assert process.wait(20) == (-how if how == signal.SIGKILL else 130)
    assert len(rows(out)) < 300
    assert run(server, source)["answered"] == 300
    assert sorted(row["custom_id"] for row in rows(out)) == sorted(names)
    twice = [name for name, times in server.asked.items() if times > 1]
    assert len(twice) <= 3 * concurrency


def test_half_a_surrogate_pair_is_sent_and_kept_as_it_is(server, tmp_path):
    server.script = lambda name, attempt: (200, {}, b'{"text": "\\ud83d", "n": 0.1}')
    source = write_input(tmp_path, entry("a\ude00"))
    run(server, source)
    (row,) = rows(tmp_path / "out.jsonl")
    assert server.asked == {"a\ude00": 1}
    assert row["custom_id"] == "a\ude00"
    assert row["response"]["body"] == {"text": "\ud83d", "n": 0.1}


def test_never_more_requests_than_asked_for(server, tmp_path):
    under_way, most = [0], [0]

    def answer(name, attempt):
        with server.lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.02)
        with server.lock:
            under_way[0] -= 1
        return 200, {}, GOOD

    server.script = answer
    run(server, write_input(tmp_path, *(entry(f"q{n}") for n in range(30))), concurrency=3)
    assert most[0] == 3


def test_proxies_of_the_environment_are_not_used(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert run(server, write_input(tmp_path, entry("a")))["answered"] == 1
