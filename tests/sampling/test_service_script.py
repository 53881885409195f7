"""How the service starts, drains and ends as a script: signals, keys, exit codes."""

import signal
import subprocess
import sys
import time

import httpx
import pytest
from service_cases import QUESTION, ROOT, refused, served_by_script, wait_until_healthy

LONG = {"model": "tiny", "messages": QUESTION, "temperature": 0, "stream": True}
CHAT = "/v1/chat/completions"
SLOW = (
    "service.engine={slots: 1, cache_length: 2048, prefill_rows: 1, prefill_chunk: 64, "
    "decode_steps: 1, prefix_blocks: 1, score_rows: 0}",
)


def test_running_requests_end_before_the_service_does():
    with served_by_script(*SLOW, "service.drain_seconds=60") as (process, http):
        wait_until_healthy(http)
        body = LONG | {"n": 4}
        with http.stream("POST", CHAT, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.terminate()
            with httpx.Client(base_url=http.base_url, trust_env=False) as other:
                deadline = time.monotonic() + 10
                while (health := other.get("/health")).status_code == 200:
                    assert time.monotonic() < deadline
                assert health.status_code == 503
                refusal = other.post(CHAT, json=body)
            assert refusal.status_code == 503
            assert refusal.headers["retry-after"] == "1"
            assert process.poll() is None
            *_, last = (line for line in lines if line)
        assert last == "data: [DONE]"
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == ""


def test_who_does_not_end_in_time_is_cut_off():
    with served_by_script(*SLOW, "service.drain_seconds=0.2") as (process, http):
        wait_until_healthy(http)
        with http.stream("POST", CHAT, json=LONG | {"n": 16}) as response:
            lines = response.iter_lines()
            next(lines)
            process.terminate()
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        assert process.wait(timeout=20) == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_service_that_still_loads_says_so_and_ends_when_told(name):
    with served_by_script() as (process, http):
        for response in (
            http.get("/health"),
            http.post(CHAT, json={"model": "tiny", "messages": QUESTION}),
        ):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert refused(response.json(), "server_error")["message"] == "loading"
        process.send_signal(signal.Signals[name])
        assert process.wait(timeout=30) == 0


def test_a_key_is_needed_once_there_is_one():
    canary = "canary-5f0c"
    with served_by_script(
        *("--host", "0.0.0.0", "service.api_key_env=PERSYN_TEST_KEY"),
        env={"PERSYN_TEST_KEY": canary},
    ) as (process, http):
        http.base_url = str(http.base_url).replace("0.0.0.0", "127.0.0.1")
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            assert http.get(path).status_code == 401
        assert http.get("/health").status_code == 503  # loading; no key
        headers = {"Authorization": f"Bearer {canary}"}
        assert http.get("/v1/models", headers=headers).status_code == 200
        process.terminate()
        output, errors = process.communicate(timeout=30)
        assert canary not in output + errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "set api_key_env"),
        (["service.api_key_env=PERSYN_NOT_SET"], "variable PERSYN_NOT_SET is not set"),
    ],
)
def test_a_service_without_its_key_does_not_start(arguments, message):
    ended = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "serve_teacher.py", "--port", "0"),
            *("--config", ROOT / "configs" / "smoke.yaml", *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert message in ended.stderr
