"""Checks that the engine's answers do not depend on neighbours, order of arrival or a restart.

    uv run scripts/replay_check.py --json replay.json

64 slots of SmolLM2. Exits with 1 if an answer changes by a bit. The JSON file holds `config` and
`rounds` (keys: those of `Replay` in persyn_jax/bench/replay_check.py).
"""

from pathlib import Path

from persyn_jax.huge_pages import ask_for_huge_pages
from persyn_jax.pipeline.command import end_with_one_line, make_parser

CONFIG = Path(__file__).parents[1] / "configs" / "replay_check.yaml"


def main() -> None:
    arguments = make_parser("Checks that answers can be replayed.", CONFIG).parse_intermixed_args()
    from persyn_jax import config, mesh, store
    from persyn_jax.bench import replay_check
    from persyn_jax.models import weights

    loaded = config.load(replay_check.ReplayConfig, arguments.config, arguments.overrides)
    mesh.start_platform("cpu", loaded.engine.tensor)
    rounds = []
    for found in replay_check.replay(loaded, weights.load(loaded.model)):
        rounds.append(found)
        print(
            f"{found.name}: {found.changed} of {found.answers} answers changed "
            f"({found.reused_tokens} prompt tokens reused)",
            flush=True,
        )
    if arguments.json is not None:
        rows = [found._asdict() for found in rounds]
        store.write_json(arguments.json, {"config": config.to_values(loaded), "rounds": rows})
    if changed := sum(found.changed for found in rounds):
        raise RuntimeError(f"{changed} answers changed: they cannot be replayed")


if __name__ == "__main__":
    ask_for_huge_pages()
    end_with_one_line(main)
