"""Services under test: the tiny random model behind real HTTP, each in a process of its own."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from persyn_jax.models import tokenizer
from persyn_jax.models.spec import ModelConfig
from persyn_jax.sampling.config import EngineConfig, ServiceConfig
from persyn_jax.sampling.process import running_service

ROOT = Path(__file__).parents[2]
QUESTION = [{"role": "user", "content": "Why?"}]
TOK = tokenizer.byte_level()


def service_config(
    slots: int = 4, cache_length: int = 256, decode_steps: int = 4, **service: Any
) -> ServiceConfig:
    """The tiny model in small shapes."""
    return ServiceConfig(
        model=ModelConfig(weights="random:tiny"),
        name="tiny",
        engine=EngineConfig(
            slots=slots,
            cache_length=cache_length,
            prefill_rows=2,
            prefill_chunk=16,
            decode_steps=decode_steps,
            prefix_blocks=16,
        ),
        **service,
    )


@contextlib.contextmanager
def serving(config: ServiceConfig) -> Iterator[httpx.Client]:
    """A client whose paths begin at the service's root."""
    with running_service(config, "cpu") as url, httpx.Client(trust_env=False, timeout=60) as http:
        http.base_url = url.removesuffix("/v1")
        yield http


@contextlib.contextmanager
def served_by_script(
    *arguments: str, env: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen, httpx.Client]]:
    """`scripts/serve_teacher.py` on the smoke config, and a client; perhaps still loading."""
    with subprocess.Popen(
        [
            *(sys.executable, ROOT / "scripts" / "serve_teacher.py", "--port", "0"),
            *("--config", ROOT / "configs" / "smoke.yaml", *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (env or {}),
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving tiny on "), line + str(process.stderr)
            base_url = line.split()[-1].removesuffix("/v1")
            with httpx.Client(base_url=base_url, trust_env=False, timeout=60) as http:
                yield process, http
        finally:
            process.kill()


def wait_until_healthy(http: httpx.Client) -> None:
    """Within two minutes, on a machine that has much else to do."""
    deadline = time.monotonic() + 120
    while http.get("/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ask(http: httpx.Client, path: str, status: int = 200, **body: Any) -> dict[str, Any]:
    """The JSON that a POST brings, which must have the status."""
    response = http.post(path, json={"model": "tiny"} | body)
    assert response.status_code == status, response.text
    return response.json()


def chat(http: httpx.Client, status: int = 200, **body: Any) -> dict[str, Any]:
    """A chat completion, by default of QUESTION and 8 tokens."""
    defaults = {"messages": QUESTION, "max_tokens": 8}
    return ask(http, "/v1/chat/completions", status, **(defaults | body))


def complete(http: httpx.Client, prompt: Any, status: int = 200, **body: Any) -> dict[str, Any]:
    """A completion, by default of 8 tokens."""
    return ask(http, "/v1/completions", status, **({"prompt": prompt, "max_tokens": 8} | body))


def refused(found: dict[str, Any], kind: str = "invalid_request_error") -> dict[str, Any]:
    """The error in a reply that is one."""
    assert found.keys() == {"error"}
    assert found["error"]["type"] == kind
    assert found["error"]["message"]
    return found["error"]


def stream(http: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    body = {"model": "tiny", "stream": True} | body
    with http.stream("POST", path, json=body) as response:
        text = response.read().decode("ascii")
    assert response.status_code == 200, text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
