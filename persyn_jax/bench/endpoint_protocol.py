"""Checks of the protocol: what every client takes for granted."""

import json
from typing import Any

from persyn_jax.bench.endpoint_ask import (
    PROMPTS,
    Ask,
    Decided,
    Reply,
    Verdict,
    answer_of,
    generate,
    where,
)

MULTIBYTE_PROMPTS = (
    "Repeat: äöü ß é ñ — 日本語 한국어 🙂🚀\n",
    "Emoji: 😀😃😄😁😆",
    "日本の首都は",
)
NO_SUCH_MODEL = "no-such-model-a8c1"


async def chat_completion(ask: Ask) -> Verdict:
    """A chat completion has a message, a finish reason and usage that adds up."""
    body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
    reply = await ask.post("/chat/completions", body)
    if reply.status != 200:
        return (
            Verdict("not offered", f"status {reply.status}: {reply.message}")
            if (400 <= reply.status < 500)
            else Verdict("FAIL", f"status {reply.status}: {reply.message}")
        )
    answer = answer_of(reply.body)
    if answer.finish_reason not in ("stop", "length"):
        return Verdict("FAIL", f"finish_reason {answer.finish_reason!r}")
    message = reply.body["choices"][0].get("message", {})
    if message.get("role") != "assistant":
        return Verdict("FAIL", f"the message's role is {message.get('role')!r}")
    total = reply.body["usage"].get("total_tokens")
    usage = f"{answer.prompt_tokens} + {answer.completion_tokens} tokens, total {total}"
    sound = total == answer.prompt_tokens + answer.completion_tokens and answer.prompt_tokens > 0
    return Verdict("pass" if sound else "FAIL", usage)


async def streaming(ask: Ask) -> Verdict:
    """Chunks join to the text that comes without streaming, and end with usage and [DONE]."""
    for prompt in (*PROMPTS[:3], *MULTIBYTE_PROMPTS):
        whole = (await generate(ask, prompt, 24)).text
        path, fields = await where(ask, prompt)
        payloads = await ask.stream(
            path,
            fields
            | {"max_tokens": 24, "temperature": 0, "stream_options": {"include_usage": True}},
        )
        if not payloads or payloads[-1] != "[DONE]":
            return Verdict("FAIL", f"the stream ends with {payloads[-1:]}, not [DONE]")
        text, usage = _joined(payloads[:-1])
        if "\ufffd" in text and "\ufffd" not in whole:
            return Verdict("FAIL", f"a character is split: {text!r:.40} instead of {whole!r:.40}")
        if text != whole:
            return Verdict("FAIL", f"streamed {text!r:.40}, not streamed {whole!r:.40}")
        if not isinstance(usage, dict) or "completion_tokens" not in usage:
            return Verdict("FAIL", "no usage, though stream_options.include_usage asks for it")
    return Verdict("pass", "joins to the same text, no character split; usage; [DONE]")


def _joined(payloads: list[str]) -> tuple[str, Any]:
    """(text, last usage) of the chunks. Raises Decided for what is no chunk."""
    text, usage = "", None
    for payload in payloads:
        try:
            chunk = json.loads(payload)
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
                text += piece or ""
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Decided("FAIL", f"not a chunk: {payload!r:.60}") from None
    return text, usage


async def unknown_model(ask: Ask) -> Verdict:
    """A model that is not there is refused, not replaced."""
    path, fields = await where(ask, PROMPTS[0])
    reply = await ask.post(path, fields | {"model": NO_SUCH_MODEL, "max_tokens": 1})
    if reply.status in (400, 404):
        return Verdict("pass", f"status {reply.status}")
    return Verdict("FAIL", f"model {NO_SUCH_MODEL!r} gives status {reply.status}")


async def invalid_fields(ask: Ask) -> Verdict:
    """What can never succeed gets 4xx with a message."""
    path, fields = await where(ask, PROMPTS[0])
    empty = {"prompt": 3.5} if "prompt" in fields else {"messages": "hello"}
    for wrong in ({"temperature": "hot"}, {"max_tokens": -1}, empty):
        reply = await ask.post(path, fields | {"max_tokens": 1} | wrong)
        if not 400 <= reply.status < 500:
            return Verdict("FAIL", f"{wrong} gives status {reply.status}")
        if not reply.message:
            return Verdict("FAIL", f"{wrong} gives status {reply.status} without a message")
    return Verdict("pass", f"4xx with a message, for example: {reply.message[:60]!r}")


async def logit_bias(ask: Ask) -> Verdict:
    """`logit_bias` changes the answer or is refused. Two tokens are forced in turn, so no token ids
    need to be known: at most one of them is what the answer repeats anyway."""
    plain = (await generate(ask, PROMPTS[0], 4)).text
    path, fields = await where(ask, PROMPTS[0])
    for token in ("100", "200"):
        body = fields | {"max_tokens": 4, "temperature": 0, "logit_bias": {token: 100}}
        reply = await ask.post(path, body)
        if reply.status != 200:
            return _refused(reply)
        if answer_of(reply.body).text != plain:
            return Verdict("pass", "forcing a token changes the answer")
    return Verdict("FAIL", f"silently ignored: {plain!r} with and without")


async def two_choices(ask: Ask) -> Verdict:
    """`n: 2` gives two choices or is refused."""
    path, fields = await where(ask, PROMPTS[0])
    reply = await ask.post(path, fields | {"max_tokens": 4, "n": 2, "temperature": 1})
    if reply.status != 200:
        return _refused(reply)
    answer_of(reply.body)
    count = len(reply.body["choices"])
    return Verdict("pass" if count == 2 else "FAIL", f"{count} choices")


def _refused(reply: Reply) -> Verdict:
    state = "pass" if 400 <= reply.status < 500 else "FAIL"
    return Verdict(state, f"refused with status {reply.status}: {reply.message}")
