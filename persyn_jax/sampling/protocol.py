"""The bodies of requests: OpenAI's protocol with vLLM's extensions, as far as they are offered."""

import itertools
import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
)
from typing_extensions import TypedDict

from persyn_jax.records import Message

MAX_CHOICES_PER_PROMPT = 16
MAX_ALTERNATIVES = 20
_MAX_DEPTH = 64
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_LARGE = 1 << 31

# Fields of OpenAI's protocol and of vLLM's that would change the answer and are not offered, with
# the value that asks for nothing. So does null.
_NOT_OFFERED: dict[str, Any] = {
    "add_generation_prompt": True,
    "allowed_token_ids": [],
    "audio": None,
    "bad_words": [],
    "best_of": 1,
    "chat_template": None,
    "chat_template_kwargs": {},
    "continue_final_message": False,
    "documents": [],
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "guided_choice": None,
    "guided_grammar": None,
    "guided_json": None,
    "guided_regex": None,
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "logit_bias": {},
    "logits_processors": [],
    "min_p": 0,
    "min_tokens": 0,
    "modalities": ["text"],
    "prediction": None,
    "presence_penalty": 0,
    "prompt_embeds": None,
    "prompt_logprobs": None,
    "reasoning_effort": "none",
    "repetition_penalty": 1,
    "response_format": {"type": "text"},
    "skip_special_tokens": True,
    "stop_token_ids": [],
    "structured_outputs": None,
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "truncate_prompt_tokens": None,
    "use_beam_search": False,
    "web_search_options": None,
}


class RequestError(Exception):
    """A request that is not answered: an HTTP status, one line, and the field that is to blame."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param


class ErrorDetail(TypedDict):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorReply(TypedDict):
    """The JSON body of an error, as OpenAI's clients read it."""

    error: ErrorDetail


def error_body(status: int, message: str, param: str | None = None) -> ErrorReply:
    """The error as a JSON body, its message in one line of at most 500 characters."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = " ".join(message.split())
    message = message if len(message) <= 500 else message[:497] + "..."
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def parse_json(data: bytes) -> Any:
    """The JSON value in `data`.

    Raises ValueError, in a few words, for what is not JSON, NaN and infinities, more than 64 levels
    of nesting, and text that is not valid Unicode.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    _check_depth(data)
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, at character {error.pos}") from None
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"not valid Unicode: {error.reason}") from None
    return value


def _check_depth(data: bytes) -> None:
    outside = re.sub(rb'"(?:[^"\\]|\\.)*+"?', b"", data, flags=re.DOTALL)
    brackets = outside.translate(None, delete=_NO_BRACKETS)
    steps = map({ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}.__getitem__, brackets)
    if max(itertools.accumulate(steps), default=0) > _MAX_DEPTH:
        raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not a number")


def _finite(digits: str) -> float:
    if abs(value := float(digits)) == float("inf"):
        raise ValueError(f"{digits:.40} is too large a number")
    return value


def _or_say(message: str) -> WrapValidator:
    """One message in the place of one for every member of a union."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(message) from None

    return WrapValidator(validate)


def _one_or_many(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(fail_fast=True)],
        _or_say('must be a string or a list of {"type": "text", "text": ...} parts'),
    ]

    @property
    def plain(self) -> Message:
        """Role and text. Parts are joined by line ends, as vLLM does; developer means system."""
        parts = self.content
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text}


class StreamOptions(BaseModel):
    """What a stream brings besides the text."""

    include_usage: bool = False


TokenId = Annotated[int, Field(strict=True, ge=0, lt=_LARGE)]
# fail_fast: a million wrong entries are one complaint, not a million.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class _Generation(BaseModel):
    """What chat completions and completions have in common.

    Further fields are let through unless they would change the answer.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=_LARGE)] = -1
    """-1 or 0: the whole vocabulary."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES_PER_PROMPT)] = 1
    """Choice number i of a prompt is drawn with seed + i, whatever prompts stand beside it."""
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    """Taken modulo 2**32. Null: another one each time."""
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]] | None,
        Field(max_length=4),
        BeforeValidator(_one_or_many, json_schema_input_type=str | list[str] | None),
    ] = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False

    def check(self) -> None:
        """Raises RequestError for fields that would change the answer and are not offered."""
        for name, value in (self.model_extra or {}).items():
            if name in _NOT_OFFERED and value is not None and value != _NOT_OFFERED[name]:
                raise RequestError(400, f"{name}: {value!r:.100} is not supported", name)
        if self.stream_options is not None and not self.stream:
            raise RequestError(400, "stream_options: is only for stream: true", "stream_options")


class ChatRequest(_Generation):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, lt=_LARGE)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_LARGE)] | None = None
    """The newer name of max_tokens. Neither: as many as the context has room for."""
    logprobs: bool | None = None
    """Tell the log-probability of every token, EOS included."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    """And those of so many of the likeliest tokens; needs logprobs."""

    @property
    def alternatives(self) -> int | None:
        """How many likeliest tokens are told with each; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """Raises RequestError for fields that would change the answer and are not offered."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise RequestError(400, "top_logprobs: needs logprobs: true", "top_logprobs")
        if self.model_extra and self.model_extra.get("echo"):
            raise RequestError(400, "echo: is not supported", "echo")
        for place, message in enumerate(self.messages):
            for name in ("tool_calls", "function_call", "audio"):
                if (message.model_extra or {}).get(name):
                    where = f"messages.{place}.{name}"
                    raise RequestError(400, f"{where}: is not supported", where)


class CompletionRequest(_Generation):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Field(strict=True)]
        | Annotated[list[Annotated[str, Field(strict=True)]], Field(min_length=1, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)],
        _or_say("must be a string, token ids, or a list of either, and not be empty"),
    ]
    max_tokens: Annotated[int, Field(ge=0, lt=_LARGE)] | None = None
    """Null: 16, or as many as the context has room for. 0 is only for echo."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    """Tell the log-probability of every token, EOS included, and those of so many likeliest."""
    echo: bool | None = False
    """The text begins with the prompt, and so do the logprobs."""
    add_special_tokens: bool = True
    """Whether a text prompt gets the tokenizer's BOS, if it has one."""

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt: a text or token ids."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given

    @property
    def alternatives(self) -> int | None:
        """How many likeliest tokens are told with each; None: no log-probabilities at all."""
        return self.logprobs

    def check(self) -> None:
        """Raises RequestError for fields that would change the answer and are not offered."""
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise RequestError(400, "max_tokens: 0 is only for echo: true", "max_tokens")


class TokenizeRequest(BaseModel):
    """The body of POST /tokenize: a text, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[ChatMessage], Field(min_length=1, max_length=1024, fail_fast=True)] | None
    ) = None
    add_special_tokens: bool = True
    """Of a text: with BOS, if the tokenizer has one."""


class DetokenizeRequest(BaseModel):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class ScoreTokensRequest(BaseModel):
    """The body of POST /v1/score_tokens: how likely tokens are after those before them."""

    model: str | None = None
    token_ids: Annotated[list[TokenId], Field(min_length=2, fail_fast=True)]
    completion_start: Annotated[int, Field(ge=1, lt=_LARGE)] = 1
    """Index of the first token that is scored."""
