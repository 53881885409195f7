"""Chat templates of foreign models, rendered in a process of their own.

Jinja's sandbox bounds what a template can reach, not how much it works: `{{ 'A' * 10**8 }}` is
allowed. So the process has 1 s of processor time and 256 MB of memory a template, and a new one
takes its place when it dies of that. It holds no secret but the messages.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from persyn_jax.config import ConfigError
from persyn_jax.models.tokenizer import Tokenizer
from persyn_jax.records import Message

_CHILD = Path(__file__).with_name("template_child.py")
_START_SECONDS = 120.0
_RENDER_SECONDS = 30.0
"""By the clock: the child's own limit counts its processor time, so that a busy machine refuses
nobody. This one is for a child that does not even run."""


class TemplateRenderer:
    """Renders one tokenizer's template. Not thread-safe."""

    def __init__(self, tokenizer: Tokenizer):
        template = tokenizer.get_chat_template()
        special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
        self._setup = {"template": template, "special_tokens": special}
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
        """The text of the messages, up to where the assistant begins to speak.

        tokenizer: the one it was made for. Raises ConfigError when the template refuses the
        messages or takes too much time or memory.
        """
        child = self._running()
        try:
            answer = _ask(child, {"messages": list(messages)}, _RENDER_SECONDS)
        except (EOFError, TimeoutError, BrokenPipeError):
            self.close()
            late = child.returncode in (-signal.SIGPROF, -signal.SIGKILL)
            reason = "took more than 1 s" if late else f"ended with status {child.returncode}"
            raise ConfigError(f"the chat template failed: it {reason}") from None
        if "error" in answer:
            raise ConfigError(f"the chat template refuses the messages: {answer['error']}")
        return answer["text"]

    def start(self) -> None:
        """Has the process ready, so that the first request need not wait for it."""
        self._running()

    def close(self) -> None:
        """Ends the process; `render` starts another one."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD)],  # -P: its folder has modules named as others'
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the service, which still has to finish
                bufsize=0,
            )
            try:
                _ask(self._child, self._setup, _START_SECONDS)
            except (EOFError, TimeoutError, BrokenPipeError):
                self.close()
                raise RuntimeError("the process for chat templates does not start") from None
        return self._child


def _ask(child: subprocess.Popen[bytes], question: dict, seconds: float) -> dict:
    """Raises EOFError or BrokenPipeError when the child has died, TimeoutError when it is late."""
    assert child.stdin is not None
    assert child.stdout is not None
    data = memoryview(json.dumps(question).encode() + b"\n")
    while data:
        data = data[child.stdin.write(data) :]
    deadline, answer = time.monotonic() + seconds, bytearray()
    while not answer.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
            raise TimeoutError
        part = os.read(child.stdout.fileno(), 1 << 20)
        if not part:
            child.wait()
            raise EOFError
        answer += part
    return json.loads(answer)
