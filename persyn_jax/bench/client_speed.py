"""How many answers a second the client gets and commits, from an endpoint that costs nothing."""

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from persyn_jax.bench.mock_endpoint import mock_endpoint
from persyn_jax.config import config_class
from persyn_jax.records import Prompt
from persyn_jax.sampling.config import ClientConfig, TeacherConfig
from persyn_jax.store import AnswerStore


@config_class
class ClientSpeedConfig:
    """What is asked, and of what."""

    requests: Annotated[int, Field(ge=1)] = 25_000
    prompt_characters: Annotated[int, Field(ge=16)] = 300
    answer_seconds: Annotated[float, Field(ge=0)] = 0.02
    """From a request to its answer, at the mock endpoint."""
    client: ClientConfig = ClientConfig()


class ClientSpeed(NamedTuple):
    """One measurement."""

    requests: int
    seconds: float
    """From the first request to the last commit, with the making of keys and of records."""
    requests_per_second: float
    processor_seconds: float
    """Of this process; the endpoint is another one."""
    stored: int
    """Rows in the answer store at the end."""


def measure(
    config: ClientSpeedConfig,
    collect: Callable[[list[Prompt], TeacherConfig, AnswerStore, ClientConfig], None],
) -> ClientSpeed:
    """Times `collect`, which asks the teacher all the prompts and commits the answers."""
    prompts = [_prompt(index, config.prompt_characters) for index in range(config.requests)]
    with mock_endpoint(config.answer_seconds) as url, tempfile.TemporaryDirectory() as folder:
        teacher = TeacherConfig(name="mock", base_url=url, model="mock", licence="CC0-1.0")
        with AnswerStore(Path(folder) / "answers.sqlite") as answers:
            used, started = _processor_seconds(), time.perf_counter()
            collect(prompts, teacher, answers, config.client)
            seconds, used = time.perf_counter() - started, _processor_seconds() - used
            stored = answers.count()
    return ClientSpeed(config.requests, seconds, config.requests / seconds, used, stored)


def _prompt(index: int, characters: int) -> Prompt:
    return Prompt(
        id=str(index),
        messages=[{"role": "user", "content": f"question {index} ".ljust(characters, "x")}],
        source="mock",
        split="train",
        answer=None,
        verifier="exact_match",
        source_licence="CC0-1.0",
    )


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
