"""Presses a service of its own: ten times the load it can bear, then thousands who leave.

    uv run scripts/service_load.py --json load.json

The JSON file holds `config`, `overload` and `departures` (keys: those of `Overload` and
`Departures` in persyn_jax/bench/service_load.py). Linux only: it reads /proc.
"""

from pathlib import Path

from persyn_jax.huge_pages import ask_for_huge_pages
from persyn_jax.pipeline.command import end_with_one_line, make_parser

CONFIG = Path(__file__).parents[1] / "configs" / "service_load.yaml"


def main() -> None:
    arguments = make_parser("Presses a sampling service.", CONFIG).parse_intermixed_args()
    import asyncio

    from persyn_jax import config, store
    from persyn_jax.bench import service_load as load
    from persyn_jax.sampling.process import running_service

    loaded = config.load(load.LoadConfig, arguments.config, arguments.overrides)
    summary: dict = {"config": config.to_values(loaded)}
    with running_service(loaded.service, "cpu") as url:
        for study in (load.overload, load.departures):
            found = asyncio.run(study(url, loaded))._asdict()
            summary[study.__name__] = found
            print(f"{study.__name__}:")
            for key, value in found.items():
                print(f"  {key:28} {value:g}", flush=True)
    if arguments.json is not None:
        store.write_json(arguments.json, summary)


if __name__ == "__main__":
    ask_for_huge_pages()
    end_with_one_line(main)
