"""Records to token rows: the student's or the router's view of prompts and answers."""

from collections.abc import Sequence

from persyn_jax.models import tokenizer
from persyn_jax.models.rows import Conversation
from persyn_jax.records import Answer, Prompt


def conversation(tok: tokenizer.Tokenizer, prompt: Prompt, answer: Answer) -> Conversation:
    """The prompt through the chat template, and the answer with EOS where the teacher ended it."""
    return Conversation(
        prompt=tuple(tokenizer.prompt_ids(tok, prompt.messages)),
        response=tuple(
            tokenizer.response_ids(tok, answer.text, ended=answer.finish_reason == "stop")
        ),
    )


def conversations(
    tok: tokenizer.Tokenizer, prompts: Sequence[Prompt], answers: Sequence[Answer]
) -> list[Conversation]:
    """One conversation an answer."""
    prompt_of = {prompt.id: prompt for prompt in prompts}
    return [conversation(tok, prompt_of[answer.prompt_id], answer) for answer in answers]
