"""When two prompts ask the same: their content, which letter case and white space do not change."""

import unicodedata
from collections.abc import Iterable

from persyn_jax.records import Message


def user_content(messages: Iterable[Message]) -> str:
    """What the user says in all turns: another system prompt does not make another question."""
    return normalise("\n".join(m["content"] for m in messages if m["role"] == "user"))


def normalise(text: str) -> str:
    """Unicode NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
