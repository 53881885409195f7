"""Prompts drawn from the generators of reasoning-gym, and its own scores of answers to them."""

import dataclasses
import difflib
import functools
import importlib.util
import json
import re
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

RUNS_ANSWERS = frozenset(
    {
        "binary_matrix",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
"""Tasks whose own scorer runs an answer as Python code. No answer gets there."""

NOT_JSON = frozenset({"arc_agi", "rearc"})
"""Tasks whose own scorer knows a right answer by what JSON does not keep: tuples."""

ARITHMETIC = frozenset({"countdown", "puzzle24"})
"""Tasks whose own scorer does so too, for what must be arithmetic; only that gets there."""
_ARITHMETIC_ANSWER = re.compile(r"(?:[\d\s+/()-]|\*(?!\*))*", flags=re.ASCII)


def draw(
    source: str, task: str, settings: dict[str, Any], seed: int, draws: int, own_scorer: bool
) -> Iterator[Question]:
    """The first `draws` items of the generator `task`, repeats and all; the ids count the draws.

    The question is the user message as it stands: most carry their own instruction on the form of
    the answer. The reference is the generator's one answer. A few puzzles admit several
    (`countdown`), and there it is one of them.

    own_scorer: the reference is what `own_score` reads, the whole item as JSON.

    Raises ConfigError: unknown or unrepeatable task, unknown setting, a setting's value that the
    generator refuses; without `own_scorer` a task that has no single reference answer, with it a
    task whose scorer is not used here.
    """
    where = f"source {source!r}"
    if own_scorer:
        _check_scorer(where, task)
    for index, entry in enumerate(_entries(where, task, settings, seed, draws)):
        if not own_scorer and not isinstance(entry["answer"], str):
            raise ConfigError(
                f"{where}: task {task!r} has no single reference answer to compare with: set its "
                "verifier to reasoning_gym"
            )
        whole = {"task": task, "settings": settings, "entry": entry}
        yield Question(
            where=f"{where}: draw {index}",
            id=f"{source}-{index:04d}",
            messages=[{"role": "user", "content": entry["question"]}],
            answer=json.dumps(whole) if own_scorer else entry["answer"],
            split=None,
        )


def own_score(text: str, reference: str) -> float:
    """The score that the task itself gives the answer, in [0, 1]; white space around it is no part.

    Many tasks give a little to an answer of the right form, and some a part for a part.
    reference: as `draw` makes it with `own_scorer`. Raises ConfigError as `check_reference`.
    """
    whole = check_reference(reference)
    answer = text.strip()
    if whole["task"] in ARITHMETIC and not _ARITHMETIC_ANSWER.fullmatch(answer):
        answer = ""
    dataset = _dataset(whole["task"], json.dumps(whole["settings"]))
    try:
        return float(dataset.score_answer(answer, whole["entry"]))
    except Exception:  # scorers expect the form that they asked for
        return 0.0


def one_answer(reference: str) -> str | None:
    """The generator's one answer in a reference of `own_score`; None if it has none."""
    return check_reference(reference)["entry"]["answer"]


def check_reference(reference: str) -> dict[str, Any]:
    """The task, settings and entry in a reference of `own_score`.

    Raises ConfigError if it is none, or of a task whose scorer is not used here.
    """
    try:
        whole = json.loads(reference)
        entry = whole["entry"]
        task, _ = str(whole["task"]), dict(whole["settings"])
        _ = entry["question"], entry["answer"]
    except (ValueError, TypeError, KeyError):
        raise ConfigError(
            "the verifier reasoning_gym is for sources of kind reasoning_gym, or for references "
            "written by one"
        ) from None
    _check_scorer("verifier reasoning_gym", task)
    return whole


def _check_scorer(where: str, task: str) -> None:
    if task in RUNS_ANSWERS | NOT_JSON:
        reason = "runs answers as Python code" if task in RUNS_ANSWERS else "needs more than JSON"
        raise ConfigError(f"{where}: the scorer of task {task!r} {reason}: choose another verifier")


@functools.cache
def _dataset(task: str, settings: str) -> Any:
    _, create_dataset = _reasoning_gym()
    return create_dataset(task, **json.loads(settings), seed=0, size=1)


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
