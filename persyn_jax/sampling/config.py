"""Config of the sampling service, and of the teachers that answer through it or elsewhere."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field

from persyn_jax.config import config_class
from persyn_jax.models.spec import ModelConfig
from persyn_jax.records import Message


@config_class
class EngineConfig:
    """The engine's static shapes. Tokens are bitwise reproducible for one set of these values."""

    slots: Annotated[int, Field(ge=1)] = 16
    """Requests decoded together."""
    cache_length: Annotated[int, Field(ge=1)] = 512
    """Tokens of prompt and answer together; a multiple of `prefill_chunk`."""
    prefill_rows: Annotated[int, Field(ge=1)] = 8
    """Prompts read together."""
    prefill_chunk: Annotated[int, Field(ge=1)] = 16
    """Tokens of a prompt read at once, and the grain of prefix reuse."""
    decode_steps: Annotated[int, Field(ge=1)] = 4
    """Tokens decoded per round trip to the host."""
    prefix_blocks: Annotated[int, Field(ge=1)] = 256
    """Chunks of recently read prompts that are kept for reuse; at least `prefill_rows`."""

    def __post_init__(self):
        if self.cache_length % self.prefill_chunk:
            raise ValueError(
                f"cache_length {self.cache_length} must be a multiple of "
                f"prefill_chunk {self.prefill_chunk}"
            )
        if self.prefix_blocks < self.prefill_rows:
            raise ValueError(
                f"prefix_blocks {self.prefix_blocks} must be at least "
                f"prefill_rows {self.prefill_rows}"
            )


@config_class
class ServiceConfig:
    """One process that serves one set of weights to any number of teachers."""

    model: ModelConfig
    name: str = "model"
    """Name under which requests ask for it."""
    engine: EngineConfig = EngineConfig()


@config_class
class SamplingConfig:
    """How a teacher's answers are drawn."""

    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] = 64
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list, max_length=4)
    """The answer ends before the first of these texts; at most four, as OpenAI's endpoints take."""


@config_class
class WorkedExample:
    """A few-shot turn pair that stands before the question."""

    question: str
    answer: str


@config_class
class TeacherConfig:
    """A way to get an answer: an endpoint, a model there, and what is said around the question."""

    name: Annotated[str, Field(min_length=1)]
    model: str | None = None
    """Model name at the endpoint; null is the `service` section's model."""
    base_url: str | None = None
    """For example `http://elsewhere:8000/v1`; null is the run's own sampling service."""
    api_key_env: str | None = None
    """Environment variable that holds the endpoint's API key."""
    system: str | None = None
    examples: list[WorkedExample] = Field(default_factory=list)
    sampling: SamplingConfig = SamplingConfig()
    licence: Annotated[str, Field(min_length=1)]
    """Licence of what this teacher writes; follows every row."""
    usd_per_million_prompt_tokens: Annotated[float, Field(ge=0)] | None = None
    """Null: unknown, and then the cost of the run is unknown too."""
    usd_per_million_completion_tokens: Annotated[float, Field(ge=0)] | None = None

    def __post_init__(self):
        if self.base_url is None:
            return
        if self.model is None:
            raise ValueError(f"teacher {self.name!r}: a base_url needs a model")
        url = urlsplit(self.base_url)  # raises ValueError itself for what is no URL at all
        if url.scheme not in ("http", "https") or not url.hostname or url.port == 0:
            raise ValueError(
                f"teacher {self.name!r}: base_url {self.base_url!r} must begin with http:// or "
                "https:// and a host"
            )


@config_class
class ClientConfig:
    """How endpoints are asked."""

    concurrency: Annotated[int, Field(ge=1)] = 32
    """Requests under way at once."""
    attempts: Annotated[int, Field(ge=1)] = 5
    """Tries of one request before its endpoint counts as failing."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """For one try, from sending to the whole answer."""


def teacher_messages(teacher: TeacherConfig, messages: list[Message]) -> list[Message]:
    """What is sent: the teacher's system prompt and worked examples, then the prompt's messages."""
    before: list[Message] = []
    if teacher.system is not None:
        before.append({"role": "system", "content": teacher.system})
    for example in teacher.examples:
        before.append({"role": "user", "content": example.question})
        before.append({"role": "assistant", "content": example.answer})
    return before + messages
