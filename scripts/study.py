"""The study of strategies: trains students on the answers that each strategy routes, compares them.

    uv run scripts/study.py --config configs/study_small.yaml --minutes 150

Goes on where it was stopped, by --minutes or otherwise. Writes study.json and study.md into the
study's folder; --json FILE gets the former too (keys: `study_results` in
persyn_jax/pipeline/study_table.py).
"""

import time

from persyn_jax.huge_pages import ask_for_huge_pages
from persyn_jax.pipeline.command import add_overwrite, end_with_one_line, make_parser


def main() -> None:
    parser = make_parser("Compares the strategies by what students become.")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so many minutes")
    add_overwrite(parser)
    arguments = parser.parse_intermixed_args()
    from persyn_jax import config, store
    from persyn_jax.pipeline.study import StudyConfig, run_study
    from persyn_jax.pipeline.study_table import markdown_lines, power_lines, study_results

    started = time.monotonic()

    def may_go_on() -> bool:
        seconds = time.monotonic() - started
        return arguments.minutes is None or seconds < 60 * arguments.minutes

    loaded = config.load(StudyConfig, arguments.config, arguments.overrides)
    print("\n".join(power_lines(loaded)), flush=True)
    standing = run_study(loaded, arguments.overwrite, may_go_on)
    if not standing.trials:
        print("no student is finished yet; the same command goes on from here")
        return
    results = study_results(loaded, standing)
    lines = markdown_lines(results)
    store.write_json(loaded.folder / "study.json", results)
    store.write_text(loaded.folder / "study.md", "\n".join(lines) + "\n")
    if arguments.json is not None:
        store.write_json(arguments.json, results)
    print("\n".join(lines))
    if results["trials"]["finished"] < results["trials"]["of"]:
        print("stopped in time; the same command goes on from here")


if __name__ == "__main__":
    ask_for_huge_pages()
    end_with_one_line(main)
