"""Times the stages route and generate on many prompts and teachers, with an endpoint that costs
nothing.

    uv run scripts/routing_scale.py --json scale.json

The JSON file holds `config` and `measured` (keys: those of `Measured` in
persyn_jax/pipeline/routing_scale.py).
"""

import tempfile
from pathlib import Path

from persyn_jax.pipeline.command import end_with_one_line, make_parser

CONFIG = Path(__file__).parents[1] / "configs" / "routing_scale.yaml"


def _line(found) -> str:
    return (
        f"{found.seconds:8.1f} s ({found.processor_seconds:.1f} s of processor time), peak "
        f"{found.peak_memory_gb:.3f} GB  {found.what}"
    )


def main() -> None:
    arguments = make_parser("Times routing at full size.", CONFIG).parse_intermixed_args()
    from persyn_jax import config, store
    from persyn_jax.bench.mock_endpoint import mock_endpoint
    from persyn_jax.pipeline import routing_scale

    loaded = config.load(routing_scale.RoutingScaleConfig, arguments.config, arguments.overrides)
    measured = []
    with mock_endpoint(loaded.answer_seconds) as url, tempfile.TemporaryDirectory() as folder:
        for found in routing_scale.measure(loaded, url, Path(folder)):
            measured.append(found)
            print(_line(found), flush=True)
    seconds, used = (
        sum(getattr(found, name) for found in measured) for name in ("seconds", "processor_seconds")
    )
    print(_line(measured[-1]._replace(what="in all", seconds=seconds, processor_seconds=used)))
    if arguments.json is not None:
        rows = [found._asdict() for found in measured]
        store.write_json(arguments.json, {"config": config.to_values(loaded), "measured": rows})


if __name__ == "__main__":
    end_with_one_line(main)
