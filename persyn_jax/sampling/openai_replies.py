"""What goes back: chat completions and completions, whole or as the chunks of a stream."""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from persyn_jax.sampling.requests import Completion, Piece, Scores, TokenLogprob
from persyn_jax.sampling.token_text import CompletionLogprobs, TokenTexts, chat_logprobs

DONE = b"data: [DONE]\n\n"


class Usage(TypedDict):
    """Token counts. A prompt counts once, however many choices it has; EOS is counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(TypedDict):
    """An answer."""

    role: Literal["assistant"]
    content: str


class ChatChoice(TypedDict):
    """One answer of a chat completion."""

    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: str
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    """The reply to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(TypedDict):
    """One answer of a completion."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str
    token_ids: NotRequired[list[int]]


class TextCompletion(TypedDict):
    """The reply to POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


@dataclass(frozen=True)
class Prompt:
    """What is answered, and with echo what the answer repeats."""

    tokens: tuple[int, ...]
    text: str = ""
    """As it is echoed: without a BOS that was put before it."""
    hidden: int = 0
    """Characters of that BOS."""


@dataclass
class _Choice:
    """A choice that goes out in parts."""

    prompt: Prompt
    scores: Scores | None
    logprobs: CompletionLogprobs
    begun: bool = False


@dataclass
class Replies:
    """Builds the replies to one request.

    `prompts`: one a choice. `scores`: of the prompts, where their logprobs are echoed.
    """

    chat: bool
    model: str
    texts: TokenTexts
    prompts: Sequence[Prompt]
    scores: Sequence[Scores | None]
    echo: bool = False
    with_logprobs: bool = False
    with_token_ids: bool = False
    with_usage: bool = False
    """Whether the chunks of a stream have a `usage`, null but in the last one."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self):
        self._choices = [
            _Choice(prompt, scores, CompletionLogprobs(self.texts, prompt.hidden))
            for prompt, scores in zip(self.prompts, self.scores, strict=True)
        ]

    def whole(self, answers: Sequence[Completion], usage: Usage) -> dict[str, Any]:
        """The reply that is no stream; `answers`: one a choice."""
        choices = [self._whole_choice(index, answer) for index, answer in enumerate(answers)]
        return self._envelope(choices) | {"usage": usage}

    def _whole_choice(self, index: int, answer: Completion) -> dict[str, Any]:
        text, logprobs = self._text_and_logprobs(index, answer.text, answer.logprobs)
        body = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        ids = {"token_ids": list(answer.token_ids)} if self.with_token_ids else {}
        rest = {"logprobs": logprobs, "finish_reason": answer.finish_reason}
        return {"index": index} | body | rest | ids

    def _text_and_logprobs(
        self, index: int, text: str, told: tuple[TokenLogprob, ...] | None
    ) -> tuple[str, dict[str, Any] | None]:
        """The next part of a choice's text and logprobs, the echo before the first one."""
        choice = self._choices[index]
        entries: list[tuple[int, TokenLogprob | None]] = [
            (entry.token, entry) for entry in told or ()
        ]
        if self.echo and not choice.begun:
            text = choice.prompt.text + text
            if choice.scores is not None:
                before = zip(choice.prompt.tokens, choice.scores.logprobs, strict=True)
                entries = [*before, *entries]
        choice.begun = True
        if not self.with_logprobs:
            return text, None
        if self.chat:
            return text, chat_logprobs(told or (), self.texts)
        return text, choice.logprobs.add(entries)

    def opening(self) -> bytes:
        """What a stream begins with: the role of every answer of a chat."""
        role = {"role": "assistant", "content": ""}
        indices = range(len(self._choices)) if self.chat else ()
        return b"".join(
            self._chunk({"index": i, "delta": role, "logprobs": None, "finish_reason": None})
            for i in indices
        )

    def part(self, index: int, piece: Piece) -> bytes:
        """The chunk of a stream that brings the piece; empty if there is nothing to tell."""
        text, logprobs = self._text_and_logprobs(index, piece.text, piece.logprobs)
        told = self.with_logprobs or (self.with_token_ids and piece.token_ids)
        if not (text or told or piece.finish_reason):
            return b""
        body = {"text": text} if not self.chat else {"delta": {"content": text} if text else {}}
        ids = {"token_ids": list(piece.token_ids)} if self.with_token_ids else {}
        rest = {"logprobs": logprobs, "finish_reason": piece.finish_reason}
        return self._chunk({"index": index} | body | rest | ids)

    def closing(self, usage: Usage) -> bytes:
        """What a stream ends with."""
        last = event(self._envelope([], ".chunk") | {"usage": usage}) if self.with_usage else b""
        return last + DONE

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        usage = {"usage": None} if self.with_usage else {}
        return event(self._envelope([choice], ".chunk") | usage)

    def _envelope(self, choices: list[dict[str, Any]], chunk: str = "") -> dict[str, Any]:
        kind, prefix = (
            ("chat.completion", "chatcmpl-") if self.chat else ("text_completion", "cmpl-")
        )
        return {
            "id": prefix + self.id,
            "object": kind + (chunk if self.chat else ""),
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event. All ASCII: some clients take U+2028 for the end of a line."""
    return b"data: " + json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


def count_usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    """The `usage` of a reply."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
