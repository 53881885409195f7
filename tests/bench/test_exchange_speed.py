"""The timings time what they say; their values are for scripts, never for tests."""

import jax
import numpy as np
import pytest

from persyn_jax.bench import exchange_speed as speed

SMALL = speed.SpeedConfig(
    layers=1, turns=2, workers=2, bank_workers=8, simulated_workers=2, simulated_batch=1
)


def test_the_shapes_are_those_of_the_language_model():
    shapes = speed.language_model_shapes(layers=30)
    leaves = jax.tree.leaves(shapes, is_leaf=lambda node: isinstance(node, tuple))
    assert sum(int(np.prod(shape)) for shape in leaves) == 134_515_008


def test_contenders_take_turns_and_the_first_does_not_count(monkeypatch):
    clock = iter([0, 100, 0, 100, 0, 1, 0, 3, 0, 1, 0, 5])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    order = []
    found = speed.against(
        "ours",
        lambda t: order.append(("ours", t)),
        "least",
        lambda t: order.append(("least", t)),
        3,
    )
    assert order == [(who, turn) for turn in range(3) for who in ("least", "ours")]
    assert (found.seconds, found.reference_seconds, found.ratio) == (4, 1, 4)


@pytest.mark.parametrize("measure", [speed.simulator, speed.bank_on_devices])
def test_a_small_one_runs(measure, monkeypatch):
    monkeypatch.setattr(
        speed, "language_model_shapes", lambda layers: {"embed": (64, 8), "layers": [{"q": (8, 8)}]}
    )
    found = measure(SMALL)
    assert found.ratio == pytest.approx(found.seconds / found.reference_seconds)
    assert speed.bank_compile_seconds(2) > 0
