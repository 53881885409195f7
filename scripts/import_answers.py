"""Answers, preferences or scores that exist already, as input of a run.

    uv run scripts/import_answers.py --format magpie_zoo train-*.parquet --out data/magpie_zoo

magpie_zoo, persyn_math: prompts.jsonl and one file of answers a teacher in --out; prints the lines
for a run's config that take them, with licences left to fill in.

p2l, routerbench, llmrouterbench: router data. --out becomes a run folder whose router
`train_router.py` trains next; prints the lines for its config.

The JSON summary holds `format`, `prompts`, and either `answers` (how many each teacher has) or
`rewards`. What each format is: persyn_jax/pipeline/parallel_answers.py and router_data.py.
"""

import argparse
from pathlib import Path

from persyn_jax.pipeline.command import end_with_one_line

PARALLEL = ("magpie_zoo", "persyn_math")
SCORES = ("p2l", "routerbench", "llmrouterbench")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Answers, preferences or scores that exist already, as input of a run."
    )
    parser.add_argument("files", type=Path, nargs="+", help=".jsonl, .json or .parquet")
    parser.add_argument("--format", choices=PARALLEL + SCORES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--json", type=Path, help="also write a summary to this file")
    arguments = parser.parse_args()
    if arguments.format in PARALLEL:
        summary = import_answers(arguments)
    else:
        summary = import_scores(arguments)
    if arguments.json is not None:
        from persyn_jax import store

        store.write_json(arguments.json, {"format": arguments.format, **summary})


def import_answers(arguments) -> dict:
    from persyn_jax.pipeline.parallel_answers import config_lines, import_parallel

    imported = import_parallel(arguments.files, arguments.out)
    print("\n".join(config_lines(arguments.format, imported)))
    return {"prompts": imported.prompts, "answers": imported.answers}


def import_scores(arguments) -> dict:
    from persyn_jax.pipeline.router_data import READERS, config_lines, to_records, write_run

    prompts, rewards = to_records(READERS[arguments.format](arguments.files))
    write_run(arguments.out, prompts, rewards)
    print("\n".join(config_lines(arguments.out, rewards)))
    return {"prompts": len(prompts), "rewards": len(rewards)}


if __name__ == "__main__":
    end_with_one_line(main)
