"""What requests bring, as token ids: one thread, so that the event loop never waits for it."""

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from persyn_jax.config import ConfigError
from persyn_jax.models import tokenizer as tokenizers
from persyn_jax.models.tokenizer import Tokenizer
from persyn_jax.sampling.openai_replies import Prompt
from persyn_jax.sampling.protocol import ChatMessage, RequestError
from persyn_jax.sampling.templates import TemplateRenderer

T = TypeVar("T")


class PromptReader:
    """Turns messages and texts into tokens and back.

    Its methods raise RequestError for what can never be a prompt, and for more characters than
    `context` tokens could have, which are not tokenised at all.
    """

    def __init__(self, tokenizer: Tokenizer, context: int):
        # The engine's thread uses the other one; a tokenizer has a state that both would change.
        self.tokenizer = copy.deepcopy(tokenizer)
        self.context = context
        self._max_characters = context * max(len(token) for token in tokenizer.get_vocab())
        self._renderer = TemplateRenderer(self.tokenizer)
        self._pool = ThreadPoolExecutor(1, "tokenizer")
        self._pool.submit(self._renderer.start)

    async def off_loop(self, work: Callable[[], T]) -> T:
        """Does the work in the reader's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def chat(self, messages: Sequence[ChatMessage]) -> Prompt:
        """The conversation through the chat template."""
        plain = [message.plain for message in messages]
        self._check_length("messages", sum(len(message["content"]) for message in plain))
        try:
            ids = await self.off_loop(
                lambda: tokenizers.prompt_ids(self.tokenizer, plain, self._renderer.render)
            )
        except ConfigError as error:
            raise RequestError(400, f"messages: {error}", "messages") from None
        return Prompt(tuple(ids))

    async def prompts(
        self, given: Sequence[str | list[int]], special: bool, echo: bool
    ) -> list[Prompt]:
        """Texts and token ids. special: whether a text gets the tokenizer's BOS."""
        for prompt in given:
            if isinstance(prompt, str):
                self._check_length("prompt", len(prompt))
            elif len(prompt) > self.context:
                raise _too_long("prompt", f"{len(prompt)} tokens", self.context)
        return await self.off_loop(lambda: [self._prompt(g, special, echo) for g in given])

    async def text_tokens(self, text: str, special: bool) -> tuple[int, ...]:
        """The token ids of a text. special: whether it gets the tokenizer's BOS."""
        (prompt,) = await self.prompts([text], special, echo=False)
        return prompt.tokens

    async def token_text(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        self.check_ids("tokens", tokens)
        return await self.off_loop(lambda: self._decode(tokens))

    def check_ids(self, field: str, tokens: Sequence[int]) -> None:
        """Raises RequestError for ids that the tokenizer does not have."""
        if tokens and max(tokens) >= len(self.tokenizer):
            message = f"{field}: token ids must be from 0 to {len(self.tokenizer) - 1}"
            raise RequestError(400, message, field)

    def _check_length(self, field: str, characters: int) -> None:
        if characters > self._max_characters:
            raise _too_long(field, f"{characters} characters", self.context)

    def _prompt(self, given: str | list[int], special: bool, echo: bool) -> Prompt:
        if not isinstance(given, str):
            return Prompt(tuple(given), self._decode(given) if echo else "")
        ids = self.tokenizer(given, add_special_tokens=special)["input_ids"]
        bos = self.tokenizer.bos_token
        added = special and bos and ids[:1] == [self.tokenizer.bos_token_id]
        hidden = len(bos) if added and not given.startswith(bos) else 0
        return Prompt(tuple(ids), given, hidden)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def close(self) -> None:
        """Ends the thread and the process for templates."""
        self._pool.submit(self._renderer.close)
        self._pool.shutdown()


def _too_long(field: str, what: str, context: int) -> RequestError:
    message = f"context too long: {what} exceed the context length of {context}"
    return RequestError(400, f"{field}: {message}", field)
