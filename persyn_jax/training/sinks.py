"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio.

Each is an optional package, imported when it is named.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from persyn_jax.config import ConfigError

PROJECT = "persyn_jax"
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}

Log = Callable[[int, dict[str, float]], None]
"""(step, scalars by name)"""


def check_sinks(names: Sequence[str]) -> None:
    """Raises ConfigError for the first sink whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ConfigError(
                f"training.track: {name} needs the package {_PACKAGES[name]}, which is not "
                f"installed: pip install {_PACKAGES[name]}"
            )


@contextlib.contextmanager
def tracked(
    names: Sequence[str], run: str, folder: Path, config: dict[str, Any], first_step: int
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields a function that sends a metrics row to every sink named; closes them at the end.

    run: name of the run; a run that goes on under the same name goes on in the sinks, too.
    folder: the run's own; trackio keeps its files where its own settings say. config: plain values
    to show beside the run. first_step: where the run starts or goes on.
    """
    check_sinks(names)
    with contextlib.ExitStack() as stack:
        logs = [
            stack.enter_context(_SINKS[name](run, folder, config, first_step)) for name in names
        ]

        def track(row: Mapping[str, Any]) -> None:
            scalars = flat_scalars(row)
            for log in logs:
                log(row["step"], scalars)

        yield track


def flat_scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a metrics row by name, without its step.

    A list by worker becomes its mean under its own name and `name/0`, `name/1`, ...; a group
    becomes `name/member`. What is null, or no number, is left out.
    """
    scalars: dict[str, float] = {}
    for name, value in row.items():
        if name == "step":
            continue
        if isinstance(value, Mapping):
            members = flat_scalars(value)
            scalars |= {f"{name}/{member}": number for member, number in members.items()}
        elif isinstance(value, list):
            numbers = {place: float(part) for place, part in enumerate(value) if _is_number(part)}
            if numbers:
                scalars[name] = sum(numbers.values()) / len(numbers)
            scalars |= {f"{name}/{place}": number for place, number in numbers.items()}
        elif _is_number(value):
            scalars[name] = float(value)
    return scalars


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@contextlib.contextmanager
def _tensorboard(run: str, folder: Path, config: dict[str, Any], first_step: int) -> Iterator[Log]:
    """Event files in `folder/tensorboard`; steps from the first on replace those of before."""
    writers = importlib.import_module("tensorboardX")
    with writers.SummaryWriter(str(folder / "tensorboard"), purge_step=first_step) as writer:

        def log(step: int, scalars: dict[str, float]) -> None:
            for name, number in scalars.items():
                writer.add_scalar(name, number, step)

        yield log


@contextlib.contextmanager
def _wandb(run: str, folder: Path, config: dict[str, Any], first_step: int) -> Iterator[Log]:
    wandb = importlib.import_module("wandb")
    started = wandb.init(
        project=PROJECT, id=run, name=run, dir=str(folder), config=config, resume="allow"
    )
    try:
        yield lambda step, scalars: started.log(scalars, step=step)
    except BaseException:  # its own `with` would print a traceback, too
        started.finish(exit_code=1)
        raise
    started.finish(exit_code=0)


@contextlib.contextmanager
def _trackio(run: str, folder: Path, config: dict[str, Any], first_step: int) -> Iterator[Log]:
    trackio = importlib.import_module("trackio")
    started = trackio.init(project=PROJECT, name=run, config=config, resume="allow")
    try:
        yield lambda step, scalars: started.log(scalars, step=step)
    finally:
        started.finish()


_SINKS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
