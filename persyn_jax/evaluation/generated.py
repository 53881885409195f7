"""Prompts drawn from the generators of reasoning-gym."""

import dataclasses
import difflib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from persyn_jax.config import ConfigError
from persyn_jax.evaluation.rows import Question

LICENCE = "Apache-2.0"
"""Licence of reasoning-gym, which follows every prompt drawn from it."""

UNREPEATABLE_TASKS = frozenset(
    {
        "codeio",
        "isomorphic_strings",
        "knight_swap",
        "polynomial_multiplication",
        "ransom_note",
        "word_ladder",
    }
)
"""Tasks of reasoning-gym 0.1.25 whose draws change from process to process, whatever the seed:
they iterate over a set of strings."""


def draw(
    source: str, task: str, settings: dict[str, Any], seed: int, draws: int
) -> Iterator[Question]:
    """The first `draws` items of the generator `task`, repeats and all; the ids count the draws.

    The question is the user message as it stands: most carry their own instruction on the form of
    the answer. The reference is the generator's one answer. A few puzzles admit several
    (`countdown`), and there it is one of them.

    Raises ConfigError: unknown or unrepeatable task, unknown setting, a setting's value that the
    generator refuses, a task without a single reference answer.
    """
    where = f"source {source!r}"
    for index, entry in enumerate(_entries(where, task, settings, seed, draws)):
        if not isinstance(entry["answer"], str):
            raise ConfigError(f"{where}: task {task!r} has no single reference answer to verify")
        yield Question(
            where=f"{where}: draw {index}",
            id=f"{source}-{index:04d}",
            messages=[{"role": "user", "content": entry["question"]}],
            answer=entry["answer"],
            split=None,
        )


def _entries(
    where: str, task: str, settings: dict[str, Any], seed: int, draws: int
) -> Iterator[dict[str, Any]]:
    DATASETS, create_dataset = _reasoning_gym()
    _check_task(where, task, settings, DATASETS)
    try:
        dataset = create_dataset(task, **settings, seed=seed, size=draws)
        for index in range(draws):
            yield dataset[index]
    except Exception as error:  # generators refuse a value by whatever comes: assert, KeyError, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{where}: task {task!r} refuses its settings: {reason}") from None


def _reasoning_gym():
    """The generators by name, and the function that makes one."""
    # One puzzle, zebra_puzzles, wants a SAT solver that comes as C source only and is not installed
    # here. The package imports it at once, so something must stand in its place.
    if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = ModuleType("pycosat")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a package that it imports does not compile without
        from reasoning_gym.factory import DATASETS, create_dataset
    return DATASETS, create_dataset


def _check_task(where: str, task: str, settings: dict[str, Any], tasks: dict[str, Any]) -> None:
    if task not in tasks:
        near = difflib.get_close_matches(task, tasks, n=3)
        hint = f", near it: {', '.join(near)}" if near else ""
        raise ConfigError(f"{where}: reasoning-gym has no task {task!r}{hint}")
    if task in UNREPEATABLE_TASKS:
        raise ConfigError(f"{where}: task {task!r} does not repeat with its seed: choose another")
    _, config_type = tasks[task]
    allowed = sorted({field.name for field in dataclasses.fields(config_type)} - {"seed", "size"})
    for setting in settings:
        if setting not in allowed:
            raise ConfigError(
                f"{where}: task {task!r} has no setting {setting!r}, only {', '.join(allowed)}"
            )
