"""The stages route and generate at full size: many prompts, many teachers, nothing that costs.

Prompts, calibration answers, rewards, router and states of prompts are drawn; the teachers are one
endpoint that answers at once. What is timed are the stages themselves, with all that they read from
the run folder and write there.
"""

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from persyn_jax.config import config_class, to_values, validate
from persyn_jax.pipeline.config import RoutingConfig, RunConfig
from persyn_jax.pipeline.run import Run, open_run, run_stage
from persyn_jax.pipeline.run_files import CALIBRATION_ANSWERS, PROMPTS, REWARDS, ROUTER, STATES
from persyn_jax.pipeline.stages import STAGES
from persyn_jax.records import Answer, Prompt, Reward, Split
from persyn_jax.routing.rewards import make_rewards
from persyn_jax.sampling.config import ClientConfig
from persyn_jax.streams import numpy_stream

_SOURCES = 20


@config_class
class RoutingScaleConfig:
    """How much of everything."""

    prompts: Annotated[int, Field(ge=2)] = 100_000
    calibration: Annotated[int, Field(ge=1)] = 2_500
    """Of these prompts: those that all teachers answer."""
    teachers: Annotated[int, Field(ge=2)] = 19
    """Named t0, t1, ..."""
    prompt_characters: Annotated[int, Field(ge=16)] = 300
    answer_seconds: Annotated[float, Field(ge=0)] = 0.02
    """From a request to its answer, at the mock endpoint."""
    routing: Annotated[list[RoutingConfig], Field(min_length=1)]
    """Tried one after the other; the last one's routes are asked for."""
    client: ClientConfig = ClientConfig()
    seed: Annotated[int, Field(ge=0)] = 0


class Measured(NamedTuple):
    """One piece of the work."""

    what: str
    seconds: float
    processor_seconds: float
    """Of this process; the endpoint is another one."""
    peak_memory_gb: float
    """Largest resident set of this process so far."""
    summary: dict[str, Any]
    """The stage's own."""


def measure(config: RoutingScaleConfig, url: str, folder: Path) -> Iterator[Measured]:
    """Yields each piece of the work when it is done. url: of an endpoint; folder: for all files."""
    first = _run_config(config, config.routing[0], url, folder)
    stages = {stage.name: stage for stage in STAGES}
    with open_run(first) as run:
        yield _timed("draw and write records", lambda: _draw(config, run))
    for routing in config.routing:
        with open_run(_run_config(config, routing, url, folder), overwrite=True) as run:
            yield _timed(_in_words(routing), lambda: run_stage(stages["route"], run).summary)
    with open_run(_run_config(config, config.routing[-1], url, folder)) as run:
        yield _timed("generate", lambda: run_stage(stages["generate"], run).summary)


def _timed(what: str, work: Callable[[], dict[str, Any]]) -> Measured:
    started, used = time.perf_counter(), time.process_time()
    summary = work()
    seconds, used = time.perf_counter() - started, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return Measured(what, round(seconds, 2), round(used, 2), round(peak, 3), summary)


def _in_words(routing: RoutingConfig) -> str:
    default = to_values(RoutingConfig())
    changed = {k: v for k, v in to_values(routing).items() if v != default[k] and k != "strategy"}
    limits = ", ".join(f"{key} {value}" for key, value in changed.items())
    return f"route by {routing.strategy}" + (f", {limits}" if limits else "")


def _run_config(
    config: RoutingScaleConfig, routing: RoutingConfig, url: str, folder: Path
) -> RunConfig:
    teachers = [
        {
            "name": f"t{number}",
            "base_url": url,
            "model": f"mock {number}",
            "licence": "CC0-1.0",
            "usd_per_million_prompt_tokens": 0.1 * (number + 1),
            "usd_per_million_completion_tokens": 0.4 * (number + 1),
        }
        for number in range(config.teachers)
    ]
    counts = {"calibration": 0, "train": 0, "eval": 0}
    values = {
        "run": {"folder": folder, "name": "scale", "seed": config.seed}
        | {"answers": folder / "answers.sqlite"},
        "sources": {"drawn": {"kind": "file", "path": "drawn.jsonl", "counts": counts}},
        "teachers": teachers,
        "student": {"weights": "random:tiny"},
        "routing": to_values(routing),
        "client": to_values(config.client),
        "gossip": {"workers": 1},
    }
    return validate(RunConfig, values, where="routing_scale")


def _draw(config: RoutingScaleConfig, run: Run) -> dict[str, Any]:
    """Writes what the stages before `route` would have."""
    from persyn_jax.models import router
    from persyn_jax.models.weights import load_config
    from persyn_jax.pipeline.states import keep_states

    teachers = [teacher.name for teacher in run.config.teachers]
    calibration = [_prompt(config, n) for n in range(config.calibration)]
    answers = [_answer(p, name) for p in calibration for name in teachers]
    rng = numpy_stream(config.seed, "routing scale")
    quality, learnability = rng.random(len(answers)), -rng.random(len(answers))
    rewards = make_rewards(
        answers, quality.tolist(), learnability.tolist(), [40] * len(answers), alpha=0.4
    )
    run.write(PROMPTS, (_prompt(config, n) for n in range(config.prompts)), Prompt)
    run.write(CALIBRATION_ANSWERS, answers, Answer)
    run.write(REWARDS, rewards, Reward)
    width = load_config(run.config.router_backbone).d_model

    def drawn(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    head = {"kernel": drawn(len(teachers), width), "bias": drawn(len(teachers))}
    backbone, folder = run.config.router_backbone, run.folder / ROUTER
    seen_ND = drawn(config.calibration, width)
    router.save_router(folder, router.Router(head, seen_ND), teachers, backbone)
    rest = range(config.calibration, config.prompts)
    keep_states(
        run.folder / STATES,
        folder,
        backbone,
        config.seed,
        (_prompt(config, n) for n in rest),
        (drawn(1, width) for _ in rest),
    )
    return {"prompts": config.prompts, "calibration_answers": len(answers)}


def _prompt(config: RoutingScaleConfig, number: int) -> Prompt:
    split: Split = "calibration" if number < config.calibration else "train"
    length = config.prompt_characters + number % 50
    return Prompt(
        id=str(number),
        messages=[{"role": "user", "content": f"question {number} ".ljust(length, "x")}],
        source=f"source {number % _SOURCES}",
        split=split,
        answer=None,
        verifier="exact_match",
        source_licence="CC0-1.0",
    )


def _answer(prompt: Prompt, teacher: str) -> Answer:
    return Answer(
        key=f"{prompt.id} {teacher}",
        prompt_id=prompt.id,
        teacher=teacher,
        sample_index=0,
        text="forty-two " * 20,
        finish_reason="stop",
        prompt_tokens=len(prompt.messages[0]["content"]) // 4,
        completion_tokens=40,
        usd=None,
        licence="CC0-1.0",
        error=None,
    )
