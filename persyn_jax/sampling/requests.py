"""What the sampling engine is asked, and what it answers."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """A prompt and how to answer it."""

    tokens: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """Draw from so many of the most likely tokens; 0: from the whole vocabulary."""
    seed: int = 0
    """Taken modulo 2**32."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""
    logprobs: int | None = None
    """Tell each token's log-probability, and those of so many of the most likely tokens, at most
    `programs.ALTERNATIVES`; None: tell nothing."""


@dataclass(frozen=True)
class ScoreRequest:
    """Token ids whose log-probabilities are wanted. Nothing is generated."""

    tokens: tuple[int, ...]
    top: int = 0
    """Tell so many of the most likely tokens at each place, at most `programs.ALTERNATIVES`."""


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, in nats, to the model itself: at temperature 1, whole vocabulary."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token, log-probability), likeliest first."""


@dataclass(frozen=True)
class Piece:
    """What one step added to an answer. The pieces of an answer, one after the other, are it."""

    text: str
    """Final: never half a character, never the beginning of what may become a stop text."""
    token_ids: tuple[int, ...]
    """All generated tokens but EOS: those that spell a stop text included."""
    logprobs: tuple[TokenLogprob, ...] | None
    """Of every generated token, EOS included; None if nobody asked."""
    generated_tokens: int
    """With EOS, if it was generated."""
    finish_reason: str | None
    """With the last piece: `stop` (EOS or a stop text) or `length` (`max_tokens` reached)."""


@dataclass(frozen=True)
class Scores:
    """The answer to a ScoreRequest."""

    logprobs: tuple[TokenLogprob | None, ...]
    """One a token; None for the first, before which nothing stands."""


@dataclass(frozen=True)
class Completion:
    """A whole answer: the pieces put together."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    generated_tokens: int
    finish_reason: str
    prompt_tokens: int


def join(pieces: Iterable[Piece], prompt_tokens: int) -> Completion:
    """The whole answer. `pieces` ends with the last one."""
    pieces = list(pieces)
    reason = pieces[-1].finish_reason
    assert reason is not None, "the answer has not ended"
    told = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return Completion(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=tuple(entry for part in told for entry in part) if told else None,
        generated_tokens=sum(piece.generated_tokens for piece in pieces),
        finish_reason=reason,
        prompt_tokens=prompt_tokens,
    )
