"""An endpoint for batches, which answers each prompt as a test says."""

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD = {"choices": [{"text": "yes"}], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def entry(name: str, **changed) -> dict:
    """An entry of a batch that asks the prompt `name`."""
    body = {"model": "m", "prompt": name}
    return {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/completions",
        "body": body,
    } | changed


class Server:
    """Answers with `script(name, times asked)` -> (status, headers, body); counts requests."""

    def __init__(self):
        self.script = lambda name, attempt: (200, {}, GOOD)
        self.asked: Counter[str] = Counter()
        self.seen: list[tuple[str, dict, dict]] = []
        self.lock = threading.Lock()
        self.url = ""


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Serves on a free port until the end of the block."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.asked[body["prompt"]] += 1
                attempt = server.asked[body["prompt"]]
                server.seen.append((self.path, dict(self.headers), body))
            status, headers, reply = server.script(body["prompt"], attempt)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    class Http(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    with Http(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
