"""A conformance kit for any OpenAI-compatible endpoint: does it mean what it says?

Each check asks the endpoint a few things and returns a verdict with one line of evidence.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx

from persyn_jax.bench import endpoint_logprobs as logprobs
from persyn_jax.bench import endpoint_protocol as protocol
from persyn_jax.bench import endpoint_text as text
from persyn_jax.bench.endpoint_ask import Ask, Decided, State, Verdict
from persyn_jax.config import ConfigError

TIMEOUT_SECONDS = 120.0
EOS_TEXTS = (
    "</s>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<eos>",
    "<end_of_turn>",
    "<|end|>",
)

CHECKS: tuple[tuple[str, Callable[[Ask], Awaitable[Verdict]]], ...] = (
    ("chat completion", protocol.chat_completion),
    ("max_tokens", text.max_tokens),
    ("end of text", text.end_of_text),
    ("stop strings", text.stop_strings),
    ("seed replay", text.seed_replay),
    ("batch order", text.batch_order),
    ("prefix cache", text.prefix_cache),
    ("streaming", protocol.streaming),
    ("echo with logprobs", logprobs.echo_logprobs),
    ("echo off by one", logprobs.off_by_one),
    ("greedy maximum", logprobs.greedy_maximum),
    ("greedy maximum of echo", logprobs.greedy_maximum_of_echo),
    ("echo counts the end", logprobs.end_counted),
    ("echo with max_tokens 0", logprobs.no_new_token),
    ("better than chance", logprobs.chance_level),
    ("unknown model", protocol.unknown_model),
    ("invalid fields", protocol.invalid_fields),
    ("logit_bias", protocol.logit_bias),
    ("n: 2", protocol.two_choices),
)


class Row(NamedTuple):
    """A line of the table."""

    name: str
    state: State
    evidence: str


def check_endpoint(
    base_url: str,
    model: str | None,
    api_key: str | None,
    tokenizer: Path | None,
    on_row: Callable[[Row], None],
) -> tuple[str, list[Row]]:
    """Runs all checks one after another; calls `on_row` after each. Returns (model, rows).

    base_url: ends in /v1. model: None takes the first that is listed. tokenizer: a Hugging Face
    folder, for prompts as token ids and the text that ends an answer.
    Raises ConfigError: nobody answers there, the key is refused, no model is listed and none named.
    """
    encode, eos_texts = _load_tokenizer(tokenizer)
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    async def run() -> tuple[str, list[Row]]:
        # Variables of the environment name no proxy: what is measured is the endpoint itself.
        async with httpx.AsyncClient(
            headers=headers, timeout=TIMEOUT_SECONDS, trust_env=False
        ) as http:
            listed = await _models(http, base_url)
            rows = [_row("list of models", _judge_models(listed))]
            on_row(rows[0])
            chosen = model or (listed[0] if isinstance(listed, list) and listed else None)
            if chosen is None:
                raise ConfigError(f"{base_url}: lists no model; name one with --model")
            ask = Ask(http, base_url.rstrip("/"), chosen, encode, eos_texts)
            for name, check in CHECKS:
                rows.append(_row(name, await _verdict(check, ask)))
                on_row(rows[-1])
            return chosen, rows

    return asyncio.run(run())


async def _verdict(check: Callable[[Ask], Awaitable[Verdict]], ask: Ask) -> Verdict:
    """The check's verdict. What an endpoint answers beyond all expectation is a FAIL too."""
    try:
        return await check(ask)
    except Decided as decided:
        return decided.verdict
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return Verdict("FAIL", f"an answer that cannot be read: {line:.100}")


async def _models(http: httpx.AsyncClient, base_url: str) -> list[str] | str:
    """The names of the models, or what is wrong with the list."""
    try:
        reply = await http.get(base_url.rstrip("/") + "/models")
    except httpx.RequestError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{base_url}: cannot be reached: {reason}") from None
    if reply.status_code in (401, 403):
        raise ConfigError(f"{base_url}: refuses the API key with status {reply.status_code}")
    if reply.status_code != 200:
        return f"status {reply.status_code}"
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        return [str(entry["id"]) for entry in reply.json()["data"]]
    return "not a list of models"


def _judge_models(listed: list[str] | str) -> Verdict:
    if isinstance(listed, str):
        return Verdict("FAIL", listed)
    names = ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
    return Verdict("pass" if listed else "FAIL", names or "it is empty")


def _row(name: str, verdict: Verdict) -> Row:
    """The verdict in one line that can be printed, whatever the endpoint said."""
    printable = verdict.evidence.encode(errors="replace").decode()
    return Row(name, verdict.state, " ".join(printable.split()))


def _load_tokenizer(
    folder: Path | None,
) -> tuple[Callable[[str], list[int]] | None, tuple[str, ...]]:
    if folder is None:
        return None, EOS_TEXTS
    from persyn_jax.models.tokenizer import load_folder

    tokenizer = load_folder(folder)
    end = (tokenizer.eos_token,) if tokenizer.eos_token else ()
    return (lambda text: tokenizer(text)["input_ids"]), (*end, *EOS_TEXTS)


def table_line(row: Row) -> str:
    """The row as a line of plain text."""
    return f"{row.state:<12}{row.name:<24}{row.evidence}"


def failed(rows: Sequence[Row]) -> list[str]:
    """The names of the checks that failed."""
    return [row.name for row in rows if row.state == "FAIL"]
