"""Times the client and the answer store together, against an endpoint that costs nothing.

    uv run scripts/client_speed.py --json speed.json

The JSON file holds `config`, and the fields of `ClientSpeed` in persyn_jax/bench/client_speed.py.
"""

from pathlib import Path

from persyn_jax.pipeline.command import end_with_one_line, make_parser

CONFIG = Path(__file__).parents[1] / "configs" / "client_speed.yaml"


def main() -> None:
    arguments = make_parser(
        "Times the client and the answer store together.", CONFIG
    ).parse_intermixed_args()
    from persyn_jax import config, store
    from persyn_jax.bench import client_speed
    from persyn_jax.pipeline.answers import Ask, collect_answers

    def collect(prompts, teacher, answers, client) -> None:
        asks = [Ask(prompt, teacher) for prompt in prompts]
        collect_answers(asks, None, answers, client, _no_service, "ask")

    loaded = config.load(client_speed.ClientSpeedConfig, arguments.config, arguments.overrides)
    speed = client_speed.measure(loaded, collect)
    print(
        f"{speed.requests_per_second:.0f} requests/s ({speed.requests} in {speed.seconds:.1f} s, "
        f"{speed.processor_seconds:.1f} s of processor time), {speed.stored} answers stored"
    )
    if arguments.json is not None:
        store.write_json(arguments.json, {"config": config.to_values(loaded), **speed._asdict()})


def _no_service() -> tuple[str, str]:
    raise AssertionError("the teacher has a URL")


if __name__ == "__main__":
    end_with_one_line(main)
