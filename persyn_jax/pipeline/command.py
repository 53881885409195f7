"""What the scripts share: the command line, and how errors end. Light: imports no JAX."""

import argparse
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


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


def stage_main(description: str, name: str) -> None:
    """The body of a stage's script: runs this stage on the run folder of --config."""

    def main() -> None:
        parser = make_parser(description)
        add_overwrite(parser)
        arguments = parser.parse_intermixed_args()
        from persyn_jax import config
        from persyn_jax.pipeline.config import RunConfig
        from persyn_jax.pipeline.run import open_run, run_stage
        from persyn_jax.pipeline.stages import STAGES

        loaded = config.load(RunConfig, arguments.config, arguments.overrides)
        (stage,) = (stage for stage in STAGES if stage.name == name)
        with open_run(loaded, arguments.overwrite) as run:
            summary = run_stage(stage, run).summary
        print_summary(summary, arguments.json)

    end_with_one_line(main)


def print_summary(summary: dict[str, Any], path: Path | None) -> None:
    """Prints the summary as JSON, and writes it to `path` if there is one."""
    print(json.dumps(summary, indent=2))
    if path is not None:
        from persyn_jax import store

        store.write_json(path, summary)
