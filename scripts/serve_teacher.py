"""Serves the model of a config's `service` section behind an OpenAI-compatible endpoint.

    uv run scripts/serve_teacher.py --config configs/quickstart.yaml --port 8000
"""

import argparse
from pathlib import Path

from persyn_jax.pipeline.command import end_with_one_line


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves the model of a config's service section.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file that describes the run")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override a value of the config"
    )
    arguments = parser.parse_args()
    from persyn_jax import config
    from persyn_jax.pipeline.config import RunConfig

    loaded = config.load(RunConfig, arguments.config, arguments.overrides)
    if loaded.service is None:
        raise config.ConfigError(f"{arguments.config}: has no service section")
    from persyn_jax.sampling.service import bind, run

    listener = bind("127.0.0.1", arguments.port)
    from persyn_jax.mesh import start_platform

    start_platform(loaded.run.platform, 1)
    print(f"serving {loaded.service.name} on http://127.0.0.1:{listener.getsockname()[1]}/v1")
    run(loaded.service, listener)


if __name__ == "__main__":
    end_with_one_line(main)
