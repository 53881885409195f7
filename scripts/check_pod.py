"""Checks gossip on the devices that are there, and times it in a train step: five minutes.

    uv run scripts/check_pod.py --platform tpu --json check_pod.json

On several hosts, start it on each: with `--distributed` where JAX can find out by itself who is
there (TPU slices, Slurm, Open MPI), else with `--coordinator`, `--processes` and `--process`.
Exits with 1 if a check fails. The JSON, which is printed too, is what to send back; its keys are
those of `summary` in persyn_jax/bench/check_pod.py.
"""

from pathlib import Path

from persyn_jax.pipeline.command import (
    add_processes,
    end_with_one_line,
    make_parser,
    print_summary,
    start_processes,
)

CONFIG = Path(__file__).parents[1] / "configs" / "check_pod.yaml"
QUICK = ("rounds=60", "dimension=512", "steps=3", "layers=1", "width=32", "row_tokens=16")


def main() -> None:
    parser = make_parser("Checks gossip on the devices that are there.", CONFIG)
    parser.add_argument("--platform", help="the same as the override platform=NAME")
    parser.add_argument("--quick", action="store_true", help="a minute, for a first look")
    add_processes(parser)
    arguments = parser.parse_intermixed_args()
    overrides = [*QUICK * arguments.quick, *arguments.overrides]
    if arguments.platform is not None:
        overrides.append(f"platform={arguments.platform}")
    from persyn_jax import config, mesh
    from persyn_jax.bench import check_pod
    from persyn_jax.pipeline.progress import say

    loaded = config.load(check_pod.CheckPodConfig, arguments.config, overrides)
    start_processes(arguments)
    mesh.start_platform(loaded.platform, loaded.host_devices if loaded.platform == "cpu" else 1)
    workers = check_pod.all_workers()
    import jax

    is_first, checks = jax.process_index() == 0, []
    for check in check_pod.run_checks(loaded, workers):
        checks.append(check)
        if is_first:
            state = "ok" if check.passed else "FAILED"
            say(f"{state:<8}{check.name}: {check.measured:.6g}, expected {check.expected}")
    times = check_pod.time_steps(loaded, workers)
    summary = check_pod.summary(loaded, workers, checks, times)
    if is_first:
        print_summary(summary, arguments.json)
    if not summary["passed"]:
        failed = [check.name for check in checks if not check.passed]
        raise RuntimeError("failed: " + "; ".join(failed))


if __name__ == "__main__":
    end_with_one_line(main)
