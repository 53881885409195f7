"""The plots of the report: each a pure function of records to an inline SVG."""

import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from persyn_jax.records import Prompt, Reward
from persyn_jax.reporting.style import (
    ACCENT,
    INK,
    MUTED,
    ON_SERIES,
    SURFACE,
    beside,
    estimate,
    new_figure,
    plot_style,
    rows_from_top,
    series_color,
    short,
    spread,
    to_svg,
    worker_color,
)
from persyn_jax.reporting.text import percent, score, signed

ROW = 0.36
"""Inches of height for one category."""
BINS = 24
LABELLED_WORKERS = 8
"""With more workers than this, names at the line ends would only be in the way."""
LABEL_GAP = 0.13
"""Between two names at line ends, as a share of the axis."""


def plot_rewards(
    rewards: list[Reward],
    teachers: Sequence[str],
    term: Literal["quality", "learnability", "total"],
    axis_label: str,
) -> str:
    """One histogram a teacher on a common axis, its mean marked and written beside it."""
    values_of = {
        teacher: [
            value
            for reward in rewards
            if reward.teacher == teacher and (value := getattr(reward, term)) is not None
        ]
        for teacher in teachers
    }
    everything = [value for values in values_of.values() for value in values] or [0.0, 1.0]
    edges = np.histogram_bin_edges(everything, BINS)
    with plot_style():
        figure = new_figure(0.75 + 1.35 * ROW * len(teachers))
        axes = figure.add_subplot()
        for row, values in enumerate(values_of.values()):
            counts = np.histogram(values, edges)[0]
            heights = 0.72 * counts / max(counts.max(), 1)
            axes.bar(
                edges[:-1],
                -heights,
                np.diff(edges),
                bottom=row + 0.3,
                align="edge",
                color=series_color(row),
                edgecolor=SURFACE,
                linewidth=0.5,
            )
            axes.axhline(row + 0.3, color=MUTED, linewidth=0.6)
            if values:
                mean = float(np.mean(values))
                axes.plot([mean, mean], [row + 0.3, row - 0.45], color=INK, linewidth=1.4)
                beside(axes, row, f"mean {score(mean)}")
        rows_from_top(axes, teachers)
        axes.set_xlabel(axis_label)
        axes.spines["bottom"].set_visible(False)
        return to_svg(figure, f"{axis_label} by teacher")


def plot_rewards_by_source(
    rewards: list[Reward], prompts: list[Prompt], teachers: Sequence[str]
) -> str:
    """Mean total reward of each teacher on each source; the best of a source in bold."""
    source_of = {prompt.id: prompt.source for prompt in prompts}
    sources = list(dict.fromkeys(source_of[reward.prompt_id] for reward in rewards))
    totals_of: dict[tuple[str, str], list[float]] = {}
    for reward in rewards:
        totals_of.setdefault((reward.teacher, source_of[reward.prompt_id]), []).append(reward.total)
    mean_MS = np.array([[np.mean(totals_of[t, s]) for s in sources] for t in teachers])
    shade_MS = (mean_MS - mean_MS.min()) / max(np.ptp(mean_MS), 1e-9)
    with plot_style():
        figure = new_figure(0.9 + 1.2 * ROW * len(teachers))
        axes = figure.add_subplot()
        for row, column in np.ndindex(mean_MS.shape):
            axes.add_patch(
                Rectangle(
                    (column - 0.48, row - 0.46),
                    width=0.96,
                    height=0.92,
                    color=ACCENT,
                    alpha=0.05 + 0.45 * shade_MS[row, column],
                    linewidth=0,
                )
            )
            axes.text(
                column,
                row,
                signed(mean_MS[row, column], 2),
                ha="center",
                va="center_baseline",
                fontweight="bold" if row == mean_MS[:, column].argmax() else "normal",
            )
        rows_from_top(axes, teachers)
        axes.set_xlim(-0.5, len(sources) - 0.5)
        names = [textwrap.fill(source.replace("_", " "), 10) for source in sources]
        axes.set_xticks(range(len(sources)), names, color=INK)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        return to_svg(figure, "Mean total reward by teacher and source")


