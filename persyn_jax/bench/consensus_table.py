"""The consensus experiment as a person reads it. All values are eps divided by the dimension."""

from collections.abc import Sequence

import numpy as np

from persyn_jax.bench.consensus import ConsensusRow, equal_weights_level

HEADER = (
    f"{'schedule':<24}{'rule':<10}{'p':>6}{'seed':>6}{'rounds':>8}{'MB':>8}"
    f"{'predicted':>11}{'measured':>10}{'s.e.':>8}{'over time':>11}"
)


def row_line(row: ConsensusRow) -> str:
    """One run under `HEADER`; `over time` is the standard deviation of eps over the run."""
    p = "-" if row.p is None else f"{row.p:g}"
    return (
        f"{row.schedule:<24}{row.rule:<10}{p:>6}{row.seed:>6}{row.rounds:>8}{row.bytes / 1e6:>8.1f}"
        f"{row.predicted:>11.4g}{row.measured:>10.4g}{row.standard_error:>8.2g}"
        f"{row.deviation:>11.3g}"
    )


def summary_lines(rows: Sequence[ConsensusRow]) -> list[str]:
    """Measured eps by exchange probability and schedule, as means over the seeds.

    The last column is what equal sum weights would give the asynchronous run.
    """
    names = list(dict.fromkeys(row.schedule for row in rows if row.p is not None))
    head = f"{'p':<8}" + "".join(f"{name:>20}" for name in names) + f"{'equal weights':>20}"
    lines = [head]
    for p in dict.fromkeys(row.p for row in rows if row.p is not None):
        cells = []
        for name in names:
            levels = [row.measured for row in rows if (row.schedule, row.p) == (name, p)]
            cells.append(f"{np.mean(levels):>20.4g}")
        equal = equal_weights_level(rows[0].M, p)
        lines.append(f"{p:<8g}" + "".join(cells) + f"{equal:>20.4g}")
    return lines
