"""The plot of the gossip bench, from its rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch

from persyn_jax.intervals import student_ci95
from persyn_jax.reporting.png import GRID, INK, MUTED, SERIES, SURFACE, png_style, to_png

Row = dict[str, Any]

LINE, LEAST_HEIGHT, WIDTH = 0.2, 2.8, 20.0
"""Inches: a method's line, the least height of a setting, the width of the plot."""
BASELINES = {"no_mixing": MUTED, "all_reduce": INK}
LIGHTEST = 0.6
"""How far the last method of a rule is from the rule's colour to white."""
STEPS, BYTES, SECONDS = (
    ("steps", lambda row: np.array(row["steps"])),
    ("useful MB that a worker sent", lambda row: np.array(row["useful_bytes"]) / 1e6),
    ("modelled seconds", lambda row: np.array(row["seconds"])),
)
"""Axes: label, and where a row's evaluations lie."""


def plot_grid(rows: list[Row]) -> bytes:
    """PNG: a strip for each split of the data and kind of faults.

    Test loss against steps, bytes and modelled time, and consensus distance: means over the seeds,
    and as bands the range from the lowest to the highest. Beside the first the methods in the order
    of their curves' ends, with the difference of the final test loss to that of the first method,
    seed by seed, and its 95 % interval. A colour is a rule, its shades are schedules and
    parameters.
    """
    results = [row for row in rows if row["purpose"] == "result"]
    settings = list(dict.fromkeys((row["split"], row["faults"]) for row in results))
    methods = list(dict.fromkeys(row["method"] for row in results))
    height = max(LEAST_HEIGHT, 1.1 + LINE * len(methods))
    with png_style():
        figure = Figure(figsize=(WIDTH, 0.4 + height * len(settings)))
        figure.suptitle(f"{results[0]['task']}, {results[0]['M']} workers", fontsize=11)
        strips = figure.subplots(
            len(settings), 6, squeeze=False, gridspec_kw={"width_ratios": [3, 2, 1.3, 3, 3, 3]}
        )
        for strip, setting in zip(strips, settings, strict=True):
            runs_of = {
                method: [
                    row
                    for row in results
                    if (row["split"], row["faults"], row["method"]) == (*setting, method)
                ]
                for method in methods
            }
            strip[0].set_title("split {}, faults: {}".format(*setting), loc="left", fontsize=10)
            _strip(list(strip), runs_of)
        return to_png(figure)


def _strip(strip: list[Axes], runs_of: dict[str, list[Row]]) -> None:
    steps, names, ranking, bytes_, seconds, consensus = strip
    bases, shades = _colors({method: runs[0]["rule"] for method, runs in runs_of.items()})
    rows = [row for runs in runs_of.values() for row in runs]
    limits = _limits(rows)
    for axes, axis in ((steps, STEPS), (bytes_, BYTES), (seconds, SECONDS)):
        _curves(axes, runs_of, axis, "test_loss", shades)
        axes.set_ylim(*limits)
    _curves(consensus, runs_of, STEPS, "consensus_distance", shades)
    steps.set_ylabel("test loss")
    bytes_.set_xscale("log")
    bytes_.xaxis.set_major_formatter("{x:g}")
    consensus.set_ylabel("consensus distance")
    consensus.set_yscale("log")
    consensus.yaxis.set_major_formatter("{x:g}")
    consensus.set_ylim(*_distances(rows))

    finals = {method: [_last(row) for row in runs] for method, runs in runs_of.items()}
    end_of = {
        method: np.nan_to_num(np.mean(losses), nan=np.inf) for method, losses in finals.items()
    }
    order = sorted(end_of, key=lambda method: -end_of[method])
    for place, method in enumerate(order):
        names.text(0, place, f" {method}", va="center", fontsize=8, color=bases[method])
        end = float(np.clip(end_of[method], *limits))
        _link(steps, (rows[0]["steps"][-1], end), names, (0, place), shades[method])
    names.axis("off")
    names.set_ylim(len(order) - 0.5, -0.5)
    first = next(iter(finals))
    differences = [np.subtract(finals[method], finals[first]) for method in order]
    _ranking(ranking, differences, [shades[method] for method in order])
    ranking.set_xlabel(f"final test loss,\nagainst {first}")


