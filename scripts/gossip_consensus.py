"""GoSGD's consensus experiment: how far workers drift apart when they make random steps only.

    uv run scripts/gossip_consensus.py --preset paper --json consensus.json --plot consensus.png

Prints, beside what the mixing matrices predict, what the library's own rules give: GoSGD event by
event and in lock step, local SGD, every other schedule. The JSON file holds `config` and `rows`,
one a run: their keys are those of `ConsensusRow` in persyn_jax/bench/consensus.py.
"""

import dataclasses
from pathlib import Path

from persyn_jax.pipeline.command import end_with_one_line, make_parser

CONFIGS = Path(__file__).parents[1] / "configs"
PRESETS = {
    "paper": CONFIGS / "gossip_consensus.yaml",
    "quick": CONFIGS / "gossip_consensus_quick.yaml",
}


def main() -> None:
    parser = make_parser("GoSGD's consensus experiment.", PRESETS["paper"])
    parser.add_argument("--preset", choices=PRESETS, help="a --config that comes with the project")
    parser.add_argument("--workers", type=int, help="the same as the override workers=N")
    parser.add_argument("--plot", type=Path, help="also draw the results into this PNG file")
    arguments = parser.parse_intermixed_args()
    path = PRESETS.get(arguments.preset, arguments.config)
    if arguments.workers is not None:
        arguments.overrides.append(f"workers={arguments.workers}")
    from persyn_jax import config, mesh, store
    from persyn_jax.bench.consensus import ConsensusConfig, run_consensus
    from persyn_jax.bench.consensus_table import HEADER, row_line, summary_lines
    from persyn_jax.reporting.consensus_plot import plot_consensus_levels

    loaded = config.load(ConsensusConfig, path, arguments.overrides)
    mesh.start_platform("cpu", 1)
    print(HEADER)
    rows = []
    for row in run_consensus(loaded):
        print(row_line(row), flush=True)
        rows.append(row)
    print("\n" + "\n".join(summary_lines(rows)))
    values = [dataclasses.asdict(row) for row in rows]
    if arguments.json is not None:
        store.write_json(arguments.json, {"config": config.to_values(loaded), "rows": values})
    if arguments.plot is not None:
        store.write_bytes(arguments.plot, plot_consensus_levels(values))


if __name__ == "__main__":
    end_with_one_line(main)
