"""One student on the eval prompts."""

import pytest

from persyn_jax import mesh as meshes
from persyn_jax.config import ConfigError
from persyn_jax.evaluation.verifiers import Case, verify
from persyn_jax.models.spec import ModelConfig
from persyn_jax.models.weights import load
from persyn_jax.pipeline.examine import examine
from persyn_jax.records import Prompt
from persyn_jax.sampling.config import EngineConfig

ENGINE = EngineConfig(
    slots=2, cache_length=128, prefill_rows=2, prefill_chunk=32, prefix_blocks=2, score_rows=0
)


def make_prompt(verifier: str, answer: str | None) -> Prompt:
    return Prompt(
        id=verifier,
        messages=[{"role": "user", "content": "What is 3 + 4?"}],
        source="s",
        split="eval",
        answer=answer,
        verifier=verifier,
        source_licence="CC0-1.0",
    )


def examined(prompts):
    student = load(ModelConfig(weights="random:tiny"))
    return examine(prompts, student, 4, ENGINE, meshes.make_mesh(1))


def test_every_verifier_can_judge_math_too():
    prompts = [make_prompt("exact_match", "7"), make_prompt("math", "7")]
    found = examined(prompts)
    cases = [Case(p.verifier, e.text, "7") for p, e in zip(prompts, found, strict=True)]
    assert [e.score for e in found] == verify(cases).scores
    assert [e.prompt_id for e in found] == ["exact_match", "math"]
    assert all(e.reference_log_likelihood < 0 for e in found)


def test_without_a_reference_there_is_nothing_to_examine():
    with pytest.raises(ConfigError, match="no eval prompt has a reference answer"):
        examined([make_prompt("exact_match", None)])
