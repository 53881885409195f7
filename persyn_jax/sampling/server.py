"""The HTTP server: uvicorn, except for how it ends and how it refuses headers that are too long."""

import sys
import time
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from persyn_jax.sampling.http_limits import Room

_SLACK_BYTES = 4096  # what h11 counts besides the headers that HttpLimits counts
_KEEP_ALIVE_SECONDS = 75


class Server(uvicorn.Server):
    """Ends on SIGTERM or SIGINT when running requests have ended, or on a second one at once.

    New requests are refused meanwhile (`Room.drains`). Then `run` returns.
    """

    def __init__(self, app: Any, room: Room, max_header_bytes: int, drain_seconds: float):
        super().__init__(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_level="error",
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=1,
                h11_max_incomplete_event_size=max_header_bytes + _SLACK_BYTES,
            )
        )
        self._room = room
        self._drain_seconds = drain_seconds
        self._deadline = 0.0

    def handle_exit(self, sig, frame) -> None:
        """Begins to drain; a second signal ends it."""
        if self._room.drains:
            self.should_exit = True
        else:
            self._room.drains = True
            self._deadline = time.monotonic() + self._drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Whether to end now; asked ten times a second."""
        if self._room.drains and (not self._room.requests or time.monotonic() > self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)


class _Protocol(H11Protocol):
    def send_400_response(self, msg: str) -> None:
        """Called while h11's complaint is being handled, which knows the right status."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        head = h11.Response(
            status_code=status,
            headers=[("content-type", "text/plain; charset=utf-8"), ("connection", "close")],
        )
        for event in (head, h11.Data(data=msg.encode()), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
