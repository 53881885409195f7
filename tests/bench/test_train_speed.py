"""The timing takes the student's own steps; its values are for scripts, never for tests."""

import sys
from pathlib import Path

import numpy as np
import pytest

from persyn_jax.bench import train_speed as speed
from persyn_jax.bench.peer import Peer
from persyn_jax.models import weights
from persyn_jax.models.spec import ModelConfig

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_speed.py"
SMALL = speed.TrainSpeedConfig(
    model=ModelConfig(weights="random:tiny"), turns=3, rows=2, row_tokens=8
)
# Says that step n had loss n, took a second for six tokens, and that its process holds n GB.
PEER = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for number, line in enumerate(sys.stdin):
    assert json.loads(line)["kind"] == "train"
    found = {"seconds": 1.0, "tokens": 6, "loss": number, "peak_memory_gb": number}
    print(json.dumps(found), flush=True)
"""


def test_each_turn_has_rows_of_its_own_and_everybody_gets_the_same():
    first, again, other = (speed.make_rows(SMALL, 100, turn) for turn in (0, 0, 1))
    assert first == again != other
    assert np.shape(first) == (2, 8)


def test_workers_take_the_students_step_on_the_rows(tmp_path):
    """The first loss is that of the model before it learns, however many workers share the rows."""
    model = weights.load(SMALL.model)
    weights.save_folder(tmp_path, model)
    words = ["rows=2", "row_tokens=8", "turns=3", "--serve", str(tmp_path)]
    contender = speed.Contender(2, True)
    command = [sys.executable, str(SCRIPT), *words, "--workers", "2", "--exchange"]
    peer = Peer(contender.name, command)
    try:
        (row,) = speed.measure(SMALL, model.config.vocab_size, [peer])
    finally:
        peer.close()
    assert row.contender == "persyn_jax, M = 2, gossip every step"
    assert len(row.all_tokens_per_second) == 2
    expected = _mean_loss(model, speed.make_rows(SMALL, model.config.vocab_size, 0))
    assert row.first_loss == pytest.approx(expected, abs=1e-5)


def _mean_loss(model, rows) -> float:
    """By plain NumPy from the logits of whole rows."""
    from persyn_jax.models import decoder

    tokens = np.array(rows, np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    segments = np.ones(tokens.shape, np.int32)
    hidden, _ = decoder.hidden_states(
        model.config, model.params, tokens, positions, decoder.attend_causally(segments)
    )
    logits = np.asarray(decoder.logits(model.config, model.params, hidden), np.float64)[:, :-1]
    chosen = np.take_along_axis(logits, tokens[:, 1:, None], axis=2)[:, :, 0]
    return float((np.log(np.exp(logits).sum(axis=2)) - chosen).mean())


def test_ratios_are_gossip_against_none_and_one_worker_against_the_others():
    rows = [
        speed.Row(name, rate, memory, 0.0, [rate])
        for name, rate, memory in (
            ("a", 90.0, 3.0),
            ("b", 80.0, 6.0),
            ("c", 60.0, 6.6),
            ("t", 45.0, 4.0),
        )
    ]
    assert [
        (r.contender, r.reference, r.speed, round(r.memory, 3)) for r in speed.ratios(rows)
    ] == [
        ("c", "b", 0.75, 1.1),
        ("a", "t", 2.0, 0.75),
    ]


def test_peers_are_compared_by_medians_without_the_first_turn():
    peer = Peer("fixed", [sys.executable, "-c", PEER])
    try:
        (row,) = speed.measure(SMALL, 100, [peer])
    finally:
        peer.close()
    assert row == speed.Row("fixed", 6.0, 2, 0, [6.0, 6.0])
