"""Serves the model of a config's `service` section behind an OpenAI-compatible endpoint.

uv run scripts/serve_teacher.py --config configs/quickstart.yaml --port 8000
"""

import json

from persyn_jax.huge_pages import ask_for_huge_pages
from persyn_jax.pipeline.command import end_with_one_line, make_parser


def main() -> None:
    parser = make_parser("Serves the model of a config's service section.")
    parser.add_argument("--host", help="address to listen at (default: the config's service.host)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    arguments = parser.parse_intermixed_args()
    from persyn_jax import config, store
    from persyn_jax.pipeline.config import RunConfig

    host = [] if arguments.host is None else [f"service.host={json.dumps(arguments.host)}"]
    loaded = config.load(RunConfig, arguments.config, [*arguments.overrides, *host])
    service = loaded.service
    if service is None:
        raise config.ConfigError(f"{arguments.config}: has no service section")
    from persyn_jax.mesh import start_platform
    from persyn_jax.sampling.process import bind
    from persyn_jax.sampling.service import run

    listener = bind(service.host, arguments.port)
    name = f"[{service.host}]" if ":" in service.host else service.host
    base_url = f"http://{name}:{listener.getsockname()[1]}/v1"
    start_platform(loaded.run.platform, service.engine.tensor)
    if arguments.json is not None:
        store.write_json(arguments.json, {"base_url": base_url, "model": service.name})
    print(f"serving {service.name} on {base_url}", flush=True)
    run(service, listener)


if __name__ == "__main__":
    ask_for_huge_pages()
    end_with_one_line(main)
