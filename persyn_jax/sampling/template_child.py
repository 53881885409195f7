"""The program of the process in which chat templates are rendered: see `templates`.

Lines of JSON on standard input: first {"template", "special_tokens"}, then {"messages"} each time.
The answers: {"text"} or {"error"}; the first is {"text": ""} as soon as it is ready.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

_CPU_SECONDS = 1.0
_MEMORY_BYTES = 256 << 20


def main() -> None:
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    setup = json.loads(sys.stdin.readline())
    _limit_memory()
    print(json.dumps({"text": ""}), flush=True)
    for line in sys.stdin:
        # The signal's default action ends the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
        try:
            (text,), _ = render_jinja_template(
                conversations=[json.loads(line)["messages"]],
                chat_template=setup["template"],
                add_generation_prompt=True,
                **setup["special_tokens"],
            )
            answer = json.dumps({"text": text})
        except jinja2.TemplateError as error:
            answer = json.dumps({"error": str(error)})
        except MemoryError:
            answer = json.dumps({"error": f"it needs more than {_MEMORY_BYTES >> 20} MB"})
        except Exception as error:  # a template can raise whatever its filters and operators do
            answer = json.dumps({"error": f"{type(error).__name__}: {error}"})
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


def _limit_memory() -> None:
    """What the imports took, and so much more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
