"""The student on published benchmarks, before and after training, through lm-eval.

    uv venv lm_eval_env
    uv pip install --no-config --python lm_eval_env 'lm-eval[api,ifeval,math]==0.4.13'
    uv run scripts/evaluate_benchmarks.py --config configs/quickstart.yaml \\
        --lm-eval lm_eval_env/bin/lm_eval

(--no-config: lm-eval wants another antlr4 than this project is pinned to.)

Goes on benchmark by benchmark where it was stopped. Those whose data must come from a hub that is
not there, or that need a package, are named, and the others run; exits with 2 if none could.
benchmarks/MODEL/TASK in the run folder holds what lm-eval wrote, benchmarks.parquet the score of
every item, benchmarks.json the summary, which the report shows when it is made next.

The JSON summary holds `tasks`, by name, each with its `metric`, `models` (mean, low, high, items,
lm_eval by model) and `after_minus_before` (mean, low, high, or null), and `not_run` (a line each).
"""

from pathlib import Path

from persyn_jax.pipeline.command import add_overwrite, end_with_one_line, make_parser


def main() -> None:
    parser = make_parser("The student on published benchmarks, through lm-eval.")
    parser.add_argument(
        "--lm-eval",
        type=Path,
        required=True,
        metavar="PATH",
        help="the lm_eval command of an environment that has lm-eval[api]",
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="before|after|PATH",
        help="the student before or after training, or a model's path; may be repeated "
        "(default: before and after)",
    )
    parser.add_argument("--limit", type=int, help="items of each task, at most: to try it out")
    add_overwrite(parser)
    arguments = parser.parse_intermixed_args()
    from persyn_jax import config, store
    from persyn_jax.pipeline import benchmark_scores, benchmarks
    from persyn_jax.pipeline.config import RunConfig
    from persyn_jax.pipeline.run import open_run

    if arguments.limit is not None and arguments.limit < 1:
        raise config.ConfigError(f"--limit {arguments.limit}: must be at least 1")
    loaded = config.load(RunConfig, arguments.config, arguments.overrides)
    with open_run(loaded, arguments.overwrite) as run:
        models = benchmarks.models_to_examine(run, arguments.model or ["before", "after"])
        ran = benchmarks.run_benchmarks(run, arguments.lm_eval, models, arguments.limit)
        if not ran.finished and not ran.failed:
            lines = "; ".join(ran.impossible.values())
            raise config.ConfigError(f"no benchmark could be run: {lines}")
        _, summary = benchmark_scores.collect(run, arguments.limit)
    not_run = [*ran.impossible.values(), *ran.failed]
    print(
        "\n".join(
            [*benchmark_scores.summary_lines(summary), *(f"not run: {why}" for why in not_run)]
        )
    )
    if arguments.json is not None:
        store.write_json(arguments.json, {"tasks": summary, "not_run": not_run})
    if ran.failed:
        raise RuntimeError(f"{len(ran.failed)} failed: {'; '.join(ran.failed)}")


if __name__ == "__main__":
    end_with_one_line(main)
