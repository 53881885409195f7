"""An OpenAI-compatible endpoint that costs next to nothing, in a process of its own.

It answers every chat completion after a set time with a short text. Also the process's entry point
(`python -m persyn_jax.bench.mock_endpoint SECONDS`): prints its URL, and ends with its standard
input.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator

_MOST_BYTES = 1 << 20
_COMPLETION = json.dumps(
    {
        "id": "chatcmpl-mock",
        "object": "chat.completion",
        "model": "mock",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "forty-two " * 20},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 50, "completion_tokens": 40, "total_tokens": 90},
    }
).encode()


@contextlib.contextmanager
def mock_endpoint(seconds: float) -> Iterator[str]:
    """Runs the endpoint, and yields its base URL (ending in /v1).

    seconds: from a request to its answer. `GET /v1/asked` gives how often each last message was
    asked, as JSON.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "persyn_jax.bench.mock_endpoint", str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:  # closes its standard input on the way out, and waits
        assert child.stdout is not None
        yield child.stdout.readline().strip()


class _Connection(asyncio.Protocol):
    """HTTP/1.1 as far as a client of this package speaks it: no pipelining, no chunks."""

    def __init__(self, seconds: float, asked: Counter[str]):
        self._seconds = seconds
        self._asked = asked
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if len(self._received) > _MOST_BYTES:
            self._transport.close()
        elif end and len(body) >= _content_length(head):
            self._received = b""
            if head.startswith(b"GET"):
                self._send(json.dumps(self._asked).encode())
            else:
                self._asked[json.loads(body)["messages"][-1]["content"]] += 1
                asyncio.get_running_loop().call_later(self._seconds, self._send, _COMPLETION)

    def _send(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % len(body) + body)


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


async def _serve(seconds: float) -> None:
    asked: Counter[str] = Counter()
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(seconds, asked), "127.0.0.1", 0, backlog=1024
    )
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


def _end_with_standard_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    asyncio.run(_serve(float(sys.argv[1])))
