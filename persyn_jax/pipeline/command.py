"""What the stage scripts share: the command line, and how errors end."""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def parse_arguments(description: str, *flags: tuple[str, str]) -> argparse.Namespace:
    """--config, --json and overrides, and further on/off flags as (name, help)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, required=True, help="YAML file that describes the run")
    parser.add_argument("--json", type=Path, help="also write the printed summary to this file")
    for flag, text in flags:
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override a value of the config"
    )
    return parser.parse_args()


OVERWRITE = ("--overwrite", "redo stages whose inputs, config or code have changed; keeps all answers")


def end_with_one_line(main: Callable[[], None]) -> None:
    """Runs `main`; exits 2 on bad input, 1 on a failure that is not the user's, 130 on Ctrl-C, each with one line.

    SIGTERM ends as Ctrl-C does, so that the sampling service is stopped then too.
    """
    from persyn_jax.config import ConfigError

    signal.signal(signal.SIGTERM, lambda *_: _raise_interrupt())
    try:
        main()
    except ConfigError as error:
        _exit(str(error), 2)
    except KeyboardInterrupt:
        _exit("interrupted; the same command goes on from here", 130)
    except (RuntimeError, ArithmeticError, OSError) as error:
        _exit(f"{error}", 1)


def _raise_interrupt() -> None:
    raise KeyboardInterrupt


def _exit(line: str, code: int) -> None:
    print("error: " + " ".join(line.split()), file=sys.stderr)
    sys.exit(code)


def stage_main(description: str, names: Sequence[str]) -> None:
    """The body of a stage's script: runs the stages of these names on the run folder of --config."""

    def main() -> None:
        arguments = parse_arguments(description, OVERWRITE)
        from persyn_jax import config
        from persyn_jax.pipeline.config import RunConfig
        from persyn_jax.pipeline.run import open_run, run_stage
        from persyn_jax.pipeline.stages import STAGES

        loaded = config.load(RunConfig, arguments.config, arguments.overrides)
        summaries: dict[str, Any] = {}
        with open_run(loaded, arguments.overwrite) as run:
            for stage in STAGES:
                if stage.name in names:
                    summaries[stage.name] = run_stage(stage, run).summary
        print_summary(summaries, arguments.json)

    end_with_one_line(main)


def print_summary(summary: dict[str, Any], path: Path | None) -> None:
    """Prints the summary as JSON, and writes it to `path` if there is one."""
    text = json.dumps(summary, indent=2)
    print(text)
    if path is not None:
        from persyn_jax.store import write_text

        write_text(path, text + "\n")
