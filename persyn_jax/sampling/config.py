"""Config of the sampling service, and of the teachers that answer through it or elsewhere."""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal
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
    score_rows: Annotated[int, Field(ge=0)] = 4
    """Token rows whose log-probabilities are computed together; 0: scoring is not offered."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and caches. Softmax, norms and log-probabilities are float32."""
    tensor: Annotated[int, Field(ge=1)] = 1
    """Devices that share every weight matrix; must divide the model's key-value heads."""

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
    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's own needs `api_key_env`. A run's own service
    listens at 127.0.0.1 and asks for no key, whatever stands here."""
    api_key_env: Annotated[str, Field(min_length=1)] | None = None
    """Environment variable that holds the API key which requests must bring; null: none."""
    max_waiting: Annotated[int, Field(ge=0)] = 256
    """Answers that may wait for a slot. What comes on top is refused at once, with status 429."""
    max_body_bytes: Annotated[int, Field(ge=1)] = 4 << 20
    """Of a request; longer ones are refused unread, with status 413."""
    max_header_bytes: Annotated[int, Field(ge=1024)] = 16 << 10
    """Of a request, the path included; status 431."""
    request_seconds: Annotated[float, Field(gt=0)] = 600.0
    """From a request's last byte to the answer's. Then status 504; in a stream, an error event."""
    drain_seconds: Annotated[float, Field(ge=0)] = 30.0
    """Time that running requests have to finish after SIGTERM or SIGINT. New ones get 503."""

    def __post_init__(self):
        if self.api_key_env is None and not _is_loopback(self.host):
            raise ValueError(
                f"host {self.host!r} can be reached from other machines: set api_key_env to the "
                "name of an environment variable that holds an API key, or use 127.0.0.1"
            )


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
    """A way to get an answer: an endpoint, a model there, and what is said around the question; or
    a file of answers that exist already."""

    name: Annotated[str, Field(min_length=1)]
    model: str | None = None
    """Model name at the endpoint; null is the `service` section's model."""
    answers: Path | None = None
    """A .jsonl or .parquet file of this teacher's answers, in place of an endpoint: nobody is
    asked, nothing is paid. `pipeline.answer_files` says what a row holds. `model` then only says
    whose they are."""
    base_url: str | Annotated[list[str], Field(min_length=1)] | None = None
    """For example `http://elsewhere:8000/v1`; a list of URLs of the same model shares the questions
    out among them. Null is the run's own sampling service."""
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
        if self.answers is not None and (key := self._key_for_asking()):
            raise ValueError(
                f"teacher {self.name!r}: has a file of answers, so nobody is asked: remove {key}"
            )
        if self.base_urls and self.model is None:
            raise ValueError(f"teacher {self.name!r}: a base_url needs a model")
        for base_url in self.base_urls:
            url = urlsplit(base_url)  # raises ValueError itself for what is no URL at all
            if url.scheme not in ("http", "https") or not url.hostname or url.port == 0:
                raise ValueError(
                    f"teacher {self.name!r}: base_url {base_url!r} must begin with http:// or "
                    "https:// and a host"
                )
        if len(set(self.base_urls)) < len(self.base_urls):
            raise ValueError(f"teacher {self.name!r}: a base_url is given twice")

    def _key_for_asking(self) -> str | None:
        """A key that is given and means something only where an endpoint is asked."""
        values = {
            "base_url": self.base_url,
            "api_key_env": self.api_key_env,
            "system": self.system,
            "examples": self.examples or None,
            "sampling": None if self.sampling == SamplingConfig() else self.sampling,
            "usd_per_million_prompt_tokens": self.usd_per_million_prompt_tokens,
            "usd_per_million_completion_tokens": self.usd_per_million_completion_tokens,
        }
        return next((key for key, value in values.items() if value is not None), None)

    @property
    def needs_service(self) -> bool:
        """Whether it answers through the run's own sampling service."""
        return self.base_url is None and self.answers is None

    @property
    def base_urls(self) -> list[str]:
        """The URLs, with no slash at the end; none if the run's own service answers."""
        urls = [self.base_url] if isinstance(self.base_url, str) else self.base_url or []
        return [url.rstrip("/") for url in urls]


@config_class
class ClientConfig:
    """How endpoints are asked."""

    concurrency: Annotated[int, Field(ge=1)] = 32
    """Requests under way at once at one endpoint, at most: fewer while it says that it has too much
    to do, or is not there. A kill loses at most these."""
    attempts: Annotated[int, Field(ge=1)] = 5
    """Tries of one request before its answer counts as failed."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """For one try, from sending to the whole answer."""
    idle_seconds: Annotated[float, Field(gt=0)] = 300.0
    """Of one try, with no byte from the endpoint. Most endpoints send the first when the answer is
    whole."""
    max_failed_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Part of a teacher's answers that may fail before the stage ends; looked at from the twentieth
    answer on, and at the end."""
    budget_usd: Annotated[float, Field(ge=0)] | None = None
    """US dollars that the answers of one stage may cost, those that the answer store has already
    included; null is no limit. Nothing is asked that could exceed it, a prompt being counted at a
    token a byte. Needs the prices of all teachers."""
    budget_tokens: Annotated[int, Field(ge=0)] | None = None
    """The same in tokens, of prompts and answers together."""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def teacher_messages(teacher: TeacherConfig, messages: list[Message]) -> list[Message]:
    """What is sent: the teacher's system prompt and worked examples, then the prompt's messages."""
    before: list[Message] = []
    if teacher.system is not None:
        before.append({"role": "system", "content": teacher.system})
    for example in teacher.examples:
        before.append({"role": "user", "content": example.question})
        before.append({"role": "assistant", "content": example.answer})
    return before + messages
