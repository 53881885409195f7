"""Asks an OpenAI-compatible endpoint the requests of a file, in vLLM's batch file format.

    uv run scripts/run_batch.py -i in.jsonl -o out.jsonl --base-url http://localhost:8000/v1

The JSON summary holds the counts that `run_batch` in persyn_jax/sampling/batch_run.py returns.
Exits with 1 if an entry has no answer.
"""

import argparse
from pathlib import Path

from persyn_jax.pipeline.command import end_with_one_line, print_summary

DESCRIPTION = """\
Asks an OpenAI-compatible endpoint the requests of a file, in vLLM's batch file format:

  in   {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
  out  {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}

The url is that or /v1/completions. The output is appended to: the same command goes on after an
interruption, and entries whose custom_id has a final response there are not asked again, even if
their body has changed. Status 408, 409, 425, 429 and 5xx, and failing connections, are tried six
times with growing pauses, or after what Retry-After says (at most 5 minutes). What fails then is
written with an `error`, as is a 404; a rerun asks it again and appends a second row: the newest
line of a custom_id counts. Status 401 and 403 end the run.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-i", "--input", type=Path, required=True, help="JSON Lines to ask")
    parser.add_argument("-o", "--output", type=Path, required=True, help="appended to")
    parser.add_argument("--base-url", required=True, help="for example http://localhost:8000/v1")
    parser.add_argument(
        "--concurrency", type=int, default=32, help="requests under way at once (default 32)"
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds for one try (default 600)"
    )
    parser.add_argument(
        "--api-key-env", metavar="VAR", help="environment variable that holds the API key"
    )
    parser.add_argument("--json", type=Path, help="also write the summary to this file")
    arguments = parser.parse_args()
    import contextlib

    from persyn_jax.config import ConfigError
    from persyn_jax.pipeline.progress import progress, say
    from persyn_jax.sampling.address import api_key, check_url
    from persyn_jax.sampling.batch_run import Endpoint, run_batch

    if arguments.concurrency < 1 or not arguments.timeout > 0:
        raise ConfigError("--concurrency must be at least 1, and --timeout above 0")
    check_url("--base-url", arguments.base_url)
    endpoint = Endpoint(
        base_url=arguments.base_url,
        api_key=api_key(arguments.api_key_env),
        concurrency=arguments.concurrency,
        timeout_seconds=arguments.timeout,
    )
    with contextlib.ExitStack() as stack:

        def on_start(done, to_ask):
            say(f"{done} entries have a final response, {to_ask} to ask")
            return stack.enter_context(progress("asked", to_ask))

        summary = run_batch(arguments.input, arguments.output, endpoint, on_start)
    print_summary(summary, arguments.json)
    if summary["answered"] < summary["entries"]:
        raise RuntimeError(
            f"{arguments.output}: {summary['refused']} entries were refused and "
            f"{summary['failed']} failed; the same command asks the failed ones again"
        )


if __name__ == "__main__":
    end_with_one_line(main)
