"""The gossip grid as a person reads it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from persyn_jax.bench.grid import GridConfig, GridRow
from persyn_jax.intervals import student_ci95


def row_lines(config: GridConfig, rows: Sequence[GridRow], count: int) -> list[str]:
    """The last `count` of the rows so far, one run a line, with the time that the others take."""
    width = max(len(method.name) for method in config.methods)
    run_seconds = float(np.mean([row.wall_seconds for row in rows]))
    left = _duration(run_seconds * (config.row_count - len(rows)))
    return [
        f"{number:>4}/{config.row_count}  {row.method:<{width}}  {row.split}, {row.faults}  "
        f"{row.purpose:<6}  seed {row.seed:<4} rate {row.learning_rate:<6g}"
        f" loss {_last(row.test_loss):<7.4f} accuracy {_last(row.accuracy):<7.4f}"
        f"  {left} left"
        for number, row in enumerate(rows[-count:], len(rows) - count + 1)
    ]


def table_lines(config: GridConfig, rows: Sequence[GridRow]) -> list[str]:
    """The results: a table for each split of the data and each kind of faults."""
    lines = [
        f"Data: {rows[0].task}. {config.workers} workers, {config.steps} steps,"
        f" {len(config.seeds)} seeds."
    ]
    results = [row for row in rows if row.purpose == "result"]
    for split in config.splits:
        for fault in config.faults:
            chosen = [row for row in results if (row.split, row.faults) == (split, fault.name)]
            lines += ["", f"Split {split}, faults: {fault.name}", *_one_table(config, chosen)]
    return [*lines, "", *NOTES]


NOTES = (
    "±: half of Student's 95 % interval over the seeds. rate: the learning rate, * if it is the"
    " first or last of its grid.",
    "difference: of the test loss to that of the first method, seed by seed.",
    "MB: what a worker sent that was used; wire MB: in lock step, where all send if one does."
    " seconds: modelled.",
    "loss at ..: when a worker had sent so much, or after so much modelled time; the last, of a"
    " method that sends less.",
)


def _one_table(config: GridConfig, rows: Sequence[GridRow]) -> list[str]:
    """A line a method, under a line of heads."""
    runs_of = [[row for row in rows if row.method == method.name] for method in config.methods]
    sent = [row.useful_bytes[-1] for row in rows if row.useful_bytes[-1] > 0]
    budget = float(np.median(sent)) if sent else 0.0
    until = min(row.seconds[-1] for row in rows)
    heads = ["method", "rate", "test loss", "difference", "accuracy %", "MB", "wire MB", "seconds"]
    heads += ["consensus", f"loss at {budget / 1e6:.3g} MB", f"at {until:.3g} s"]
    lines = [heads]
    for method, runs in zip(config.methods, runs_of, strict=True):
        rate, grid = runs[0].learning_rate, config.learning_rates_of(method)
        is_edge = len(grid) > 1 and rate in (min(grid), max(grid))
        losses = np.array([_last(row.test_loss) for row in runs])
        first = np.array([_last(row.test_loss) for row in runs_of[0]])
        lines.append(
            [
                method.name,
                f"{rate:g}" + ("*" if is_edge else " "),
                _interval(losses),
                _interval(losses - first) if runs is not runs_of[0] else "-",
                _interval([100 * _last(row.accuracy) for row in runs]),
                _mean([row.useful_bytes[-1] / 1e6 for row in runs]),
                _mean([row.wire_bytes[-1] / 1e6 for row in runs]),
                _mean([row.seconds[-1] for row in runs]),
                _mean([_last(row.consensus_distance) for row in runs]),
                _mean([loss_at(budget, row.useful_bytes, row.test_loss) for row in runs]),
                _mean([loss_at(until, row.seconds, row.test_loss) for row in runs]),
            ]
        )
    return _aligned(lines)


def loss_at(value: float, axis: Sequence[float], losses: Sequence[float | None]) -> float:
    """The loss where the axis (bytes, seconds) has come to `value`, between two evaluations on a
    straight line; the last loss if it never comes there, NaN if that is not known."""
    return float(np.interp(value, axis, [_number(loss) for loss in losses]))


def _last(curve: Sequence[float | None]) -> float:
    return _number(curve[-1])


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _interval(values: ArrayLike) -> str:
    """Mean ± half of the interval, `-` if a value is missing: a run that diverged."""
    if not np.isfinite(values).all():
        return "-"
    mean, low, high = student_ci95(values)
    return f"{mean:.4g}" if np.isnan(low) else f"{mean:.4g} ± {(high - low) / 2:.2g}"


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3g}" if np.isfinite(values).all() else "-"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width each, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
