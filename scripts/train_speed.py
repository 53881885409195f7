"""Times a full fine-tuning step and takes its peak memory, as ratios in one run.

    uv run scripts/train_speed.py --json speed.json
    uv run scripts/train_speed.py --torch-python ~/torch/bin/python

Needs a quiet machine. --torch-python names a Python that has torch and transformers, which then
take the same steps by turns. The JSON file holds `config`, `rows` (keys: those of `Row` in
persyn_jax/bench/train_speed.py) and `ratios`.
"""

from pathlib import Path

from persyn_jax.huge_pages import ask_for_huge_pages
from persyn_jax.pipeline.command import end_with_one_line, make_parser

CONFIG = Path(__file__).parents[1] / "configs" / "train_speed.yaml"


def main() -> None:
    parser = make_parser("Times a fine-tuning step and its memory, as ratios.", CONFIG)
    parser.add_argument("--torch-python", help="a Python that has torch and transformers")
    parser.add_argument("--serve", help="be one of the contenders, on the model in this folder")
    parser.add_argument("--workers", type=int, default=1, help="of --serve")
    parser.add_argument("--exchange", action="store_true", help="of --serve: gossip every step")
    arguments = parser.parse_intermixed_args()
    import contextlib
    import sys
    import tempfile

    from persyn_jax import config, store
    from persyn_jax.bench import train_speed as speed
    from persyn_jax.bench.peer import Peer

    loaded = config.load(speed.TrainSpeedConfig, arguments.config, arguments.overrides)
    if arguments.serve is not None:
        contender = speed.Contender(arguments.workers, arguments.exchange)
        speed.serve(loaded, contender, Path(arguments.serve))
        return
    from persyn_jax import mesh
    from persyn_jax.models import weights

    mesh.start_platform("cpu", 1)
    with tempfile.TemporaryDirectory() as folder:
        model = weights.load(loaded.model)
        weights.save_folder(Path(folder), model)
        vocab_size = model.config.vocab_size
        del model
        words = ("--config", str(arguments.config), *arguments.overrides, "--serve", folder)

        def command(contender: speed.Contender) -> list[str]:
            exchange = ("--exchange",) if contender.exchange else ()
            return [
                sys.executable,
                __file__,
                *words,
                "--workers",
                str(contender.workers),
                *exchange,
            ]

        def compare(commands: dict[str, list[str]]) -> list[speed.Row]:
            with contextlib.ExitStack() as running:
                peers = []
                for named in commands.items():
                    peers.append(Peer(*named))
                    running.callback(peers[-1].close)
                rows = list(speed.measure(loaded, vocab_size, peers))
            for row in rows:
                print(
                    f"{row.contender:36} {row.tokens_per_second:7.1f} tokens/s, "
                    f"{row.peak_memory_gb:5.2f} GB at most, first loss {row.first_loss:.4f}",
                    flush=True,
                )
            return rows

        alone, gossip = [
            {contender.name: command(contender) for contender in contenders}
            for contenders in speed.comparisons(loaded)
        ]
        if arguments.torch_python is not None:
            script = Path(speed.__file__).with_name("transformers_peer.py")
            alone["transformers"] = [arguments.torch_python, str(script), folder]
        mine, *others = compare(alone)
        without, with_gossip = compare(gossip)
    rows = [mine, *others, without, with_gossip]
    ratios = [speed.ratio(mine, other) for other in others]
    ratios.append(speed.ratio(with_gossip, without))
    for ratio in ratios:
        print(
            f"{ratio.contender} against {ratio.reference}: {ratio.speed:.3f} times the tokens/s, "
            f"{ratio.memory:.3f} times the memory"
        )
    if arguments.json is not None:
        found = {
            "config": config.to_values(loaded),
            "rows": [row._asdict() for row in rows],
            "ratios": [ratio._asdict() for ratio in ratios],
        }
        store.write_json(arguments.json, found)


if __name__ == "__main__":
    ask_for_huge_pages()
    end_with_one_line(main)
