"""Records to token ids: the student's or the router's view of prompts and answers."""

from collections.abc import Sequence

from persyn_jax.models import tokenizer
from persyn_jax.models.rows import Conversation
from persyn_jax.records import Answer, Prompt


def prompt_tokens(tok: tokenizer.Tokenizer, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """Each prompt through the chat template: what a router's backbone reads."""
    return [tuple(tokenizer.prompt_ids(tok, prompt.messages)) for prompt in prompts]


def conversations(
    tok: tokenizer.Tokenizer, prompts: Sequence[Prompt], answers: Sequence[Answer]
) -> list[Conversation]:
    """One conversation an answer; EOS is part of it where the teacher ended it."""
    prompt_of = {prompt.id: prompt for prompt in prompts}
    tokens = prompt_tokens(tok, [prompt_of[answer.prompt_id] for answer in answers])
    return [
        Conversation(
            prompt=prompt,
            response=tuple(
                tokenizer.response_ids(tok, answer.text, ended=answer.finish_reason == "stop")
            ),
        )
        for prompt, answer in zip(tokens, answers, strict=True)
    ]
