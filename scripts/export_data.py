"""The training rows of a run as a data set for other trainers.

    uv run scripts/export_data.py --config configs/quickstart.yaml --format trl --out data/mine

Needs the stages up to generate. Rows whose prompt repeats an eval prompt, or a prompt in a file of
--against, are left out. README.md is the data set's card, made from the rows.

The JSON summary holds `rows`, `unusable`, `contaminated`, `teachers` (rows of each) and
`strictest_licence`.
"""

import os
from pathlib import Path

from persyn_jax.pipeline.command import end_with_one_line, make_parser, print_summary


def main() -> None:
    parser = make_parser("The training rows of a run as a data set for other trainers.")
    parser.add_argument(
        "--format", choices=("trl", "llama_factory", "axolotl", "jsonl"), required=True
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--against",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="evaluation prompts to keep clear of, .jsonl or .parquet",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="also upload it; the token is that of the environment variable HF_TOKEN",
    )
    arguments = parser.parse_intermixed_args()
    from persyn_jax import config
    from persyn_jax.pipeline.config import RunConfig
    from persyn_jax.pipeline.export import export, push_to_hub

    loaded = config.load(RunConfig, arguments.config, arguments.overrides)
    summary = export(loaded, arguments.format, arguments.out, arguments.against)
    if arguments.push_to_hub:
        summary["pushed_to"] = push_to_hub(
            arguments.out, arguments.push_to_hub, os.environ.get("HF_TOKEN")
        )
    print_summary(summary, arguments.json)


if __name__ == "__main__":
    end_with_one_line(main)
