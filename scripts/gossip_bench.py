"""The gossip bench: methods of mixing compared on a learning task, at equal steps, bytes and time.

    uv run scripts/gossip_bench.py --preset quick --json bench.json --plot bench.png

Prints each run as it ends, and a table of all. The JSON file is also the store: it is written after
every batch of runs, and runs that it holds are never done again, so the same command goes on where
it was stopped. It holds `config`, `rows` of this comparison, one a run, whose keys are those of
`GridRow` in persyn_jax/bench/grid.py, and `earlier_rows`, what other comparisons left in the file.
"""

from pathlib import Path

from persyn_jax.pipeline.command import end_with_one_line, make_parser

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = ("quick", "paper", "schedules", "teachers")
PRESETS = {name: CONFIGS / f"gossip_bench_{name}.yaml" for name in NAMES}


def main() -> None:
    parser = make_parser("Mixing schedules and rules, compared.", PRESETS["quick"])
    parser.add_argument("--preset", choices=PRESETS, help="a --config that comes with the project")
    parser.add_argument("--plot", type=Path, help="also draw the results into this PNG file")
    arguments = parser.parse_intermixed_args()
    path = PRESETS.get(arguments.preset, arguments.config)
    from persyn_jax import config, mesh, store
    from persyn_jax.bench.grid import GridConfig, run_grid
    from persyn_jax.bench.grid_store import read_rows, save_rows
    from persyn_jax.bench.grid_table import row_lines, table_lines
    from persyn_jax.bench.tasks import make_task
    from persyn_jax.reporting.gossip_plot import plot_grid

    loaded = config.load(GridConfig, path, arguments.overrides)
    finished = read_rows(arguments.json) if arguments.json else {}
    mesh.start_platform(loaded.platform, 1)
    rows = []
    if arguments.json:
        save_rows(arguments.json, loaded, rows, finished)  # now, if it cannot be written
    for batch in run_grid(loaded, make_task, finished):
        rows += batch
        if arguments.json and any(row.key not in finished for row in batch):
            save_rows(arguments.json, loaded, rows, finished)
        print("\n".join(row_lines(loaded, rows, len(batch))), flush=True)
    if arguments.json:
        save_rows(arguments.json, loaded, rows, finished)
    print("\n" + "\n".join(table_lines(loaded, rows)))
    if arguments.plot is not None:
        store.write_bytes(arguments.plot, plot_grid([vars(row) for row in rows]))


if __name__ == "__main__":
    end_with_one_line(main)
