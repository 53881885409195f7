"""An HTTP endpoint that answers as a test says, for the client to cope with."""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# (request body, how many times its prompt has been asked) -> (status, body[, headers])
Script = Callable[[dict[str, Any], int], tuple]


def completion(text: Any = "yes", finish_reason: Any = "stop", **choice: Any) -> bytes:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": text}
    body = {
        "choices": [{"message": message, "finish_reason": finish_reason, **choice}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }
    return json.dumps(body).encode()


def error(message: str) -> bytes:
    """The body that goes with a status of failure."""
    return json.dumps({"error": {"message": message, "type": "invalid_request_error"}}).encode()


@dataclass
class Endpoint:
    """What the server does, and what it saw."""

    url: str = ""
    script: Script = lambda body, attempt: (200, completion())
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def asked(self, prompt: str) -> int:
        """How many times the prompt was asked."""
        return sum(body["messages"][-1]["content"] == prompt for body in self.requests)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # the client may have given up
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serving() -> Iterator[Endpoint]:
    """Serves on a free port until the end of the block."""
    endpoint = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # the body follows the head at once

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                endpoint.requests.append(body)
                endpoint.headers.append(dict(self.headers))
                endpoint.paths.append(self.path)
                attempt = endpoint.asked(body["messages"][-1]["content"])
            status, data, *headers = endpoint.script(body, attempt)
            with contextlib.suppress(ConnectionError):  # the client may have given up
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(data)))
                for name, value in dict(*headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield endpoint
        finally:
            server.shutdown()
            thread.join()
