"""The plot of the consensus experiment, from its rows."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persyn_jax.reporting.png import INK, MUTED, SERIES, SURFACE, png_style, to_png
from persyn_jax.reporting.style import rows_from_top

ROW = 0.3
"""Inches of height for one schedule."""


def plot_consensus_levels(rows: list[dict[str, Any]]) -> bytes:
    """PNG: above, eps against the exchange probability, predicted (line) and measured (dot); below,
    measured / predicted with twice its standard error. At the right, schedules without one."""
    by_name = _by_name([row for row in rows if row["p"] is not None])
    steady = _by_name([row for row in rows if row["p"] is None])
    with png_style():
        figure = Figure(figsize=(9.6, max(5.4, 1 + ROW * len(steady))))
        grid = figure.add_gridspec(2, 2, height_ratios=[3, 1], width_ratios=[5, 3])
        upper = figure.add_subplot(grid[0, 0])
        lower = figure.add_subplot(grid[1, 0], sharex=upper)
        for index, (name, runs) in enumerate(by_name.items()):
            aside = 1 + 0.03 * (index - (len(by_name) - 1) / 2)  # so that no dot hides another
            _level_lines(upper, lower, runs, name, SERIES[index % len(SERIES)], aside)
        _dress_levels(upper, lower, sorted({row["p"] for row in rows} - {None}))
        _steady_levels(figure.add_subplot(grid[:, 1]), steady)
        return to_png(figure)


def _by_name(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["schedule"], []).append(row)
    return groups


def _level_lines(
    upper: Axes, lower: Axes, runs: list[dict[str, Any]], name: str, color: str, aside: float
) -> None:
    ps = sorted({run["p"] for run in runs})
    levels = [_mean_over_seeds([run for run in runs if run["p"] == p]) for p in ps]
    levels = [(p, *level) for p, level in zip(ps, levels, strict=True) if level[0] > 0]
    if not levels:  # 0 is nowhere on a logarithmic axis
        return
    p, predicted, measured, error = np.array(levels).T
    upper.plot(p, predicted, color=color, linewidth=1.2)
    upper.plot(p, measured, "o", color=color, markersize=5, markeredgecolor=SURFACE, label=name)
    ratio, error = measured / predicted, 2 * error / predicted
    lower.errorbar(aside * p, ratio, error, fmt="o", color=color, markersize=3.5)


def _mean_over_seeds(runs: list[dict[str, Any]]) -> tuple[float, float, float]:
    """(predicted, measured, standard error of their difference)."""
    errors = [run["difference_error"] for run in runs]
    return (
        float(np.mean([run["predicted"] for run in runs])),
        float(np.mean([run["measured"] for run in runs])),
        float(np.sqrt(np.mean(np.square(errors)) / len(runs))),
    )


def _dress_levels(upper: Axes, lower: Axes, ps: list[float]) -> None:
    upper.set_xscale("log")
    upper.set_yscale("log")
    upper.yaxis.set_major_formatter("{x:g}")
    upper.set_ylabel("consensus distance / dimension")
    upper.legend(frameon=False, fontsize=9, title="line: predicted, dot: measured")
    lower.axhline(1, color=MUTED, linewidth=0.8)
    lower.set_ylabel("measured /\npredicted")
    lower.set_xlabel("exchange probability")
    lower.set_xticks(ps, [f"{p:g}" for p in ps])
    lower.minorticks_off()


def _steady_levels(axes: Axes, steady: dict[str, list[dict[str, Any]]]) -> None:
    """A row a schedule, the closest workers on top: predicted as a bar, measured as a dot."""
    levels = {name: _mean_over_seeds(runs) for name, runs in steady.items()}
    names = sorted(levels, key=lambda name: levels[name])
    for index, name in enumerate(names):
        predicted, measured, error = levels[name]
        axes.barh(index, predicted, 0.6, color=SERIES[0], alpha=0.35, linewidth=0)
        axes.errorbar(measured, index, xerr=2 * error, fmt="o", color=INK, markersize=4)
    rows_from_top(axes, names)
    axes.set_xlabel("consensus distance / dimension\nbar: predicted, dot: measured")
