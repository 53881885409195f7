"""Studies a run's router: learning curve, reliability, losses with ties, adding a teacher.

    uv run scripts/router_study.py --config configs/quickstart.yaml

With `router_study.backbones=[frozen,lora,full]` also which of these routers is best, and what it
takes; those whose backbone learns take long. With `router_study.other_run=FOLDER`, a run of another
student on the same answers, how this run's router serves that student.

Needs the stages calibrate and score; nobody is asked. Prints tables and writes router_study.json
into the run folder; --json FILE gets the same (keys: `study_router`, `compare_backbones` and
`judge_transfer` in persyn_jax/pipeline/router_study.py).
"""

from persyn_jax.huge_pages import ask_for_huge_pages
from persyn_jax.pipeline.command import end_with_one_line, make_parser


def main() -> None:
    arguments = make_parser("Studies a run's router on its calibration.").parse_intermixed_args()
    from persyn_jax import config, store
    from persyn_jax.pipeline.router_study import RouterStudyConfig, study_lines, study_run

    loaded = config.load(RouterStudyConfig, arguments.config, arguments.overrides)
    found = study_run(loaded)
    if arguments.json is not None:
        store.write_json(arguments.json, found)
    print("\n".join(study_lines(found)))


if __name__ == "__main__":
    ask_for_huge_pages()
    end_with_one_line(main)
