"""The service as a child process: it starts or says why not, and never outlives its parent."""

import signal
import socket
import subprocess
import sys
import time
import urllib.parse

import httpx
import psutil
import pytest

from persyn_jax.config import ConfigError
from persyn_jax.models.spec import ModelConfig
from persyn_jax.sampling.config import EngineConfig, ServiceConfig
from persyn_jax.sampling.process import ServiceError, bind, read_counters, running_service

CONFIG = ServiceConfig(
    model=ModelConfig(weights="random:tiny"),
    engine=EngineConfig(
        slots=1,
        cache_length=32,
        prefill_rows=1,
        prefill_chunk=16,
        decode_steps=1,
        prefix_blocks=1,
    ),
)
PARENT = f"""
import time
from persyn_jax.models.spec import ModelConfig
from persyn_jax.sampling.config import EngineConfig, ServiceConfig
from persyn_jax.sampling.process import running_service

with running_service({CONFIG!r}, "cpu") as url:
    print(url, flush=True)
    time.sleep(600)
"""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def gone(child: psutil.Process) -> bool:
    """Whether it ends within seconds; a zombie has ended."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if not child.is_running() or child.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def start_parent() -> subprocess.Popen:
    # Its own session, as a terminal gives one: Ctrl-C would reach all processes in it.
    return subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def parents():
    """One process for each signal; they start side by side."""
    started = {number: start_parent() for number in SIGNALS}
    yield started
    for parent in started.values():
        parent.kill()
        parent.communicate()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_service_ends_with_its_parent(parents, number):
    parent = parents[number]
    url = parent.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:"), parent.communicate()[1]
    assert read_counters(url)["decode_steps"] == 0
    (child,) = psutil.Process(parent.pid).children()
    parent.send_signal(number)
    assert gone(child)
    parent.wait(timeout=15)
    with pytest.raises(ServiceError, match="does not answer"):
        read_counters(url)


def test_a_service_ends_with_a_parent_killed_while_it_starts():
    parent = start_parent()
    deadline = time.monotonic() + 60
    while not (children := psutil.Process(parent.pid).children()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1)  # the child is busy importing
    parent.kill()
    parent.communicate()
    assert gone(children[0])


def test_a_service_stops_on_the_way_out_whatever_the_reason():
    def children():
        return {child.pid for child in psutil.Process().children()}

    before = children()
    with (
        pytest.raises(ZeroDivisionError),
        running_service(CONFIG, "cpu") as url,
        httpx.Client(trust_env=False) as http,
    ):
        assert http.get(f"{url}/models").status_code == 200
        assert len(children() - before) == 1
        raise ZeroDivisionError
    assert children() == before
    port = urllib.parse.urlsplit(url).port
    bind("127.0.0.1", port).close()


def test_a_bad_model_is_bad_input_in_one_line(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF, but no more than that")
    config = ServiceConfig(model=ModelConfig(weights=str(path)))
    with pytest.raises(ConfigError) as caught, running_service(config, "cpu"):
        raise AssertionError("it started")
    assert str(caught.value).startswith(f"{path}: GGUF version")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("echo 'error: no such model' >&2; exit 2", ConfigError, "^no such model$"),
        ("echo 'error: out of memory' >&2; exit 1", ServiceError, "did not start: out of memory$"),
        ("exit 7", ServiceError, "did not start: exit status 7$"),
        ("kill -9 $$", ServiceError, "did not start: exit status -9$"),
    ],
)
def test_a_child_that_dies_while_starting_says_why(tmp_path, monkeypatch, script, error, message):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(error, match=message), running_service(CONFIG, "cpu"):
        raise AssertionError("it started")


def test_other_lines_of_the_child_are_passed_on(tmp_path, monkeypatch, capfd):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'a warning' >&2\nread config\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(ServiceError), running_service(CONFIG, "cpu"):
        raise AssertionError("it started")
    assert capfd.readouterr().err == "sampling service: a warning\n"


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .*in use"):
            bind("127.0.0.1", port)


def test_an_impossible_port_is_named():
    with pytest.raises(ConfigError, match="cannot listen on 127.0.0.1:99999"):
        bind("127.0.0.1", 99999)
