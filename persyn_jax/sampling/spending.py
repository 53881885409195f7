"""What answers cost, and whether one more may be asked for."""

from collections.abc import Iterable
from dataclasses import dataclass

from persyn_jax.config import ConfigError
from persyn_jax.records import Message
from persyn_jax.sampling.config import ClientConfig, TeacherConfig

_TEMPLATE_TOKENS = 64  # what a chat template may put around the messages,
_TEMPLATE_TOKENS_PER_MESSAGE = 16  # and around each of them


@dataclass(frozen=True)
class Cost:
    """Tokens, and US dollars where the price is known."""

    tokens: int
    usd: float | None

    def __add__(self, other: "Cost") -> "Cost":
        usd = None if self.usd is None or other.usd is None else self.usd + other.usd
        return Cost(self.tokens + other.tokens, usd)

    def __sub__(self, other: "Cost") -> "Cost":
        return self + Cost(-other.tokens, None if other.usd is None else -other.usd)


NOTHING = Cost(0, 0.0)


@dataclass
class Tally:
    """What asking one teacher came to, so far."""

    answers: int = 0
    failed: int = 0
    """Questions without an answer after the last try, or refused."""
    requests: int = 0
    """Everything sent, failed tries included."""
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float | None = 0.0
    """Of the tokens that the endpoint counted; null if the teacher's price is unknown."""


def price(teacher: TeacherConfig, prompt_tokens: int, completion_tokens: int) -> float | None:
    """US dollars of one answer; None if the teacher's price is unknown, never 0 for unknown.

    What stands in a file of answers costs nothing.
    """
    if teacher.answers is not None:
        return 0.0
    prompt = teacher.usd_per_million_prompt_tokens
    completion = teacher.usd_per_million_completion_tokens
    if prompt is None or completion is None:
        return None
    return (prompt * prompt_tokens + completion * completion_tokens) / 1e6


def cost(teacher: TeacherConfig, prompt_tokens: int, completion_tokens: int) -> Cost:
    """Of one answer."""
    usd = price(teacher, prompt_tokens, completion_tokens)
    return Cost(prompt_tokens + completion_tokens, usd)


def most_cost(teacher: TeacherConfig, messages: list[Message]) -> Cost:
    """The most that an answer to `messages` may cost: no token is shorter than a byte."""
    said = sum(len(message["content"].encode("utf-8", "replace")) for message in messages)
    around = _TEMPLATE_TOKENS + _TEMPLATE_TOKENS_PER_MESSAGE * len(messages)
    return cost(teacher, said + around, teacher.sampling.max_tokens)


def exceeded(spent: Cost, config: ClientConfig) -> str | None:
    """Names the budget that `spent` exceeds, with its value; None if there is none."""
    if config.budget_tokens is not None and spent.tokens > config.budget_tokens:
        return f"client.budget_tokens {config.budget_tokens}"
    # The margin is for sums in floating point: a millionth of what is allowed.
    if config.budget_usd is not None and (
        spent.usd is None or spent.usd > config.budget_usd * (1 + 1e-6)
    ):
        return f"client.budget_usd {config.budget_usd:g}"
    return None


def check_prices(teachers: Iterable[TeacherConfig], config: ClientConfig) -> None:
    """Raises ConfigError naming the teacher whose unknown price makes a budget unenforceable."""
    if config.budget_usd is None:
        return
    for teacher in teachers:
        if price(teacher, 0, 0) is None:
            raise ConfigError(
                f"client.budget_usd {config.budget_usd:g}: the price of teacher {teacher.name!r} "
                "is unknown; give usd_per_million_prompt_tokens and "
                "usd_per_million_completion_tokens, or use client.budget_tokens"
            )