def plot_teacher_shares(
    shares_of: dict[str, dict[str, float]], teachers: Sequence[str], label: str
) -> str:
    """One stacked bar a group of prompts: how they were shared out among the teachers."""
    with plot_style():
        figure = new_figure(0.9 + ROW * len(shares_of) + 0.2 * ((len(teachers) + 1) // 2))
        axes = figure.add_subplot()
        left = np.zeros(len(shares_of))
        for index, teacher in enumerate(teachers):
            widths = np.array([shares[teacher] for shares in shares_of.values()])
            axes.barh(
                range(len(widths)),
                widths,
                0.68,
                left=left,
                color=series_color(index),
                edgecolor=SURFACE,
                linewidth=1.2,
                label=short(teacher),
            )
            for row, width in enumerate(widths):
                if width >= 0.08:
                    axes.text(
                        left[row] + width / 2,
                        row,
                        percent(width),
                        color=ON_SERIES,
                        fontsize=9,
                        ha="center",
                        va="center_baseline",
                    )
            left += widths
        rows_from_top(axes, list(shares_of))
        axes.set_xlim(0, 1)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        figure.legend(
            loc="outside upper left",
            ncols=2,
            frameon=False,
            handlelength=0.9,
            handleheight=0.9,
            borderaxespad=0.1,
        )
        return to_svg(figure, label)


def plot_regret(router: dict[str, Any]) -> str:
    """The regret of the router and of every baseline with its interval; the router in colour."""
    strategies = list(router["regret"])
    with plot_style():
        figure = new_figure(0.6 + ROW * len(strategies))
        axes = figure.add_subplot()
        for row, strategy in enumerate(strategies):
            mean, ci95 = router["regret"][strategy], router["regret_ci95"][strategy]
            color = ACCENT if strategy == "router" else MUTED
            estimate(axes, row, mean, ci95, color)
            beside(axes, row, score(mean), color=ACCENT if strategy == "router" else INK)
        rows_from_top(axes, [strategy.replace("_", " ") for strategy in strategies])
        axes.set_xlim(left=-0.02 * axes.get_xlim()[1])
        axes.set_xlabel("regret: total reward lost against the oracle (left is better)")
        return to_svg(figure, "Regret of the router and of its baselines")


def plot_losses(rows: list[dict[str, Any]]) -> str:
    """Training loss above, held-out loss below, one line a worker."""
    held_out = [row for row in rows if "held_out_loss" in row]
    with plot_style():
        figure = new_figure(3.6)
        upper, lower = figure.subplots(2, 1, sharex=True)
        _worker_lines(upper, rows, "loss", marker="")
        _worker_lines(lower, held_out, "held_out_loss", marker="o")
        upper.set_ylabel("training loss")
        lower.set_ylabel("held-out loss")
        _steps(lower)
        return to_svg(figure, "Training loss and held-out loss by worker over steps")


def plot_consensus(rows: list[dict[str, Any]]) -> str:
    """Consensus distance at the steps where it was measured; below, the pushes of each step."""
    steps = [row["step"] for row in rows]
    measured = [row for row in rows if "consensus_distance" in row]
    with plot_style():
        figure = new_figure(3.0)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        distances = [row["consensus_distance"] for row in measured]
        upper.plot([row["step"] for row in measured], distances, "o-", markersize=4, color=ACCENT)
        upper.set_ylim(bottom=0)
        upper.set_ylabel("consensus distance")
        lower.bar(steps, [row["pushes"] for row in rows], 0.7, color=MUTED)
        lower.set_ylabel("pushes")
        lower.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=2))
        _steps(lower)
        return to_svg(figure, "Consensus distance and exchanges over steps")


def plot_sum_weights(rows: list[dict[str, Any]]) -> str:
    """The sum weight of each worker over steps; equal shares dashed."""
    with plot_style():
        figure = new_figure(2.6)
        axes = figure.add_subplot()
        workers = len(rows[0]["sum_weight"])
        axes.axhline(1 / workers, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        _worker_lines(axes, rows, "sum_weight", marker="", drawstyle="steps-pre")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("sum weight")
        _steps(axes)
        return to_svg(figure, "Sum weights of the workers over steps")


def plot_scores(student: dict[str, Any]) -> str:
    """Mean score before and after, overall and by source, with intervals and the difference."""
    rows = {"all prompts": student, **student["by_source"]}
    with plot_style():
        figure = new_figure(0.7 + 1.25 * ROW * len(rows))
        axes = figure.add_subplot()
        for row, scores in enumerate(rows.values()):
            estimate(axes, row - 0.17, scores["before"]["mean"], scores["before"]["ci95"], MUTED)
            estimate(axes, row + 0.17, scores["after"]["mean"], scores["after"]["ci95"], ACCENT)
            beside(axes, row, signed(scores["paired_difference"]["mean"]))
        for name, offset, color in (("before", -0.17, MUTED), ("after", 0.17, ACCENT)):
            axes.annotate(
                name,
                (student[name]["ci95"][1], offset),
                (4, 0),
                textcoords="offset points",
                color=color,
                fontsize=9,
                va="center_baseline",
            )
        axes.axhline(0.5, color=MUTED, linewidth=0.6)
        rows_from_top(axes, list(rows))
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("mean score (right is better); difference at the right")
        return to_svg(figure, "Score before and after training, overall and by source")


def _worker_lines(
    axes: Axes, rows: list[dict[str, Any]], key: str, marker: str, drawstyle: str = "default"
) -> None:
    """One line a worker, with its name at the end."""
    if not rows:
        return
    steps = [row["step"] for row in rows]
    values_TW = np.array([row[key] for row in rows], float)  # a null becomes NaN, a gap
    workers = values_TW.shape[1]
    for worker in range(workers):
        axes.plot(
            steps,
            values_TW[:, worker],
            color=worker_color(worker),
            marker=marker,
            markersize=4,
            linewidth=1.4,
            drawstyle=drawstyle,
        )
    if workers > LABELLED_WORKERS:
        return
    low, high = axes.get_ylim()
    last_W = [float(values_T[np.isfinite(values_T)][-1]) for values_T in values_TW.T]
    heights = spread(last_W, LABEL_GAP * (high - low))
    for worker, height in enumerate(heights):
        axes.annotate(
            f"worker {worker}",
            (1, height),
            (4, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            color=worker_color(worker),
            fontsize=9,
            va="center_baseline",
        )


def _steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
