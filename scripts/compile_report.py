"""Compiles the student's train step for a TPU slice that is not there, and says what came out.

    uv run --group aot scripts/compile_report.py --topology v5e:4x4

Exits with 1 if workers would not exchange, or would collect parameters on one device.
"""

from pathlib import Path

from persyn_jax.pipeline.command import end_with_one_line, make_parser

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def main() -> None:
    parser = make_parser("Compiles the student's train step for a TPU slice.", QUICKSTART)
    parser.add_argument("--topology", default="v5e:4x4", help="the slice (default v5e:4x4)")
    arguments = parser.parse_intermixed_args()
    from persyn_jax import config
    from persyn_jax.pipeline.config import RunConfig

    loaded = config.load(RunConfig, arguments.config, arguments.overrides)
    import dataclasses

    from persyn_jax import mesh, store
    from persyn_jax.bench.compile_report import (
        compile_student_step,
        complaint,
        report_lines,
        slice_mesh,
    )
    from persyn_jax.models.weights import load_config

    mesh.start_platform("cpu", 1)
    devices = slice_mesh(arguments.topology)
    report = compile_student_step(load_config(loaded.student), loaded.training, devices)
    print(f"{'topology':<20}{arguments.topology}")
    print("\n".join(report_lines(report)))
    if arguments.json is not None:
        summary = {"topology": arguments.topology, **dataclasses.asdict(report)}
        store.write_json(arguments.json, summary)
    if (wrong := complaint(report)) is not None:
        raise RuntimeError(wrong)


if __name__ == "__main__":
    end_with_one_line(main)
