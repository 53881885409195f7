"""The text of an answer that comes token by token."""

from persyn_jax.models.tokenizer import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows for half a character


class AnswerText:
    """Turns tokens into text as soon as it is final, and notices stop texts.

    Half a character, and what may be the beginning of a stop text, are held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        # Text is known up to token `_known`. Decoding begins at `_begin`, a little before that,
        # since some decoders treat the first token of what they get differently.
        self._begin = self._known = 0
        self._held = ""
        self.stopped = False
        """Whether a stop text has come; the text before it has been handed out."""

    def push(self, token: int) -> str:
        """Adds a token. Returns the text that is final now."""
        self._tokens.append(token)
        new = self._new_text()
        if not new or new.endswith(_BROKEN):
            return ""
        self._begin, self._known = self._known, len(self._tokens)
        return self._settled(new)

    def finish(self) -> str:
        """The rest of the text when no token comes any more."""
        rest = self._settled(self._new_text())
        held, self._held = self._held, ""
        return rest + held

    def _new_text(self) -> str:
        known = self._decode(self._tokens[self._begin : self._known])
        return self._decode(self._tokens[self._begin :])[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _settled(self, new: str) -> str:
        self._held += new
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        keep = len(self._held) - min(found) if found else _overlap(self._held, self._stop)
        end = len(self._held) - keep
        final, self._held = self._held[:end], "" if found else self._held[end:]
        return final


def _overlap(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` with which some stop text begins."""
    longest = max((len(s) for s in stop), default=1) - 1
    return next(
        (
            n
            for n in range(min(longest, len(text)), 0, -1)
            if any(s.startswith(text[-n:]) for s in stop)
        ),
        0,
    )
