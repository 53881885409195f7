"""The timing takes the student's own steps; its values are for scripts, never for tests."""

import dataclasses
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
# Says that step n had loss n, took n seconds for six tokens, and that its process holds n GB.
PEER = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for number, line in enumerate(sys.stdin):
    assert json.loads(line)["kind"] == "train"
    found = {"seconds": number, "tokens": 6, "loss": number, "peak_memory_gb": number}
    print(json.dumps(found), flush=True)
"""


def test_each_step_has_rows_of_its_own_and_everybody_gets_the_same():
    places = ((0, 0), (0, 0), (1, 0), (0, 1))
    first, again, *others = (speed.make_rows(SMALL, 100, *place) for place in places)
    assert first == again not in others
    assert others[0] != others[1]
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
    expected = _mean_loss(model, speed.make_rows(SMALL, model.config.vocab_size, 0, 0))
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


def test_a_ratio_is_ours_over_theirs():
    mine, theirs = (speed.Row(*row, 0.0, []) for row in (("a", 90.0, 3.0), ("t", 45.0, 4.0)))
    assert speed.ratio(mine, theirs) == speed.Ratio("a", "t", 2.0, 0.75)


def test_the_first_turn_and_each_turns_first_step_do_not_count():
    """Step n of the peer took n seconds: of three turns of three steps, 4 to 5 and 7 to 8 count."""
    peer = Peer("fixed", [sys.executable, "-c", PEER])
    config = dataclasses.replace(SMALL, steps=3)
    try:
        (row,) = speed.measure(config, 100, [peer])
    finally:
        peer.close()
    rates = [12 / 9, 12 / 15]
    assert row == speed.Row("fixed", pytest.approx(sum(rates) / 2), 8, 0, rates)
