"""Checks whether an OpenAI-compatible endpoint, anybody's, means what it says.

    uv run scripts/check_endpoint.py http://localhost:8000/v1 --json verdicts.json

Prints a table: pass, FAIL, not offered or undecided, with one line of evidence each. Exits with 1
if a check fails. The JSON holds `url`, `model`, `passed` and `verdicts` with `name`, `state` and
`evidence`.
"""

import argparse
from pathlib import Path

from persyn_jax.pipeline.command import end_with_one_line


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Checks whether an OpenAI-compatible endpoint means what it says."
    )
    parser.add_argument("url", metavar="URL", help="for example http://localhost:8000/v1")
    parser.add_argument("--model", help="default: the first that the endpoint lists")
    parser.add_argument(
        "--api-key-env", metavar="VAR", help="environment variable that holds the API key"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="the model's tokenizer, to send prompts as token ids too",
    )
    parser.add_argument("--json", type=Path, help="also write the verdicts to this file")
    arguments = parser.parse_args()
    from persyn_jax.sampling.address import api_key, check_url

    check_url("URL", arguments.url)
    key = api_key(arguments.api_key_env)
    from persyn_jax.bench.endpoint_checks import check_endpoint, failed, table_line

    model, rows = check_endpoint(
        arguments.url,
        arguments.model,
        key,
        arguments.tokenizer,
        lambda row: print(table_line(row), flush=True),
    )
    if arguments.json is not None:
        from persyn_jax import store

        verdicts = [row._asdict() for row in rows]
        summary = {"url": arguments.url, "model": model, "passed": not failed(rows)}
        store.write_json(arguments.json, {**summary, "verdicts": verdicts})
    if failed(rows):
        raise RuntimeError("failed: " + ", ".join(failed(rows)))


if __name__ == "__main__":
    end_with_one_line(main)
