"""What /metrics tells: vLLM's series under the prefix `persyn_`, and the engine's own counters."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from persyn_jax.sampling.engine import Engine
from persyn_jax.sampling.requests import Piece

ENGINE_PREFIX = "persyn_engine_"
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class Metrics:
    """The series of one service.

    model: the label model_name of the series that vLLM has too. engine: the engine, None until it
    is ready.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, model: str, engine: Callable[[], Engine | None]):
        disable_created_metrics()  # one more series for each of these, which nobody reads
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"persyn_{name}", text, ["model_name", *labels], registry=self.registry)

        def seconds(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(
                f"persyn_{name}_seconds",
                text,
                ["model_name"],
                buckets=buckets,
                registry=self.registry,
            )
            return made.labels(model)

        self._model = model
        self._success = counter("request_success", "Answers that ended.", "finished_reason")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests.").labels(model)
        self.generation_tokens = counter("generation_tokens", "Tokens generated.").labels(model)
        self._first = seconds("time_to_first_token", "From request to first token.", _SLOW)
        self._each = seconds("time_per_output_token", "Of an answer, after its first.", _FAST)
        self._whole = seconds("e2e_request_latency", "From request to the answer's end.", _SLOW)
        self.registry.register(_EngineNumbers(engine, model))
        for reason in ("stop", "length"):
            self._success.labels(model, reason)

    def text(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)

    def clock(self, started: float) -> "AnswerClock":
        """The clock of one answer, started at `time.monotonic()`."""
        return AnswerClock(self, started)

    def ended(self, clock: "AnswerClock", reason: str) -> None:
        """Counts an answer that has ended."""
        now = time.monotonic()
        self._success.labels(self._model, reason).inc()
        self._whole.observe(now - clock.started)
        if clock.tokens > clock.first_tokens:
            self._each.observe((now - clock.first) / (clock.tokens - clock.first_tokens))

    def began(self, clock: "AnswerClock") -> None:
        """Counts an answer's first token."""
        self._first.observe(clock.first - clock.started)


@dataclass
class AnswerClock:
    """When the parts of one answer came."""

    metrics: Metrics
    started: float
    first: float = 0.0
    first_tokens: int = 0
    tokens: int = 0

    def count(self, piece: Piece) -> None:
        """Takes note of the next part."""
        self.metrics.generation_tokens.inc(piece.generated_tokens)
        if not self.tokens and piece.generated_tokens:
            self.first, self.first_tokens = time.monotonic(), piece.generated_tokens
            self.metrics.began(self)
        self.tokens += piece.generated_tokens
        if piece.finish_reason is not None:
            self.metrics.ended(self, piece.finish_reason)


@dataclass(frozen=True)
class _EngineNumbers(Collector):
    """Reads the engine when somebody asks."""

    engine: Callable[[], Engine | None]
    model: str

    def collect(self) -> Iterator[Metric]:
        engine = self.engine()
        if engine is None:
            return
        counters = engine.counters
        shared = {
            "num_requests_running": ("Answers in slots.", engine.running),
            "num_requests_waiting": ("Answers that wait for a slot.", engine.waiting),
            "prefix_cache_queries": (
                "Prompt tokens that were looked up.",
                counters.prompt_tokens + counters.reused_tokens,
            ),
            "prefix_cache_hits": ("Prompt tokens that need not be read.", counters.reused_tokens),
        }
        for name, (text, value) in shared.items():
            kind = GaugeMetricFamily if name.startswith("num_") else CounterMetricFamily
            family = kind(f"persyn_{name}", text, labels=["model_name"])
            family.add_metric([self.model], value)
            yield family
        for name, value in counters.as_dict().items():
            yield GaugeMetricFamily(ENGINE_PREFIX + name, name.replace("_", " "), value=value)
