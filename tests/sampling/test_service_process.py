"""The service as a child process: it starts or says why not, and never outlives its parent."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator

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
import signal
import time
from persyn_jax.models.spec import ModelConfig
from persyn_jax.sampling.config import EngineConfig, ServiceConfig
from persyn_jax.sampling.process import running_service

# A shell lets its background jobs ignore Ctrl-C, and what it starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
with running_service({CONFIG!r}, "cpu") as url:
    print(url, flush=True)
    time.sleep(600)
"""
# Stands in for the service where only the parent's part matters: healthy at once.
STUB = """
import http.server, socket, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            print("error: dying", file=sys.stderr, flush=True)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

server = http.server.HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
server.socket = socket.socket(fileno=int(sys.argv[-1]))
server.serve_forever()
"""


def instead_of_python(monkeypatch, tmp_path, script: str) -> None:
    """Children run a shell script instead."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.fixture
def stub(monkeypatch, tmp_path):
    (tmp_path / "stub.py").write_text(STUB)
    instead_of_python(monkeypatch, tmp_path, f'exec {sys.executable} {tmp_path}/stub.py "$@"')


def gone(child: psutil.Process) -> bool:
    """Whether it ends within seconds; a zombie has ended."""
    deadline = time.monotonic() + 15
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended between the two looks
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
    return True


@contextlib.contextmanager
def parent_process() -> Iterator[tuple[subprocess.Popen, psutil.Process]]:
    """A parent that runs the service, and its child, which may still be starting."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as parent:
        try:
            deadline = time.monotonic() + 60
            while not (children := psutil.Process(parent.pid).children()):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield parent, children[0]
        finally:
            parent.kill()


def test_a_service_ends_when_its_parent_is_killed():
    with parent_process() as (parent, child):
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        assert read_counters(url)["decode_steps"] == 0
        parent.kill()
        assert gone(child)
    with pytest.raises(ServiceError, match="does not answer"):
        read_counters(url)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("seconds", [0.0, 1.0])  # before and while it imports
def test_a_service_ends_with_a_parent_that_ends_while_it_starts(name, seconds):
    with parent_process() as (parent, child):
        time.sleep(seconds)
        parent.send_signal(signal.Signals[name])
        assert gone(child)
        assert parent.wait(timeout=15) != 0


def test_a_service_stops_on_the_way_out_whatever_the_reason(stub):
    before = set(psutil.Process().children())

    def fail_while_it_runs() -> None:
        with running_service(CONFIG, "cpu") as url:
            urls.append(url)
            assert len(set(psutil.Process().children()) - before) == 1
            raise ZeroDivisionError

    urls: list[str] = []
    with pytest.raises(ZeroDivisionError):
        fail_while_it_runs()
    assert set(psutil.Process().children()) == before
    bind("127.0.0.1", urllib.parse.urlsplit(urls[0]).port).close()


def test_what_a_running_service_says_is_passed_on(stub, capfd):
    with running_service(CONFIG, "cpu") as url:
        httpx.get(url.removesuffix("/v1") + "/die", trust_env=False)
    assert capfd.readouterr().err == "sampling service: error: dying\n"


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
    instead_of_python(monkeypatch, tmp_path, script)
    with pytest.raises(error, match=message), running_service(CONFIG, "cpu"):
        raise AssertionError("it started")


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .*in use"):
            bind("127.0.0.1", port)


def test_an_impossible_port_is_named():
    with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:99999"):
        bind("127.0.0.1", 99999)
