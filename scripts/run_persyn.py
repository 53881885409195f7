"""Runs all stages of a run, from its prompts to its report.

    uv run scripts/run_persyn.py --config configs/quickstart.yaml

Run it again and it does nothing; kill it and run it again and it goes on where it was.
"""

from persyn_jax.huge_pages import ask_for_huge_pages
from persyn_jax.pipeline.command import add_overwrite, end_with_one_line, make_parser


def main() -> None:
    parser = make_parser("Route then generate: all stages of a run, one after the other.")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print stages, counts, tokens and memory, and compute nothing",
    )
    add_overwrite(parser)
    arguments = parser.parse_intermixed_args()
    from persyn_jax import config, store
    from persyn_jax.pipeline.config import RunConfig

    loaded = config.load(RunConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        from persyn_jax.pipeline.estimate import estimate_lines
        from persyn_jax.pipeline.prompts import make_prompts

        print("\n".join(estimate_lines(loaded, make_prompts(loaded))))
        return
    from persyn_jax.pipeline.run import open_run, run_stage
    from persyn_jax.pipeline.stages import STAGES
    from persyn_jax.reporting.summary import summary_lines

    with open_run(loaded, arguments.overwrite, whole=True) as run:
        for stage in STAGES:
            run_stage(stage, run)
        report = store.read_json(run.folder / "report.json")
    if arguments.json is not None:
        store.write_json(arguments.json, report)
    print("\n".join(summary_lines(report)))
    print(f"report: {loaded.run_folder / 'report.html'}")


if __name__ == "__main__":
    ask_for_huge_pages()
    end_with_one_line(main)
