"""The replay check finds nothing in the engine, and finds what is put there."""

import dataclasses

from persyn_jax.bench import replay_check
from persyn_jax.models import weights
from persyn_jax.models.spec import ModelConfig
from persyn_jax.sampling.config import EngineConfig
from persyn_jax.sampling.engine import Engine

CONFIG = replay_check.ReplayConfig(
    model=ModelConfig(weights="random:tiny"),
    engine=EngineConfig(
        slots=8, cache_length=128, prefill_rows=4, prefill_chunk=16, prefix_blocks=8, score_rows=0
    ),
    requests=12,
    new_tokens=6,
    orders=2,
    alone=2,
)


def test_a_sound_engine_changes_nothing():
    found = list(replay_check.replay(CONFIG, weights.load(CONFIG.model)))
    assert [(f.answers, f.changed) for f in found] == [(12, 0), (12, 0), (2, 0)]
    assert found[0].reused_tokens > 0


def test_an_answer_that_depends_on_its_arrival_is_found(monkeypatch):
    submit = Engine.submit

    def by_ticket(engine, request):
        return submit(engine, dataclasses.replace(request, seed=engine._tickets))

    monkeypatch.setattr(Engine, "submit", by_ticket)
    found = list(replay_check.replay(CONFIG, weights.load(CONFIG.model)))
    assert all(f.changed > 0 for f in found[:2])
