"""The plots that ask why: alpha, length and calibration. As `plots`, each a pure function."""

from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from persyn_jax.reporting.plots import ROW
from persyn_jax.reporting.style import (
    ACCENT,
    INK,
    MUTED,
    SURFACE,
    beside,
    estimate,
    new_figure,
    plot_style,
    rows_from_top,
    series_color,
    to_svg,
)
from persyn_jax.reporting.text import signed

DASHED = (0, (3, 3))
LARGEST_DOT = 90.0
"""Area in points squared of the dot for most pairs."""


def plot_alpha(rewards: dict[str, Any]) -> str:
    """Mean quality above, mean learnability below, of the oracle's answers over alpha; the run's
    own alpha dashed."""
    sweep = rewards["alpha_sweep"]
    alphas = [float(alpha) for alpha in sweep]
    with plot_style():
        figure = new_figure(3.2)
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, key, label in (
            (upper, "mean_quality", "quality"),
            (lower, "mean_learnability", "learnability"),
        ):
            # A null becomes NaN, a gap.
            values = np.array([point[key] for point in sweep.values()], float)
            axes.axvline(rewards["alpha"], color=MUTED, linewidth=1, linestyle=DASHED)
            axes.plot(alphas, values, "o-", markersize=4, color=ACCENT)
            axes.set_ylabel(label)
            axes.yaxis.set_major_locator(MaxNLocator(4))
        lower.set_xlabel("alpha: weight of learnability")
        return to_svg(figure, "Quality and learnability of the oracle's answers over alpha")


def plot_length_correlation(by_teacher: dict[str, dict[str, Any]]) -> str:
    """Rank correlation of total and response length, one row a teacher, with its interval."""
    with plot_style():
        figure = new_figure(0.7 + ROW * len(by_teacher))
        axes = figure.add_subplot()
        axes.axvline(0, color=MUTED, linewidth=1)
        for row, trend in enumerate(by_teacher.values()):
            if trend["rank_correlation"] is not None:
                color = series_color(row)
                estimate(axes, row, trend["rank_correlation"], trend["ci95"], color)
                beside(axes, row, signed(trend["rank_correlation"], 2))
        rows_from_top(axes, list(by_teacher))
        axes.set_xlim(-1.03, 1.03)
        axes.set_xlabel("rank correlation of total with response length")
        return to_svg(figure, "Rank correlation of total reward and response length by teacher")


def plot_total_by_length(total_by_length: dict[str, Any]) -> str:
    """Mean total over mean length in parts of equal size: every teacher, and all (thick)."""
    with plot_style():
        figure = new_figure(2.6)
        axes = figure.add_subplot()
        for index, trend in enumerate(total_by_length["by_teacher"].values()):
            color = series_color(index)
            axes.plot(trend["tokens"], trend["mean_total"], "o-", markersize=3.5, color=color)
        overall = total_by_length["overall"]
        axes.plot(overall["tokens"], overall["mean_total"], color=INK, linewidth=3.2, alpha=0.6)
        axes.set_xlabel("response tokens")
        axes.set_ylabel("mean total")
        return to_svg(figure, "Mean total reward over response length")


def plot_reliability(reliability: dict[str, Any]) -> str:
    """How often the router orders a pair rightly, over how sure it is; the diagonal is ideal."""
    most = max(reliability["pairs"], default=1)
    areas = [LARGEST_DOT * (0.15 + 0.85 * pairs / most) for pairs in reliability["pairs"]]
    with plot_style():
        figure = new_figure(2.8)
        axes = figure.add_subplot()
        axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=1, linestyle=DASHED)
        axes.plot(reliability["confidence"], reliability["right"], color=ACCENT, linewidth=1.4)
        axes.scatter(
            reliability["confidence"],
            reliability["right"],
            areas,
            color=ACCENT,
            edgecolor=SURFACE,
            zorder=3,
        )
        axes.set_xlim(0.49, 1.01)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("how sure the router is of a pair")
        axes.set_ylabel("how often it is right")
        return to_svg(figure, "Reliability of the router's coefficients")
