"""Plots as PNG files: the look of the report's plots, in the colours of its light page."""

import contextlib
import io
from collections.abc import Generator

import matplotlib
from matplotlib.figure import Figure

from persyn_jax.reporting.style import plot_style

INK, MUTED, GRID, SURFACE, ACCENT = "#1a1d23", "#5d6673", "#e3e6eb", "#ffffff", "#0b66c2"
SERIES = (
    "#0072b2",
    "#d1580a",
    "#00896a",
    "#b5568e",
    "#b07d00",
    "#3d8fc9",
    "#8a4fbf",
    "#4a7d1f",
)
DOTS_PER_INCH = 160


@contextlib.contextmanager
def png_style() -> Generator[None]:
    """The look of every PNG plot, for making a figure and for `to_png`."""
    colors = {
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "grid.color": GRID,
        "figure.facecolor": SURFACE,
    }
    with plot_style(), matplotlib.rc_context(colors):
        yield


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()
