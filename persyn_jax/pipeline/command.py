"""What the scripts share: the command line, and how errors end. Light: imports no JAX."""

import argparse
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from persyn_jax.huge_pages import ask_for_huge_pages


def make_parser(description: str, config: Path | None = None) -> argparse.ArgumentParser:
    """A parser of --config, --json and overrides; call its `parse_intermixed_args`.

    config: default of --config; None makes it required.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--config",
        type=Path,
        default=config,
        required=config is None,
        help="YAML file that describes the run",
    )
    parser.add_argument("--json", type=Path, help="also write the summary to this file")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override a value of the config"
    )
    return parser


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="redo stages whose inputs, config or code have changed; keeps all answers",
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Flags of a command that is started on several hosts at once."""
    parser.add_argument(
        "--distributed", action="store_true", help="several processes, which JAX finds by itself"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="which one this is, from 0 on")


def start_processes(arguments: argparse.Namespace) -> int:
    """Finds the other processes that `add_processes` speaks of; returns how many there are, or 0 if
    only JAX knows.

    Raises ConfigError when they are not to be found.
    """
    from persyn_jax.config import ConfigError

    if not (arguments.distributed or arguments.coordinator):
        return 1
    import jax

    try:
        jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"the other processes are not to be found: {error}") from None
    return arguments.processes or 0


def end_with_one_line(main: Callable[[], None]) -> None:
    """Runs `main`; exits 2 on bad input, 1 on other failures, 130 on Ctrl-C, each with one line.

    SIGTERM ends as Ctrl-C does, so that the sampling service is stopped then too. An exception
    that no failure outside this program explains is a bug, and keeps its traceback.
    """
    from persyn_jax.config import ConfigError

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except ConfigError as error:
        _exit(str(error), 2)
    except KeyboardInterrupt:
        _exit("interrupted; the same command goes on from here", 130)
    except (RuntimeError, ArithmeticError, OSError) as error:
        _exit(str(error), 1)


def _exit(line: str, code: int) -> None:
    print("error: " + " ".join(line.split()), file=sys.stderr)
    sys.exit(code)


def stage_main(description: str, name: str, by_processes: bool = False) -> None:
    """The body of a stage's script: runs this stage on the run folder of --config.

    by_processes: the stage can be computed by several processes together.
    """

    def main() -> None:
        parser = make_parser(description)
        add_overwrite(parser)
        if by_processes:
            add_processes(parser)
        arguments = parser.parse_intermixed_args()
        from persyn_jax import config
        from persyn_jax.pipeline.config import RunConfig
        from persyn_jax.pipeline.run import open_run, run_stage
        from persyn_jax.pipeline.stages import STAGES

        loaded = config.load(RunConfig, arguments.config, arguments.overrides)
        (stage,) = (stage for stage in STAGES if stage.name == name)
        processes = start_processes(arguments) if by_processes else 1
        with open_run(loaded, arguments.overwrite, processes) as run:
            summary = run_stage(stage, run).summary
            is_first = run.is_first
        if is_first:
            print_summary(summary, arguments.json)

    ask_for_huge_pages()
    end_with_one_line(main)


def print_summary(summary: dict[str, Any], path: Path | None) -> None:
    """Prints the summary as JSON, and writes it to `path` if there is one."""
    print(json.dumps(summary, indent=2))
    if path is not None:
        from persyn_jax import store

        store.write_json(path, summary)
