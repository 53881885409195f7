"""All that a report is made from."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from persyn_jax.records import Answer, Example, Prompt, Reward, Route, Score
from persyn_jax.routing.learnability import MetricName
from persyn_jax.routing.strategies import StrategyConfig


@dataclass(frozen=True)
class RunRecords:
    """Everything that the stages of a run wrote, and nothing measured anew."""

    run: dict[str, Any]
    """name, seed, version, config_fingerprint, platform, workers, student_model."""
    teachers: dict[str, str]
    """Licence by teacher, in the order of the config (which is that of a route's coefficients)."""
    prompts: list[Prompt]
    calibration_answers: list[Answer]
    """Every teacher's answer to every calibration prompt."""
    rewards: list[Reward]
    """One for each calibration answer."""
    routes: list[Route]
    """The router's word on each train prompt; on calibration prompts too, if it was asked."""
    chosen_answers: list[Answer]
    """The chosen teacher's answer to each calibration and train prompt."""
    examples: list[Example]
    """What the student was trained on or held out of its training: the usable chosen answers."""
    scores: list[Score]
    """Each eval prompt once `before`, once `after`."""
    router: dict[str, Any]
    """The metrics of `routing.verdict`, with `trained_on`, `pairs` and `held_out_prompts`."""
    training_metrics: list[dict[str, Any]]
    """The rows of metrics.jsonl of the stage train_student, one a round."""
    gossip: dict[str, Any]
    """exchange_probability, compiled_programs."""
    stages: dict[str, dict[str, Any]]
    """By stage: seconds, and whatever else was timed."""
    quality: str
    """What measured quality: `verifier`, `reward_model`, `likelihood` or `judge`."""
    learnability: MetricName
    """Its metric, by name: see `routing.learnability`."""
    alpha: float
    """Weight of learnability in the totals."""
    strategies: StrategyConfig
    """What the strategies beside the router leave open."""
    state_ND: np.ndarray
    """float32: the router backbone's pooled state of each calibration prompt, in their order."""
    gain_audit: dict[str, Any] | None
    """As `pipeline.gain_audit` found it; None where it was not run."""
    benchmarks: dict[str, Any] | None
    """By task, as `pipeline.benchmark_scores` sums them up; None where none was run."""
