"""Checks of what model files say, each ending in one ConfigError. Imports no JAX."""

import json
import reprlib
from pathlib import Path
from typing import Any

from persyn_jax.config import ConfigError

# Python objects take many times the room of the JSON that they are read from.
LONGEST_JSON = 1 << 24


def positive_int(value: object, where: str, most: int = 1 << 20) -> int:
    """`value`, read from a model file, if it is an integer from 1 to `most`; else ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{where} is {shown(value)}, must be an integer from 1 to {most}")
    return value


def positive_float(value: object, where: str) -> float:
    """`value`, read from a model file, if it is a finite number above 0; else ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ConfigError(f"{where} is {shown(value)}, must be a finite number above 0")
    return float(value)


def shown(value: object) -> str:
    """`value`, read from a model file, for a message: on one line, and short however large."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 120
    return " ".join(short.repr(value).split())


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`, called `where` in messages.

    Raises ConfigError for anything else, a key given twice, NaN, and nesting too deep to read.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for place, key in enumerate(keys) if key in keys[:place])
            raise ValueError(f"key {shown(twice)} is given twice")
        return found

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=no_constant)
    except RecursionError:
        raise ConfigError(f"{where}: not readable as JSON: nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must be a JSON object, is {shown(value)}")
    return value


def read_json(path: Path, longest: int = LONGEST_JSON) -> dict[str, Any]:
    """The JSON object in a file of at most `longest` bytes. Raises ConfigError as `parse_json`."""
    try:
        if (size := path.stat().st_size) > longest:
            raise ConfigError(f"{path}: has {size} bytes, must be at most {longest}")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: not readable: {error.strerror}") from None
