"""Does the reward foresee the gain? Short fine-tunings of the student on teachers' answers.

    uv run scripts/gain_audit.py --config configs/quickstart.yaml gain_audit.steps=4

Needs the stages calibrate and score; nobody is asked. Goes on where it was stopped. Prints tables
and writes gain_audit.json into the run folder, which the report shows when it is made next; --json
FILE gets the same (keys: `audit_run` in persyn_jax/pipeline/gain_audit.py).
"""

from persyn_jax.huge_pages import ask_for_huge_pages
from persyn_jax.pipeline.command import end_with_one_line, make_parser


def main() -> None:
    arguments = make_parser("Compares rewards with measured gains.").parse_intermixed_args()
    from persyn_jax import config, store
    from persyn_jax.pipeline.gain_audit import GainAuditConfig, audit_lines, audit_run

    loaded = config.load(GainAuditConfig, arguments.config, arguments.overrides)
    found = audit_run(loaded)
    if arguments.json is not None:
        store.write_json(arguments.json, found)
    print("\n".join(audit_lines(found)))


if __name__ == "__main__":
    ask_for_huge_pages()
    end_with_one_line(main)
