"""Times the exchange and the simulator against the least that anyone must do, as ratios.

    uv run scripts/gossip_speed.py --json speed.json

Needs a quiet machine and 6 GB. The JSON file holds `config`, `ratios` (keys: those of `Ratio` in
persyn_jax/bench/exchange_speed.py) and `bank_compile_seconds`.
"""

from pathlib import Path

from persyn_jax.pipeline.command import end_with_one_line, make_parser

CONFIG = Path(__file__).parents[1] / "configs" / "gossip_speed.yaml"


def main() -> None:
    arguments = make_parser(
        "Times the exchange and the simulator, as ratios.", CONFIG
    ).parse_intermixed_args()
    from functools import partial

    from persyn_jax import config, mesh, store
    from persyn_jax.bench import exchange_speed as speed

    loaded = config.load(speed.SpeedConfig, arguments.config, arguments.overrides)
    mesh.start_platform("cpu", max(loaded.workers, loaded.bank_workers))
    ratios = []
    bank_alone = partial(speed.bank_on_devices, distance=False)
    measures = (speed.simulator, speed.take_on_one_device, speed.bank_on_devices, bank_alone)
    for measure in measures:
        ratio = measure(loaded)
        ratios.append(ratio._asdict())
        print(f"{ratio.ratio:.2f}  {ratio.name} ({ratio.seconds:.3f} s), against")
        print(f"      {ratio.reference} ({ratio.reference_seconds:.3f} s)", flush=True)
    seconds = speed.bank_compile_seconds(loaded.bank_workers)
    print(
        f"{seconds:.1f} s to compile GoSGD's update with a bank for {loaded.bank_workers} workers"
    )
    if arguments.json is not None:
        store.write_json(
            arguments.json,
            {
                "config": config.to_values(loaded),
                "ratios": ratios,
                "bank_compile_seconds": seconds,
            },
        )


if __name__ == "__main__":
    end_with_one_line(main)
