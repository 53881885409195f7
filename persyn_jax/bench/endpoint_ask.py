"""How the checks of an endpoint ask it, and what they read of its answers.

What an endpoint says is not trusted: a value of the wrong kind becomes a `Decided`, which ends the
check with a verdict.
"""

import asyncio
import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import httpx

State = Literal["pass", "FAIL", "not offered", "undecided"]

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "Question: What is two plus two?\nAnswer:",
    "The days of the week are Monday, Tuesday,",
    "Water boils at a temperature of",
    "A short poem about the sea:\n",
    "def add(a, b):\n",
    "My favourite colour is",
)


class Verdict(NamedTuple):
    """What a check found."""

    state: State
    evidence: str
    """One line."""


class Decided(Exception):  # noqa: N818
    """Ends a check early, with its verdict."""

    def __init__(self, state: State, evidence: str):
        super().__init__(evidence)
        self.verdict = Verdict(state, " ".join(evidence.split()))


class Reply(NamedTuple):
    """One HTTP response."""

    status: int
    body: Any
    """The JSON value, or the text where it is not JSON."""

    @property
    def message(self) -> str:
        """What an error says, in one short line; empty if it says nothing."""
        body = self.body
        for key in ("error", "message", "detail"):
            body = body[key] if isinstance(body, dict) and body.get(key) else body
        return " ".join(str(body).split())[:120] if body else ""


@dataclass(frozen=True)
class Ask:
    """An endpoint to ask."""

    http: httpx.AsyncClient
    base_url: str
    """Ends in /v1."""
    model: str
    encode: Callable[[str], list[int]] | None
    """Text to token ids, special tokens included; None where no tokenizer is at hand."""
    eos_texts: tuple[str, ...]
    """What the end of an answer looks like as text."""
    known: dict[str, Any] = field(default_factory=dict)
    """What has been found out already, by name."""

    async def post(self, path: str, body: dict[str, Any]) -> Reply:
        """POST to a path below /v1. Raises Decided if there is no response."""
        try:
            reply = await self.http.post(self.base_url + path, json={"model": self.model, **body})
        except httpx.RequestError as error:
            reason = str(error) or type(error).__name__
            raise Decided("FAIL", f"no response from {path}: {reason}") from None
        return Reply(reply.status_code, _json(reply))

    async def stream(self, path: str, body: dict[str, Any]) -> list[str]:
        """The `data:` payloads of a streamed answer. Raises Decided: refused, broken off."""
        payloads = []
        try:
            async with self.http.stream(
                "POST", self.base_url + path, json={"model": self.model, "stream": True, **body}
            ) as reply:
                if reply.status_code != 200:
                    await reply.aread()
                    refuse(Reply(reply.status_code, _json(reply)), "stream")
                async for line in reply.aiter_lines():
                    if line.startswith("data:"):
                        payloads.append(line.removeprefix("data:").strip())
        except httpx.RequestError as error:
            reason = str(error) or type(error).__name__
            raise Decided("FAIL", f"the stream broke off: {reason}") from None
        return payloads


def _json(reply: httpx.Response) -> Any:
    try:
        return json.loads(reply.content)
    except (ValueError, RecursionError):
        return reply.text


def refuse(reply: Reply, what: str) -> None:
    """Raises Decided unless the status is 200.

    4xx and 501 are an honest no; 429 says nothing of what is offered; the others are failures.
    """
    if reply.status == 200:
        return
    honest = reply.status == 501 or 400 <= reply.status < 500
    state: State = "not offered" if honest else "FAIL"
    if reply.status == 429:
        state = "undecided"
    raise Decided(state, f"{what}: status {reply.status}: {reply.message}")


class Answer(NamedTuple):
    """One choice."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    tokens: list[str]
    """Empty where there are no logprobs, as are the next two."""
    logprobs: list[float | None]
    tops: list[dict[str, float]]
    token_ids: list[int] | None


async def has_completions(ask: Ask) -> bool:
    """Whether /v1/completions is there."""
    if "completions" not in ask.known:
        reply = await ask.post("/completions", {"prompt": PROMPTS[0], "max_tokens": 1})
        ask.known["completions"] = reply.status == 200
    return ask.known["completions"]


async def prompt_ids(ask: Ask, text: str) -> list[int] | None:
    """The text's token ids, from the tokenizer at hand or the endpoint's own; None without."""
    if ask.encode is not None:
        return ask.encode(text)
    body = {"model": ask.model, "prompt": text, "add_special_tokens": True}
    with contextlib.suppress(httpx.RequestError):
        reply = await ask.http.post(ask.base_url.removesuffix("/v1") + "/tokenize", json=body)
        values = _json(reply)
        if reply.status_code == 200 and isinstance(values, dict) and values.get("tokens"):
            return values["tokens"]
    return None


async def gives_token_ids(ask: Ask) -> bool:
    """Whether prompts may be token ids, and answers come with theirs: then no text is cut anew."""
    if "token_ids" not in ask.known:
        ids = await prompt_ids(ask, PROMPTS[0])
        body = {"prompt": ids, "max_tokens": 1, "return_token_ids": True}
        reply = await ask.post("/completions", body) if ids else None
        given = reply is not None and reply.status == 200 and answer_of(reply.body).token_ids
        ask.known["token_ids"] = bool(given)
    return ask.known["token_ids"]


async def where(ask: Ask, prompt: str | list[int]) -> tuple[str, dict[str, Any]]:
    """The path and the prompt's field: completions if they are there, else chat."""
    if await has_completions(ask):
        return "/completions", {"prompt": prompt}
    return "/chat/completions", {"messages": [{"role": "user", "content": prompt}]}


