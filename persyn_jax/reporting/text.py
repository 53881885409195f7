"""Numbers as people read them, on the page and in the terminal."""

from typing import Any


def count(value: int) -> str:
    """1234 as `1,234`."""
    return f"{value:,}"


def plural(value: int, noun: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{value:,} {noun}" + ("" if value == 1 else "s")


def score(value: float | None, decimals: int = 3) -> str:
    """Fixed decimals; a dash for what was not measured."""
    return "-" if value is None else f"{value:z.{decimals}f}"


def signed(value: float, decimals: int = 3) -> str:
    """Fixed decimals with a sign."""
    return f"{value:+z.{decimals}f}"


def percent(share: float | None) -> str:
    """A share as whole per cent."""
    return "-" if share is None else f"{100 * share:.0f} %"


def interval(low_high: list[float]) -> str:
    """`[0.1, 0.2]` as `0.100 to 0.200`."""
    low, high = low_high
    return f"{score(low)} to {score(high)}"


def signed_interval(low_high: list[float]) -> str:
    """`[-0.1, 0.2]` as `-0.100 to +0.200`."""
    low, high = low_high
    return f"{signed(low)} to {signed(high)}"


def difference(estimate: dict[str, Any]) -> str:
    """{mean, ci95} of a difference as `+0.100 (95 % interval +0.050 to +0.150)`."""
    return f"{signed(estimate['mean'])} (95 % interval {signed_interval(estimate['ci95'])})"
