"""The run's prompts, and whether everything that will be made of them has room."""

from collections.abc import Sequence

from persyn_jax.config import ConfigError
from persyn_jax.evaluation.sources import load_prompts
from persyn_jax.models import tokenizer, weights
from persyn_jax.models.rows import Conversation
from persyn_jax.pipeline.config import RunConfig
from persyn_jax.records import Answer, Prompt
from persyn_jax.sampling.config import teacher_messages
from persyn_jax.training.config import TrainConfig


def make_prompts(config: RunConfig) -> list[Prompt]:
    """The prompts: the same for the same config, none of them a teacher's worked example.

    Raises ConfigError: as `load_prompts`, and for the first prompt that is too long for the
    service, for a training row, or for the evaluation.
    """
    worked = [example.question for teacher in config.teachers for example in teacher.examples]
    prompts = load_prompts(config.sources, config.run.seed, exclude=worked)
    student = weights.load_tokenizer(config.student)
    _check_evaluation(config, student, [prompt for prompt in prompts if prompt.split == "eval"])
    routed = [prompt for prompt in prompts if prompt.split != "eval"]
    _check_rows(config, student, routed)
    _check_service(config, routed)
    return prompts


def examined(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The eval prompts that have a reference answer. Raises ConfigError where there is none."""
    found = [prompt for prompt in prompts if prompt.split == "eval" and prompt.answer is not None]
    if not found:
        raise ConfigError("sources: no eval prompt has a reference answer to score the student by")
    return found


def _check_evaluation(
    config: RunConfig, student: tokenizer.Tokenizer, prompts: Sequence[Prompt]
) -> None:
    engine, answer = config.evaluation.engine, config.evaluation.max_tokens
    for prompt in prompts:
        read = len(tokenizer.prompt_ids(student, prompt.messages))
        if read + answer > engine.cache_length:
            raise _too_long(
                prompt,
                read,
                f"evaluation.max_tokens {answer}",
                f"evaluation.engine.cache_length {engine.cache_length}",
            )


def _check_rows(config: RunConfig, student: tokenizer.Tokenizer, prompts: Sequence[Prompt]) -> None:
    """Answers are counted in the teachers' tokens here; `check_answers` has the student's."""
    asked = [teacher for teacher in config.teachers if teacher.answers is None]
    answer = max((teacher.sampling.max_tokens for teacher in asked), default=0)
    if answer > config.training.row_response_tokens:
        raise ConfigError(
            f"training.row_response_tokens {config.training.row_response_tokens}: must be at least "
            f"the teachers' largest max_tokens, {answer}"
        )
    for prompt in prompts:
        read = len(tokenizer.prompt_ids(student, prompt.messages))
        if read + answer > config.training.row_tokens:
            raise _too_long(
                prompt,
                read,
                f"the teachers' largest max_tokens {answer}",
                f"training.row_tokens {config.training.row_tokens}",
            )


def _check_service(config: RunConfig, prompts: Sequence[Prompt]) -> None:
    """Each teacher of the own service, with all that it says before each prompt."""
    if config.service is None:
        return
    tok, room = weights.load_tokenizer(config.service.model), config.service.engine.cache_length
    for teacher in config.teachers:
        if not teacher.needs_service:
            continue
        for prompt in prompts:
            read = len(tokenizer.prompt_ids(tok, teacher_messages(teacher, prompt.messages)))
            if read + teacher.sampling.max_tokens > room:
                raise _too_long(
                    prompt,
                    read,
                    f"max_tokens {teacher.sampling.max_tokens} of teacher {teacher.name!r}",
                    f"service.engine.cache_length {room}",
                )


def _too_long(prompt: Prompt, read: int, answer: str, room: str) -> ConfigError:
    return ConfigError(
        f"context too long: prompt {prompt.id!r} has {read} tokens; with {answer} it exceeds {room}"
    )


def check_answers(
    answers: Sequence[Answer], conversations: Sequence[Conversation], config: TrainConfig
) -> None:
    """Raises ConfigError for the first answer whose conversation no training row has room for."""
    for answer, conversation in zip(answers, conversations, strict=True):
        response = len(conversation.response)
        if conversation.length > config.row_tokens or response > config.row_response_tokens:
            raise ConfigError(
                f"training.row_tokens {config.row_tokens} and row_response_tokens "
                f"{config.row_response_tokens}: no room for prompt {answer.prompt_id!r} with the "
                f"answer of teacher {answer.teacher!r}: {conversation.length} tokens, {response} "
                "of them response"
            )