async def generate(ask: Ask, prompt: str | list[int], max_tokens: int, **fields: Any) -> Answer:
    """A greedy answer to the prompt, unless `fields` say otherwise. Raises Decided."""
    path, body = await where(ask, prompt)
    body |= {"max_tokens": max_tokens, "temperature": 0, **fields}
    reply = await ask.post(path, body)
    refuse(reply, path + "".join(f" {name}" for name in fields))
    return answer_of(reply.body)


def answer_of(body: Any) -> Answer:
    """The first choice of a completion or chat completion. Raises Decided for what is neither."""
    try:
        choice, usage = body["choices"][0], body["usage"]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        tokens, logprobs, tops = _logprobs(choice.get("logprobs"))
        answer = Answer(
            text if text is not None else "",
            choice["finish_reason"],
            usage["prompt_tokens"],
            usage["completion_tokens"],
            tokens,
            logprobs,
            tops,
            choice.get("token_ids"),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Decided("FAIL", f"not a completion: {type(error).__name__} {error}") from None
    counts = (answer.prompt_tokens, answer.completion_tokens)
    if not isinstance(answer.text, str) or not all(type(count) is int for count in counts):
        raise Decided("FAIL", "not a completion: its text or usage is of the wrong kind")
    return answer


def _logprobs(value: Any) -> tuple[list[str], list[float | None], list[dict[str, float]]]:
    """(tokens, logprobs, top logprobs) in either shape: of completions, of chat completions."""
    if not value:
        return [], [], []
    if "content" in value:
        content = value["content"] or []
        tops = [{top["token"]: top["logprob"] for top in item["top_logprobs"]} for item in content]
        return [item["token"] for item in content], [item["logprob"] for item in content], tops
    tops = [top or {} for top in value.get("top_logprobs") or []]
    return list(value["tokens"] or []), list(value["token_logprobs"] or []), tops


async def with_logprobs(
    ask: Ask, prompt: str | list[int], max_tokens: int, **fields: Any
) -> Answer:
    """A greedy answer with its logprobs; Decided where there are none."""
    asked: dict[str, Any] = {"logprobs": 1}
    if not await has_completions(ask):
        asked = {"logprobs": True, "top_logprobs": 1}
    answer = await generate(ask, prompt, max_tokens, **asked, **fields)
    if not answer.logprobs:
        raise Decided("FAIL", "logprobs were asked for, and silently left out")
    return answer


async def echo(ask: Ask, prompt: str | list[int], max_tokens: int = 1) -> Answer:
    """The prompt's own logprobs, with those of the generated token, as the endpoint sends them."""
    fields = {"echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
    reply = await ask.post("/completions", {"prompt": prompt, **fields})
    refuse(reply, "/completions echo logprobs")
    return answer_of(reply.body)


async def sound_echo(ask: Ask, prompt: str | list[int]) -> Answer:
    """`echo` for the checks that build on it: Decided as undecided where it is not sound."""
    answer = await echo(ask, prompt)
    if complaint := echo_complaint(answer):
        raise Decided("undecided", f"needs a sound echo: {complaint}")
    return answer


def echo_complaint(answer: Answer) -> str | None:
    """What is wrong with the echo of a prompt and one token, if anything is."""
    entries, expected = len(answer.logprobs), answer.prompt_tokens + 1
    if entries != expected or len(answer.tokens) != expected:
        return f"{entries} logprobs for {answer.prompt_tokens} prompt tokens and 1 generated"
    if answer.logprobs[0] is not None:
        return f"the first token's logprob is {answer.logprobs[0]!r}, not null"
    for place, value in enumerate(answer.logprobs[1:], start=1):
        if not isinstance(value, int | float) or not math.isfinite(value) or value > 1e-6:
            return f"logprob {place} is {value!r}, not a number of at most 0"
    return None


def numbers(answer: Answer) -> list[float]:
    """The logprobs of a sound echo, without the first, which is null."""
    return [float(value) for value in answer.logprobs[1:] if value is not None]


async def together(*coroutines: Any) -> list[Any]:
    """All at once; the first exception is raised after all have ended."""
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
