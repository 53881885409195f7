"""Typed configs from YAML: load, override, validate, fingerprint.

Generic: each room owns its own config dataclass. It is declared with `@config_class`, and bounds
stand in its annotations (`Annotated[float, Field(ge=0)]`). Everything that can be wrong in a file
ends in one `ConfigError` that names the file, the key, what was given and what is allowed.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as _pydantic_dataclass

T = TypeVar("T")


class ConfigError(ValueError):
    """Bad input of the user's, in one line. Scripts print it and exit with 2."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config_class(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, keyword-only, validated dataclass that refuses unknown keys."""
    return _pydantic_dataclass(cls, frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))  # pyrefly: ignore


def load(config_type: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Reads the YAML file at `path`, applies `section.key=value` overrides, validates the whole.

    Raises ConfigError: no such file, not YAML, a key given twice, unknown key, wrong type,
    impossible value.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        # A SafeLoader: constructs plain values only.
        values = yaml.load(path.read_text("utf-8"), Loader=_StrictLoader)
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not valid YAML: not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, got {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return validate(config_type, values, where=str(path))


def validate(config_type: type[T], values: dict[str, Any], where: str) -> T:
    """`values` as a `config_type`. Raises ConfigError with every complaint, `;` between them."""
    try:
        return TypeAdapter(config_type).validate_python(values)
    except ValidationError as error:
        complaints = [_complaint(detail) for detail in error.errors(include_url=False)]
        raise ConfigError(f"{where}: " + "; ".join(complaints)) from None


def _complaint(detail) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "unexpected_keyword_argument":
        return f"{key}: unknown key"
    if detail["type"] in ("missing", "missing_keyword_only_argument", "missing_argument"):
        return f"{key}: is required"
    if detail["type"] == "value_error":  # a check of ours: its message already says what is allowed
        return f"{key}: {detail['ctx']['error']}" if key else str(detail["ctx"]["error"])
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{key}: {message}, got {detail['input']!r}"


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: must have the form section.key=value")
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    *sections, last = key.split(".")
    target: Any = values
    for section in sections:
        target = _descend(target, section, override)
    if isinstance(target, list):
        _descend(target, last, override)  # checks the index
        target[int(last)] = value
    else:
        target[last] = value


def _descend(target: Any, section: str, override: str) -> Any:
    if isinstance(target, list):
        if not section.isdigit() or int(section) >= len(target):
            raise ConfigError(
                f"override {override!r}: {section!r} is no index of a list of {len(target)}"
            )
        return target[int(section)]
    value = target.setdefault(section, {})
    if not isinstance(value, (dict, list)):
        raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    return value


def to_values(config: Any) -> dict[str, Any]:
    """The config as plain values for YAML or JSON; `validate` of them gives the same config."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, every default written out."""
    return yaml.safe_dump(to_values(config), sort_keys=False, allow_unicode=True, width=120)


def fingerprint(value: Any) -> str:
    """16 hex digits of the SHA-256 of `value` (a dataclass or plain values) as canonical JSON."""
    if dataclasses.is_dataclass(value):
        value = to_values(value)
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML would silently keep the last)."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a plain word", key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)
