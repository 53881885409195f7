"""The sampling service as a child process: started on a free loopback port, stopped with its parent.

Also the child's entry point (`python -m persyn_jax.sampling.process`): the config comes as JSON on standard input, which
the parent then keeps open. When the parent is gone, however it ended, standard input ends and so does the service.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx

from persyn_jax.config import ConfigError, to_values, validate
from persyn_jax.sampling.config import ServiceConfig

_STARTUP_SECONDS = 600


class ServiceFailed(RuntimeError):
    """The service could not start or died. One line."""


@contextlib.contextmanager
def running_service(config: ServiceConfig, platform: str) -> Iterator[str]:
    """Runs the service and yields its base URL (ending in /v1) once it is healthy; stops it on the way out.

    Raises ConfigError for what the service calls bad input, ServiceFailed when it dies while starting.
    """
    from persyn_jax.sampling.service import bind

    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    command = [sys.executable, "-m", "persyn_jax.sampling.process", str(listener.fileno())]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[listener.fileno()],
        env=os.environ | {"JAX_PLATFORMS": platform},
        start_new_session=True,  # Ctrl-C reaches the parent only, which then stops the child
        text=True,
    )
    listener.close()
    assert child.stdin is not None and child.stderr is not None
    last_lines: list[str] = []
    reader = threading.Thread(target=_forward, args=(child.stderr, last_lines), daemon=True)
    reader.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # it died at once: `_wait` says why
            child.stdin.write(json.dumps(to_values(config)) + "\n")
            child.stdin.flush()
        _wait_until_healthy(f"http://127.0.0.1:{port}/health", child, reader, last_lines)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _stop(child)


def read_counters(base_url: str) -> dict[str, float]:
    """The service's counters by name, from its /metrics."""
    text = httpx.get(base_url.removesuffix("/v1") + "/metrics", timeout=30).text
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("persyn_"): float(value) for name, value in lines}


def _forward(stream, last_lines: list[str]) -> None:
    """Keeps the child's last line and passes on the others as they come."""
    for line in stream:
        if line.startswith("error: "):
            last_lines.append(line.removeprefix("error: ").strip())
        else:
            print(line, end="", file=sys.stderr)


def _wait_until_healthy(url: str, child, reader: threading.Thread, last_lines: list[str]) -> None:
    deadline = time.monotonic() + _STARTUP_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            reader.join(timeout=5)
            reason = last_lines[-1] if last_lines else f"exit status {child.returncode}"
            if child.returncode == 2:
                raise ConfigError(reason)
            raise ServiceFailed(f"the sampling service did not start: {reason}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    raise ServiceFailed(f"the sampling service was not healthy within {_STARTUP_SECONDS} s")


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
    config = validate(ServiceConfig, json.loads(sys.stdin.readline()), where="service")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from persyn_jax.sampling.service import run

    run(config, socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
