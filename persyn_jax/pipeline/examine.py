"""One student on the eval prompts: what it answers, and how likely it holds the reference answers.

The likelihoods tell students apart that are too weak, or too few items, for right and wrong to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jax.sharding import Mesh

from persyn_jax.evaluation.verifiers import Case, verify
from persyn_jax.models import tokenizer
from persyn_jax.models.rows import Conversation
from persyn_jax.models.weights import Model
from persyn_jax.pipeline import prompts as pipeline_prompts
from persyn_jax.records import Prompt
from persyn_jax.sampling.config import EngineConfig
from persyn_jax.sampling.engine import Engine, Request
from persyn_jax.sampling.scoring import mean_log_likelihoods


@dataclass(frozen=True)
class Examination:
    """One eval prompt and one student."""

    prompt_id: str
    source: str
    text: str
    """The greedy answer."""
    finish_reason: str
    score: float
    """Verifier's score in [0, 1]."""
    reference_log_likelihood: float
    """Mean log-likelihood of a token of the reference answer, EOS included, in nats."""


def examine(
    prompts: Sequence[Prompt], student: Model, max_tokens: int, config: EngineConfig, mesh: Mesh
) -> list[Examination]:
    """The student on the eval prompts that have a reference answer, in their order.

    Raises ConfigError where there is none.
    """
    examined = pipeline_prompts.examined(prompts)
    tok = student.tokenizer
    asked = [tuple(tokenizer.prompt_ids(tok, prompt.messages)) for prompt in examined]
    references = [
        Conversation(ids, tuple(tokenizer.response_ids(tok, prompt.answer or "", ended=True)))
        for ids, prompt in zip(asked, examined, strict=True)
    ]
    likelihoods = mean_log_likelihoods(student, references, mesh)
    engine = Engine(student, replace(config, score_rows=0))  # nothing is scored there
    completions = engine.generate([Request(ids, max_tokens) for ids in asked])
    verified = verify(
        [
            Case(prompt.verifier, completion.text, prompt.answer or "")
            for prompt, completion in zip(examined, completions, strict=True)
        ]
    )
    return [
        Examination(
            prompt_id=prompt.id,
            source=prompt.source,
            text=completion.text,
            finish_reason=completion.finish_reason,
            score=score,
            reference_log_likelihood=float(likelihood),
        )
        for prompt, completion, score, likelihood in zip(
            examined, completions, verified.scores, likelihoods, strict=True
        )
    ]
