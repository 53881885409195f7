"""Stage evaluate: the student answers the eval prompts greedily, before and after training."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from persyn_jax.evaluation.verifiers import Case, verify
from persyn_jax.models import tokenizer
from persyn_jax.models.weights import Model
from persyn_jax.pipeline import prompts as pipeline_prompts
from persyn_jax.records import Prompt, Score
from persyn_jax.sampling.config import EngineConfig
from persyn_jax.sampling.engine import Engine, Request


def evaluate(
    prompts: Sequence[Prompt],
    load_before: Callable[[], Model],
    load_after: Callable[[], Model],
    max_tokens: int,
    config: EngineConfig,
) -> list[Score]:
    """Scores of both models on the eval prompts that have a reference answer.

    Each model is loaded when its turn comes, so that one is in memory at a time; they have one
    shape. Raises ConfigError where no prompt has one.
    """
    examined = pipeline_prompts.examined(prompts)
    before = load_before()
    requests = [
        Request(tuple(tokenizer.prompt_ids(before.tokenizer, prompt.messages)), max_tokens)
        for prompt in examined
    ]
    engine = Engine(before, replace(config, score_rows=0))  # nothing is scored here
    del before
    scores = _scores("before", examined, requests, engine)
    engine.load_params(load_after().params)
    return scores + _scores("after", examined, requests, engine)


def _scores(
    name: str, prompts: Sequence[Prompt], requests: list[Request], engine: Engine
) -> list[Score]:
    completions = engine.generate(requests)
    verified = verify(
        [
            Case(prompt.verifier, completion.text, prompt.answer or "")
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    )
    return [
        Score(
            prompt_id=prompt.id,
            source=prompt.source,
            model=name,
            text=completion.text,
            finish_reason=completion.finish_reason,
            score=score,
        )
        for prompt, completion, score in zip(prompts, completions, verified.scores, strict=True)
    ]
