"""Serves the router of a run: which teacher suits a prompt, or that teacher's answer.

    uv run scripts/serve_router.py --config configs/quickstart.yaml --port 8001

`POST /predict` gives the coefficients; `POST /v1/chat/completions` with `model: router-NAME` (the
run's name) asks the teacher that the router picks, and names it in the header x-persyn-teacher.
"""

from persyn_jax.huge_pages import ask_for_huge_pages
from persyn_jax.pipeline.command import end_with_one_line, make_parser


def main() -> None:
    parser = make_parser("Serves the router of a run.")
    parser.add_argument("--port", type=int, default=8001, help="0 takes a free one (default 8001)")
    arguments = parser.parse_intermixed_args()
    from persyn_jax import config, store
    from persyn_jax.pipeline.config import RunConfig

    loaded = config.load(RunConfig, arguments.config, arguments.overrides)
    from persyn_jax.pipeline.router_service import run_router
    from persyn_jax.pipeline.run import open_run
    from persyn_jax.sampling.process import bind

    host = "127.0.0.1" if loaded.service is None else loaded.service.host
    listener = bind(host, arguments.port)
    url = f"http://{host}:{listener.getsockname()[1]}"

    def ready() -> None:
        name = f"router-{loaded.run.name}"
        if arguments.json is not None:
            store.write_json(arguments.json, {"base_url": f"{url}/v1", "model": name})
        print(f"serving {name} on {url}/v1", flush=True)

    with open_run(loaded) as run:
        run_router(run, listener, ready)


if __name__ == "__main__":
    ask_for_huge_pages()
    end_with_one_line(main)
