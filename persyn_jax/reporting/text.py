"""Numbers as people read them, on the page and in the terminal."""

from typing import Any

SIGNIFICANT = 0.05
"""p-values below it are taken for more than chance."""


def count(value: int | None) -> str:
    """1234 as `1,234`; a dash for what was not counted."""
    return "-" if value is None else f"{value:,}"


def dollars(value: float | None) -> str:
    """`$ 1.20`, or `unknown`."""
    return "unknown" if value is None else f"$ {value:,.2f}"


def cut(value: str, length: int) -> str:
    """The first `length` characters, and how many are left out."""
    left_out = len(value) - length
    return value if left_out <= 0 else f"{value[:length]} … ({left_out:,} more characters)"


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


def signed_interval(low_high: list[float], decimals: int = 3) -> str:
    """`[-0.1, 0.2]` as `-0.100 to +0.200`."""
    low, high = low_high
    return f"{signed(low, decimals)} to {signed(high, decimals)}"


def difference(estimate: dict[str, Any]) -> str:
    """{mean, ci95} of a difference as `+0.100 (95 % interval +0.050 to +0.150)`."""
    return f"{signed(estimate['mean'])} (95 % interval {signed_interval(estimate['ci95'])})"


def trend_sentence(total_by_length: dict[str, Any]) -> str:
    """Whether longer answers have higher totals, in words."""
    overall = {
        "rises": "The total rises with the length of the answer",
        "falls": "The total falls with the length of the answer",
        "none seen": "Over all answers no trend of the total with length is seen",
        "too few answers": "There are too few usable answers to tell a trend of the total",
    }[total_by_length["overall"]["trend"]]
    by_teacher = total_by_length["by_teacher"]
    named = [
        f"it {trend} for {', '.join(teachers)}"
        for trend in ("rises", "falls")
        if (teachers := [name for name, own in by_teacher.items() if own["trend"] == trend])
    ]
    return "; ".join([overall, *named]) + "."


def gain_sentence(gain_audit: dict[str, Any]) -> str:
    """Whether the total reward foresees the gain, in words: by their correlation within slices, as
    a slice may be easier to learn, whoever answers."""
    total = gain_audit["correlation_within_slices"]["total"]
    undecided = "Undecided whether the total reward foresees the gain"
    if total["spearman"] is None:
        return f"{undecided}: within a slice all totals or all gains are equal."
    size, units = signed(total["spearman"], 2), plural(len(gain_audit["units"]), "fine-tuning")
    numbers = f"rank correlation within slices {size}, p = {total['p_value']:.3f}, {units}"
    if total["p_value"] >= SIGNIFICANT:
        return f"{undecided}: chance may give as much ({numbers})."
    if total["spearman"] > 0:
        return f"The total reward foresees the gain: they rise together ({numbers})."
    return f"The total reward misleads: where it is higher, the gain is lower ({numbers})."