def _colors(rule_of: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Of each method its rule's colour, and that lightened from method to method of the rule."""
    others = [rule for rule in dict.fromkeys(rule_of.values()) if rule not in BASELINES]
    color = BASELINES | {rule: SERIES[i % len(SERIES)] for i, rule in enumerate(others)}
    bases, shades = {}, {}
    for method, rule in rule_of.items():
        siblings = [other for other in rule_of if rule_of[other] == rule]
        part = LIGHTEST * siblings.index(method) / max(len(siblings) - 1, 1)
        bases[method] = color[rule]
        dark, light = to_rgb(color[rule]), to_rgb(SURFACE)
        red, green, blue = (a + part * (b - a) for a, b in zip(dark, light, strict=True))
        shades[method] = to_hex((red, green, blue))
    return bases, shades


def _curves(
    axes: Axes,
    runs_of: dict[str, list[Row]],
    axis: tuple[str, Callable[[Row], np.ndarray]],
    column: str,
    shades: dict[str, str],
) -> None:
    """Mean and range over the seeds, at the mean place on the axis; nothing where that is 0."""
    label, place = axis
    for method, runs in runs_of.items():
        x = np.mean([place(row) for row in runs], axis=0)
        y = np.array([row[column] for row in runs], float)[:, x > 0]
        x = x[x > 0]
        color = shades[method]
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.12, linewidth=0)
        axes.plot(x, y.mean(axis=0), color=color, linewidth=1.3)
    axes.set_xlabel(label)


def _link(
    start: Axes, xy: tuple[float, float], end: Axes, place: tuple[float, float], color: str
) -> None:
    """From the end of a curve to its name."""
    line = ConnectionPatch(
        xy, place, start.transData, end.transData, color=color, linewidth=0.7, alpha=0.8
    )
    end.add_artist(line)


def _ranking(axes: Axes, differences: list[np.ndarray], colors: list[str]) -> None:
    """Means with 95 % intervals; numbers in place of the few that are far away."""
    known = [seeds for seeds in differences if np.isfinite(seeds).all()]
    ends = [end for seeds in known for end in _interval(seeds)]
    low, high = np.quantile(ends, [0.05, 0.95]) if ends else (0.0, 0.0)
    margin = 0.1 * (high - low) or 1.0
    axes.set_xlim(low - margin, high + margin)
    for place, (seeds, color) in enumerate(zip(differences, colors, strict=True)):
        mean = seeds.mean()
        if low - margin < mean < high + margin:
            left, right = _interval(seeds)
            error = [[mean - left], [right - mean]]
            axes.errorbar(mean, place, xerr=error, fmt="o", markersize=4, color=color)
        else:
            text = f"{mean:+.2g}" if np.isfinite(mean) else "diverged"
            axes.text(high, place, text, va="center", ha="right", fontsize=8, color=color)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set_ylim(len(differences) - 0.5, -0.5)
    axes.set_yticks(range(len(differences)), [])
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.4)


def _interval(values: np.ndarray) -> tuple[float, float]:
    """95 %; of a single value no width."""
    mean, low, high = student_ci95(values)
    return (mean, mean) if np.isnan(low) else (low, high)


def _limits(rows: list[Row]) -> tuple[float, float]:
    """From the smallest loss to what nearly all have reached after a fifth of the steps."""
    losses = np.array([row["test_loss"] for row in rows], float)
    early = losses[:, max(1, losses.shape[1] // 5)]
    early = losses[:, 0] if np.isnan(early).all() else early
    low, high = np.nanmin(losses), np.nanquantile(early, 0.9)
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _distances(rows: list[Row]) -> tuple[float, float]:
    """The range of the consensus distances that are more than rounding."""
    values = np.array([row["consensus_distance"][1:] for row in rows], float)
    values = values[np.isfinite(values)]
    shown = values[values > 1e-6 * values.max(initial=0.0)]
    return (shown.min() / 2, 2 * shown.max()) if shown.size else (0.1, 1.0)


def _last(row: Row) -> float:
    return np.nan if row["test_loss"][-1] is None else row["test_loss"][-1]
