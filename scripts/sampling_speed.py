"""Times the sampling engine, scoring and the service against peers, as ratios in one run.

    uv run scripts/sampling_speed.py --json speed.json
    uv run scripts/sampling_speed.py --torch-python ~/torch/bin/python
    uv run scripts/sampling_speed.py --llama-python ~/llama/bin/python

Needs a quiet machine. --torch-python names a Python that has torch and transformers, and
--llama-python one that has llama-cpp-python: stock `transformers.generate`, or llama.cpp on the
same weights in float32, then does the same tasks by turns. llama.cpp reads GGUF files only. The
JSON file holds `config` and `rows` (keys: those of `Row` in persyn_jax/bench/sampling_speed.py).
"""

from pathlib import Path

from persyn_jax.huge_pages import ask_for_huge_pages
from persyn_jax.pipeline.command import end_with_one_line, make_parser

CONFIG = Path(__file__).parents[1] / "configs" / "sampling_speed.yaml"


def main() -> None:
    parser = make_parser("Times engine, scoring and service against peers, as ratios.", CONFIG)
    parser.add_argument("--torch-python", help="a Python that has torch and transformers")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python")
    arguments = parser.parse_intermixed_args()
    import tempfile

    from persyn_jax import config, mesh, store
    from persyn_jax.bench import sampling_speed as speed
    from persyn_jax.bench.peer import Peer
    from persyn_jax.models import spec, weights

    loaded = config.load(speed.SpeedConfig, arguments.config, arguments.overrides)
    mesh.start_platform("cpu", 1)
    source = spec.locate(loaded.model)
    if arguments.llama_python is not None and (source is None or source.is_dir()):
        raise config.ConfigError(
            f"model.weights: {loaded.model.weights}: llama.cpp reads a GGUF file only"
        )
    model = weights.load(loaded.model)
    rows, peers = [], []
    with tempfile.TemporaryDirectory() as folder:

        def start(name: str, python: str, path: str) -> None:
            script = Path(speed.__file__).with_name(f"{name}_peer.py")
            peers.append(Peer(name, [python, str(script), path]))

        try:
            if arguments.torch_python is not None:
                weights.save_folder(Path(folder), model)
                start("transformers", arguments.torch_python, folder)
            if arguments.llama_python is not None:
                start("llama_cpp", arguments.llama_python, str(source))
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
