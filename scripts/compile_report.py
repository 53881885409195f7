"""Compiles the student's train step for TPU slices that are not there, and says what came out.

    uv run --group aot scripts/compile_report.py --topology v5e:4x4 --slices 8 --schedule hypercube

Exits with 1 if the program is not what it should be: one collective-permute for each permutation
and message, nothing gathered. The JSON file holds `topology`, `slices`, `workers`, `schedule`, the
keys of `Wire`, and `programs` with those of `ProgramReport` (persyn_jax/bench/compile_report.py).

A worker's chips lie along `fsdp`, but for the config's `mesh.tensor`; `training.rows` are those of
each chip along `fsdp`. With `training.lora` it is the adapters' step, in which they alone are sent.

With --engine it is the sampling engine of the config's service section that is compiled, for
`engine.tensor` chips of the slice: no program may wait for the host, copy its cache, or gather
anything. The JSON file then holds `topology` and `engine` (keys: those of `EngineProgram`).
"""

from pathlib import Path

from persyn_jax.pipeline.command import end_with_one_line, make_parser

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def main() -> None:
    parser = make_parser("Compiles the student's train step for TPU slices.", QUICKSTART)
    parser.add_argument("--topology", default="v5e:4x4", help="of a slice (default v5e:4x4)")
    parser.add_argument("--slices", type=int, default=1, help="how many (default 1)")
    parser.add_argument(
        "--workers", type=int, help="default: the slices if there are several, else the chips"
    )
    parser.add_argument("--schedule", default="gosgd", help="by name (default gosgd)")
    parser.add_argument(
        "--cycle", action="store_true", help="also with the rounds of one period unrolled"
    )
    parser.add_argument(
        "--engine", action="store_true", help="the sampling engine instead of the train step"
    )
    arguments = parser.parse_intermixed_args()
    from persyn_jax import config
    from persyn_jax.pipeline.config import RunConfig

    loaded = config.load(RunConfig, arguments.config, arguments.overrides)
    if arguments.engine:
        report_the_engine(arguments, loaded)
    else:
        report_the_train_step(arguments, loaded)


def report_the_train_step(arguments, loaded) -> None:
    import dataclasses

    from persyn_jax import mesh, store
    from persyn_jax.bench.compile_report import (
        failures,
        report_lines,
        report_program,
        shape_lines,
        wire,
    )
    from persyn_jax.bench.pod_programs import programs
    from persyn_jax.bench.pod_shapes import link_model, pod_mesh, pod_shape
    from persyn_jax.models.weights import load_config
    from persyn_jax.training.memory import trained_shapes
    from persyn_jax.training.sharded import check_mesh

    shape = pod_shape(arguments.topology, arguments.slices, arguments.workers, loaded.mesh.tensor)
    wanted = programs(arguments.schedule, shape.workers, arguments.cycle)
    mesh.start_platform("cpu", 1)
    model, chips = load_config(loaded.student), pod_mesh(shape)
    trained, _ = trained_shapes(model, loaded.training)
    links, sent = link_model(shape), wire(trained, chips)
    check_mesh(model, chips.shape[mesh.FSDP], loaded.training.row_response_tokens, chips)
    print("\n".join(shape_lines(shape, arguments.schedule, sent)), flush=True)
    reports = [report_program(program, model, loaded.training, chips, links) for program in wanted]
    print("\n".join(report_lines(reports)))
    if arguments.json is not None:
        summary = {
            **shape._asdict(),
            "schedule": arguments.schedule,
            **sent._asdict(),
            "programs": [dataclasses.asdict(report) for report in reports],
        }
        store.write_json(arguments.json, summary)
    if wrong := failures(reports):
        raise RuntimeError("; ".join(wrong))


def report_the_engine(arguments, loaded) -> None:
    from persyn_jax import config, mesh, store
    from persyn_jax.bench.engine_report import report_engine, report_lines
    from persyn_jax.bench.pod_shapes import pod_mesh, pod_shape
    from persyn_jax.models.weights import load_config

    if loaded.service is None:
        raise config.ConfigError(f"{arguments.config}: has no service section")
    chips = pod_mesh(pod_shape(arguments.topology, 1, None)).devices.flatten().tolist()
    mesh.start_platform("cpu", 1)
    reports = report_engine(load_config(loaded.service.model), loaded.service.engine, chips)
    print("\n".join(report_lines(reports)))
    if arguments.json is not None:
        rows = [report._asdict() for report in reports]
        store.write_json(arguments.json, {"topology": arguments.topology, "engine": rows})
    if wrong := [report.failure for report in reports if report.failure]:
        raise RuntimeError("; ".join(wrong))


if __name__ == "__main__":
    end_with_one_line(main)
