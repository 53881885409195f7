"""The JSON file of the gossip grid, which is its result and its memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from persyn_jax import store
from persyn_jax.bench.grid import GridConfig, GridRow
from persyn_jax.config import ConfigError, config_class, to_values, validate


@config_class
class SavedGrid:
    """What the file holds."""

    config: dict[str, Any]
    """Of the last comparison."""
    rows: list[GridRow]
    """Of the last comparison, as far as it has come."""
    earlier_rows: list[GridRow]
    """Of other comparisons; any of them that the last one needs moves to `rows` in its turn."""


def read_rows(path: Path) -> dict[str, GridRow]:
    """All rows of the file by their keys; none if there is no file.

    Raises ConfigError: a damaged file, or one of something else.
    """
    if not path.exists():
        return {}
    values = store.read_json(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a result of this script, got {type(values).__name__}")
    try:
        saved = validate(SavedGrid, values, where=str(path))
    except ConfigError as error:
        complaint, *others = str(error).split("; ")
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigError(f"{complaint}{more}: not a result of this script") from None
    return {row.key: row for row in saved.earlier_rows + saved.rows}


def save_rows(
    path: Path, config: GridConfig, rows: Sequence[GridRow], finished: Mapping[str, GridRow]
) -> None:
    """Writes the rows so far, atomically, and those of `finished` that are not among them.

    Raises ConfigError if the file cannot be written.
    """
    keys = {row.key for row in rows}
    earlier = [row for key, row in finished.items() if key not in keys]
    saved = {
        "config": to_values(config),
        "rows": [vars(row) for row in rows],
        "earlier_rows": [vars(row) for row in earlier],
    }
    store.write_json(path, saved)
