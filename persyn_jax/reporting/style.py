"""How plots look: one width, one font, colours that the page names.

Matplotlib draws with stand-in colours; `to_svg` turns them into CSS variables of the page, so that
one plot serves the light and the dark page. The page's palette is safe for colour-blind readers.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Generator, Sequence
from itertools import pairwise

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 4.75
"""Inches, which the page scales to its column; text of size 10 stays readable on a phone."""

NAME_LENGTH = 20

INK, MUTED, GRID, SURFACE = "#0e0e01", "#0e0e02", "#0e0e03", "#0e0e04"
ACCENT, ON_SERIES = "#0e0e05", "#0e0e06"
SERIES = ("#0e0e10", "#0e0e11", "#0e0e12", "#0e0e13", "#0e0e14", "#0e0e15", "#0e0e16", "#0e0e17")
"""Colours of things that belong together, e.g. teachers; taken in turn when there are more."""

_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    SURFACE: "var(--surface)",
    ACCENT: "var(--accent)",
    ON_SERIES: "var(--on-series)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES)},
}
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: the page's font, selectable, read aloud
    "svg.hashsalt": "persyn_jax",
    "text.parse_math": False,
    "font.size": 10.0,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib and is wide: what it fits, all fit
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.ymargin": 0.12,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
}


def series_color(index: int) -> str:
    """The colour of teacher `index`, everywhere."""
    return SERIES[index % len(SERIES)]


def worker_color(worker: int) -> str:
    """The colour of a worker: from the other end of the palette, away from the teachers."""
    return SERIES[-1 - worker % len(SERIES)]


def css(color: str) -> str:
    """The page's name of a colour."""
    return _VARIABLES[color]


@contextlib.contextmanager
def plot_style() -> Generator[None]:
    """The look of every plot, for making a figure and for turning it into SVG."""
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # Matplotlib only measures the text, and the browser has the fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(height: float) -> Figure:
    """An empty figure of the common width; height in inches."""
    return Figure(figsize=(WIDTH, height))


def to_svg(figure: Figure, label: str) -> str:
    """The figure as an inline <svg> in the colours and the font of the page around it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # figure_1 and the like are not unique on a page
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", svg)
    # A <style> inside would hold for the whole page.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("'DejaVu Sans', sans-serif", "var(--font)")
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def rows_from_top(axes: Axes, labels: Sequence[str]) -> None:
    """Puts the categories on the y axis, the first on top, without grid lines between them."""
    axes.set_yticks(range(len(labels)), [short(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(visible=False, axis="y")


def estimate(axes: Axes, row: float, mean: float, ci95: Sequence[float], color: str) -> None:
    """A dot for the mean and a line for its interval."""
    axes.plot(ci95, [row, row], color=color, linewidth=2.2, alpha=0.55)
    axes.plot([mean], [row], "o", color=color, markersize=6.5, markeredgecolor=SURFACE)


def beside(axes: Axes, row: float, text: str, color: str = INK) -> None:
    """Text at the right of a row, outside the axes."""
    axes.annotate(
        text,
        (1, row),
        (6, 0),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        color=color,
        va="center_baseline",
    )


def short(name: str) -> str:
    """The name, cut to what fits beside a plot."""
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """The positions moved apart until neighbours are at least `gap` apart, their order kept."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    moved = list(positions)
    for _ in range(100):
        for lower, upper in pairwise(order):
            missing = gap - (moved[upper] - moved[lower])
            if missing > 1e-9:
                moved[lower] -= missing / 2
                moved[upper] += missing / 2
    return moved
