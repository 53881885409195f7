"""The sampling service as a child process: on a free loopback port, gone with its parent.

Also the child's entry point (`python -m persyn_jax.sampling.process`): the config comes as JSON on
standard input, which the parent then keeps open. When the parent is gone, however it ended,
standard input ends and so does the service.
"""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO

import httpx

from persyn_jax.config import ConfigError, to_values, validate
from persyn_jax.sampling.config import ServiceConfig

_STARTUP_SECONDS = 600
_ENGINE_PREFIX = "persyn_engine_"  # `metrics.ENGINE_PREFIX`, which would bring JAX along
_ERROR = "error: "  # begins the line in which the child says why it ends


class ServiceError(RuntimeError):
    """The service could not start or died. One line."""


@contextlib.contextmanager
def running_service(config: ServiceConfig, platform: str) -> Iterator[str]:
    """Runs the service and yields its base URL (ending in /v1) once it is healthy.

    It is stopped on the way out. platform: of JAX, `cpu`, `gpu` or `tpu`. It is the caller's own:
    at a loopback address and without an API key, whatever the config says.
    Raises ConfigError for what the service calls bad input, ServiceError when it dies while
    starting.
    """
    config = dataclasses.replace(config, host="127.0.0.1", api_key_env=None)
    with bind(config.host, 0) as listener:
        root = f"http://127.0.0.1:{listener.getsockname()[1]}"
        child = subprocess.Popen(
            [sys.executable, "-m", "persyn_jax.sampling.process", str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env=os.environ | {"JAX_PLATFORMS": platform},
            start_new_session=True,  # Ctrl-C reaches the parent only, which then stops the child
            text=True,
        )
    assert child.stdin is not None
    assert child.stderr is not None
    reasons: list[str] = []
    started = threading.Event()
    reader = threading.Thread(target=_forward, args=(child.stderr, reasons, started), daemon=True)
    reader.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # it died at once: the next line says why
            child.stdin.write(json.dumps(to_values(config)) + "\n")
            child.stdin.flush()
        _wait_until_healthy(f"{root}/health", child, reader, reasons)
        started.set()
        yield f"{root}/v1"
    finally:
        _stop(child)
        reader.join(timeout=5)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}") from None
    return listener


def read_counters(base_url: str) -> dict[str, float]:
    """The engine's counters by name, from /metrics. Raises ServiceError if nobody answers."""
    url = base_url.removesuffix("/v1") + "/metrics"
    try:
        text = httpx.get(url, timeout=30, trust_env=False).text
    except httpx.TransportError as error:
        raise ServiceError(f"the sampling service does not answer: {error}") from None
    lines = [line.split() for line in text.splitlines() if line.startswith(_ENGINE_PREFIX)]
    return {name.removeprefix(_ENGINE_PREFIX): float(value) for name, value in lines}


def _forward(stream: IO[str], reasons: list[str], started: threading.Event) -> None:
    """Passes on the child's lines; keeps the reason why it could not start for the exception."""
    with stream:
        for line in stream:
            if line.startswith(_ERROR) and not started.is_set():
                reasons.append(line.removeprefix(_ERROR).strip())
            else:
                print(f"sampling service: {line}", end="", file=sys.stderr)


def _wait_until_healthy(
    url: str, child: subprocess.Popen, reader: threading.Thread, reasons: list[str]
) -> None:
    deadline = time.monotonic() + _STARTUP_SECONDS
    with httpx.Client(timeout=5, trust_env=False) as http:
        while time.monotonic() < deadline:
            if child.poll() is not None:
                reader.join(timeout=5)
                reason = reasons[-1] if reasons else f"exit status {child.returncode}"
                if child.returncode == 2:
                    raise ConfigError(reason)
                raise ServiceError(f"the sampling service did not start: {reason}")
            with contextlib.suppress(httpx.TransportError):
                if http.get(url).status_code == 200:
                    return
            time.sleep(0.1)
    raise ServiceError(f"the sampling service was not healthy within {_STARTUP_SECONDS} s")


def _stop(child: subprocess.Popen) -> None:
    child.terminate()
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()


def _end_with_parent() -> None:
    sys.stdin.read()  # blocks until the parent's end of the pipe is closed
    os._exit(0)


def main() -> None:
    """The child: reads its config, then serves on the inherited socket."""
    line = sys.stdin.readline()
    if not line:
        return  # the parent ended before it said anything
    config = validate(ServiceConfig, json.loads(line), where="service")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from persyn_jax.mesh import start_platform
    from persyn_jax.sampling.service import run

    if os.environ.get("JAX_PLATFORMS") == "cpu":  # whose devices are what one asks for
        start_platform("cpu", config.engine.tensor)
    run(config, socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
