"""Times the sampling engine, scoring and the service against peers, as ratios in one run.

    uv run scripts/sampling_speed.py --json speed.json
    uv run scripts/sampling_speed.py --torch-python ~/torch/bin/python

Needs a quiet machine. --torch-python names a Python that has torch and transformers: stock
`transformers.generate` then does the same tasks by turns. The JSON file holds `config` and `rows`
(keys: those of `Row` in persyn_jax/bench/sampling_speed.py).
"""

from pathlib import Path

from persyn_jax.huge_pages import ask_for_huge_pages
from persyn_jax.pipeline.command import end_with_one_line, make_parser

CONFIG = Path(__file__).parents[1] / "configs" / "sampling_speed.yaml"


def main() -> None:
    parser = make_parser("Times engine, scoring and service against peers, as ratios.", CONFIG)
    parser.add_argument("--torch-python", help="a Python that has torch and transformers")
    arguments = parser.parse_intermixed_args()
    import tempfile

    from persyn_jax import config, mesh, store
    from persyn_jax.bench import sampling_speed as speed
    from persyn_jax.bench.peer import Peer
    from persyn_jax.models import weights

    loaded = config.load(speed.SpeedConfig, arguments.config, arguments.overrides)
    mesh.start_platform("cpu", 1)
    model = weights.load(loaded.model)
    rows, peers = [], []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.torch_python is not None:
            weights.save_folder(Path(folder), model)
            script = Path(speed.__file__).with_name("transformers_peer.py")
            command = [arguments.torch_python, str(script), folder]
            peers.append(Peer("transformers", command))
        try:
            for measured in speed.measure(loaded, model, peers):
                for row in measured:
                    rows.append(row._asdict())
                    ratio = "" if row.ratio is None else f"   ours is {row.ratio:.2f} times that"
                    rate = f"{row.tokens_per_second:7.1f} tokens/s"
                    print(f"{row.task:22} {row.contender:14} {rate}{ratio}", flush=True)
        finally:
            for peer in peers:
                peer.close()
    if arguments.json is not None:
        store.write_json(arguments.json, {"config": config.to_values(loaded), "rows": rows})


if __name__ == "__main__":
    ask_for_huge_pages()
    end_with_one_line(main)
