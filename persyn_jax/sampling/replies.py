"""What endpoints answer: a chat completion, a failure that may pass, or a refusal."""

import contextlib
import datetime
import email.utils
import json
from dataclasses import dataclass
from typing import Annotated, Any

import httpx
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

_OVERLOAD_STATUS = {408, 429, 502, 503, 504}
_RETRIED_STATUS = _OVERLOAD_STATUS | {409, 425, 500}
_HOPELESS_STATUS = {401, 403, 404}


@dataclass(frozen=True)
class Reply:
    """What became of one question: an endpoint's answer, or the error that it ended with."""

    text: str
    """Valid Unicode: halves of surrogate pairs are replaced by U+FFFD."""
    token_ids: list[int] | None
    finish_reason: str
    """The endpoint's word: `stop` or `length`, or another one such as `content_filter`, which makes
    the answer unusable. `error` if there is no answer."""
    prompt_tokens: int
    completion_tokens: int
    server: str
    latency_seconds: float
    error: str | None = None
    """Why there is no answer, in one line; the text is empty then and the tokens are 0."""


def failed_reply(reason: str, server: str) -> Reply:
    """The reply to a question that has no answer."""
    return Reply("", None, "error", 0, 0, server, 0.0, error=reason)


class PassingError(Exception):
    """No answer this time; there may be one later."""

    def __init__(self, reason: str, overload: bool = False, retry_after: float | None = None):
        super().__init__(reason)
        self.overload = overload
        """Whether the endpoint is not there or has too much to do; else its reply is no good."""
        self.retry_after = retry_after
        """Seconds after which the endpoint wants to be asked again."""


class RefusedError(Exception):
    """The endpoint will not answer this prompt."""


class HopelessError(Exception):
    """The endpoint will not answer any prompt: wrong key, wrong model, wrong URL."""


def read_reply(
    response: httpx.Response, api_key: str | None, server: str, latency_seconds: float
) -> Reply:
    """Raises PassingError, RefusedError or HopelessError, by status and by what the body is."""
    code = response.status_code
    if code == 200:
        return _completion(response.content, server, latency_seconds)
    reason = f"status {code}: {_error_message(response, api_key)}"
    if code in _RETRIED_STATUS:
        raise PassingError(reason, code in _OVERLOAD_STATUS, _retry_after(response))
    if code in _HOPELESS_STATUS or not 400 <= code < 500:
        raise HopelessError(reason)
    raise RefusedError(reason)


def _error_message(response: httpx.Response, api_key: str | None) -> str:
    """What the endpoint says is wrong, in one line, without the API key should it repeat that."""
    message = response.text
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        message = str(json.loads(response.content)["error"]["message"])
    if api_key is not None:
        message = message.replace(api_key, "***")
    return " ".join(_valid_unicode(message[:500]).split())


def _retry_after(response: httpx.Response) -> float | None:
    """The header as seconds from now; None without one, and for one that says nothing."""
    value = response.headers.get("retry-after", "")
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:  # the header's dates are in GMT, whatever they call it
        moment = moment.replace(tzinfo=datetime.UTC)
    return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())


def _valid_unicode(text: Any) -> Any:
    """Joins surrogate pairs and replaces lone halves, which cut-off JSON escapes leave behind."""
    if isinstance(text, str):
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return "" if text is None else text


_Text = Annotated[str, BeforeValidator(_valid_unicode)]


class _ReplyMessage(BaseModel):
    content: _Text


class _Choice(BaseModel):
    message: _ReplyMessage
    finish_reason: Annotated[_Text, Field(min_length=1)]
    token_ids: list[int] | None = None


class _Usage(BaseModel):
    prompt_tokens: Annotated[int, Field(ge=0)]
    completion_tokens: Annotated[int, Field(ge=0)]


class _ChatCompletion(BaseModel):
    """What is read of the reply's body; the rest is ignored."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage


def _completion(content: bytes, server: str, latency_seconds: float) -> Reply:
    """Raises PassingError for a body that is no chat completion."""
    try:
        body = _ChatCompletion.model_validate(json.loads(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PassingError(f"not a chat completion: {place}: {first['msg']}") from None
    except (ValueError, RecursionError):
        raise PassingError("not a chat completion: not JSON") from None
    choice = body.choices[0]
    if choice.finish_reason in ("error", "abort"):  # the endpoint's own word for a failure
        raise PassingError(f"finish_reason {choice.finish_reason!r}")
    return Reply(
        text=choice.message.content,
        token_ids=choice.token_ids,
        finish_reason=choice.finish_reason,
        prompt_tokens=body.usage.prompt_tokens,
        completion_tokens=body.usage.completion_tokens,
        server=server,
        latency_seconds=latency_seconds,
    )
