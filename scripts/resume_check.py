"""Stops trainings at random moments and checks that they go on bitwise as if nothing had been.

    uv run scripts/resume_check.py --json resume.json

Exits with 1 if a training differs by a bit. The JSON file holds `config` and `outcomes` (keys:
those of `Outcome` in persyn_jax.pipeline.resume_check.py).
"""

from pathlib import Path

from persyn_jax.pipeline.command import end_with_one_line, make_parser

CONFIG = Path(__file__).parents[1] / "configs" / "resume_check.yaml"


def main() -> None:
    arguments = make_parser("Checks that stopped trainings resume.", CONFIG).parse_intermixed_args()
    from persyn_jax import config, store
    from persyn_jax.pipeline import resume_check

    loaded = config.load(resume_check.ResumeConfig, arguments.config, arguments.overrides)
    outcomes = []
    for found in resume_check.check(loaded, resume_check.child_command()):
        outcomes.append(found)
        written = "background" if found.asynchronous else "foreground"
        print(
            f"{found.workers} workers, checkpoints in the {written}: {found.signal} after "
            f"{found.steps_seen} steps (exit {found.exit_code}), on from step {found.resumed_at}: "
            f"{'the same' if found.same else 'DIFFERS'}",
            flush=True,
        )
    if arguments.json is not None:
        rows = [found._asdict() for found in outcomes]
        store.write_json(arguments.json, {"config": config.to_values(loaded), "outcomes": rows})
    if differ := sum(not found.same for found in outcomes):
        raise RuntimeError(f"{differ} of {len(outcomes)} stopped trainings differ")


if __name__ == "__main__":
    end_with_one_line(main)
