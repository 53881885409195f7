"""Single tokens as text and bytes, and log-probabilities in the two forms of OpenAI's protocol."""

import codecs
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from persyn_jax.models.tokenizer import Tokenizer
from persyn_jax.sampling.requests import TokenLogprob

_LEAST = -9999.0  # stands for minus infinity, which JSON does not have
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class TokenTexts:
    """What each token spells, looked up once."""

    tokenizer: Tokenizer
    known: dict[int, tuple[str, bytes]] = field(default_factory=dict)

    def __getitem__(self, token: int) -> tuple[str, bytes]:
        """(text, bytes). For a part of a character the text is as OpenAI has it: `bytes:\\xe2`."""
        if token not in self.known:
            text = self.tokenizer.decode([token], skip_special_tokens=False)
            piece = self.tokenizer.convert_ids_to_tokens(token)
            exact = _true_bytes(piece) if _BROKEN in text and piece is not None else None
            if exact is None:
                self.known[token] = text, text.encode()
            else:
                self.known[token] = "bytes:" + "".join(f"\\x{byte:02x}" for byte in exact), exact
        return self.known[token]


def _true_bytes(piece: str) -> bytes | None:
    """The bytes that a vocabulary's entry stands for; None if it does not stand for bytes."""
    if match := _BYTE.fullmatch(piece):
        return bytes.fromhex(match[1])
    if all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece)
    return None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's names of the bytes: the printable ones are themselves, the others come after them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {chr(byte): byte for byte in printable}
    return names | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def chat_logprobs(entries: Sequence[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """The `logprobs` of a chat completion's choice."""

    def told(token: int, logprob: float) -> dict[str, Any]:
        text, exact = texts[token]
        return {"token": text, "logprob": number(logprob), "bytes": list(exact)}

    content = [
        told(entry.token, entry.logprob) | {"top_logprobs": [told(*top) for top in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The `logprobs` of a completion's choice, part by part.

    hidden: characters of the first tokens that the choice's text does not show: those of BOS.
    """

    def __init__(self, texts: TokenTexts, hidden: int = 0):
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = -hidden

    def add(self, entries: Sequence[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
        """The next part, of (token, what is told of it).

        None is for a token before which nothing stands. The dict of a place holds the token itself
        too, whether it is among the likeliest or not; of tokens with the same text it holds the
        likeliest. text_offset counts the characters that are complete before the token.
        """
        offsets, tops = [], []
        for token, entry in entries:
            offsets.append(max(self._characters, 0))
            self._characters += len(self._decoder.decode(self._texts[token][1]))
            tops.append(None if entry is None else self._top(entry))
        return {
            "tokens": [self._texts[token][0] for token, _ in entries],
            "token_logprobs": [
                None if entry is None else number(entry.logprob) for _, entry in entries
            ],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            text = self._texts[token][0]
            found[text] = max(number(logprob), found.get(text, -math.inf))
        return found


def number(logprob: float) -> float:
    """A log-probability that JSON can hold: of at least -9999. NaN stays, and fails there."""
    return _LEAST if logprob < _LEAST else logprob
