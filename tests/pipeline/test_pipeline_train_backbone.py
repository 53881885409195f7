"""A router whose backbone learns: it finds what a frozen one cannot see, and comes back whole."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_pipeline_train_router import TEACHERS, make_prompt, make_rewards, training

from persyn_jax.mesh import make_mesh
from persyn_jax.models import adapters, router, weights
from persyn_jax.models.spec import ModelConfig
from persyn_jax.pipeline import train_backbone
from persyn_jax.pipeline.route import route
from persyn_jax.pipeline.train_backbone import deal
from persyn_jax.pipeline.train_router import Lessons, train_router
from persyn_jax.routing.preferences import Preferences
from persyn_jax.sampling.scoring import pooled_states
from persyn_jax.training.config import GossipConfig, LoraConfig, OptimiserConfig

TINY = ModelConfig(weights="random:tiny")
BACKBONE = weights.load(TINY)
PROMPTS = 150
LORA = LoraConfig(rank=8, alpha=16)


def planted():
    """(tokens, totals [N, M]): which teacher is best is told by the third last of random tokens."""
    draw = np.random.default_rng(0)
    tokens = [
        tuple(draw.integers(3, 250, draw.integers(6, 50)).tolist()) + (1, 2) for _ in range(PROMPTS)
    ]
    best_N = np.array([row[-3] % 4 for row in tokens])
    return tokens, np.eye(4)[best_N]


def run(lora, steps, mean=None):
    tokens, total_NM = planted()
    config = training(
        steps=steps,
        pairs=16,
        lora=lora,
        optimiser=OptimiserConfig(learning_rate=3e-2),
        backbone_optimiser=OptimiserConfig(learning_rate=1e-2),
    )
    prompts = [make_prompt(f"p{n}") for n in range(PROMPTS)]
    rows = []
    trained, metrics = train_backbone.train_backbone(
        prompts,
        make_rewards(prompts, total_NM),
        TEACHERS,
        BACKBONE,
        tokens,
        config,
        make_mesh(2),
        rows.append,
    )
    return trained, metrics, rows


if __name__ == "__main__":
    import time
    tokens, total_NM = planted()
    prompts = [make_prompt(f"p{n}") for n in range(PROMPTS)]
    state = pooled_states(BACKBONE, tokens, make_mesh(2))
    for lr in (0.03, 0.3):
        rows = []
        _, m = train_router(prompts, make_rewards(prompts, total_NM), TEACHERS, state, training(steps=200, optimiser=OptimiserConfig(learning_rate=lr)), make_mesh(2), rows.append)
        print("frozen", lr, m["hit_at_1"], rows[-1], m["regret"]["router"], m["regret"]["best_constant"])
    for lora in (LORA, None):
        t = time.time()
        _, m, rows = run(lora, 120)
        print(lora, m["hit_at_1"], [r["loss"] for r in rows][::3], rows[-1], m["regret"]["router"], m["regret"]["best_constant"], time.time() - t)
