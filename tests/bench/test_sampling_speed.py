"""The timings time what they say; their values are for scripts, never for tests."""

import sys

import pytest

from persyn_jax.bench import sampling_speed as speed
from persyn_jax.bench.peer import Peer
from persyn_jax.models import weights
from persyn_jax.models.spec import ModelConfig

SMALL = speed.SpeedConfig(
    model=ModelConfig(weights="random:tiny"),
    turns=3,
    batches=(1, 3),
    prompt_tokens=5,
    new_tokens=4,
    score_rows=2,
    score_tokens=6,
    requests=0,
)
# Says that it took a second a task and made a token a prompt.
PEER = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    assert task["kind"] in ("generate", "score")
    print(json.dumps({"seconds": 1.0, "tokens": len(task["prompts"])}), flush=True)
"""


def test_each_turn_has_prompts_of_its_own_and_everybody_gets_the_same():
    first, again, other = (speed.make_tasks(SMALL, 100, turn) for turn in (0, 0, 1))
    assert first == again
    assert all(a.prompts != b.prompts for a, b in zip(first, other, strict=True))
    assert [(t.kind, len(t.prompts), sum(t.new_tokens)) for t in first] == [
        ("generate", 1, 4),
        ("generate", 3, 12),
        ("score", 2, 0),
    ]


def test_the_mixed_task_is_one_task_asked_in_three_ways():
    config = speed.SpeedConfig(model=SMALL.model, requests=64)
    mixed = [t for t in speed.make_tasks(config, 1000, 0) if t.kind in ("engine", "http", "stream")]
    assert [task.kind for task in mixed] == ["engine", "http", "stream"]
    assert len({str(task.prompts) + str(task.new_tokens) for task in mixed}) == 1
    lengths = [len(prompt) for prompt in mixed[0].prompts]
    assert (min(lengths) >= 16, max(lengths) <= 256) == (True, True)
    longest = max(a + b for a, b in zip(lengths, mixed[0].new_tokens, strict=True))
    assert longest <= speed.mixed_engine(config).cache_length


def test_a_peer_is_compared_by_medians_without_the_first_turn():
    peer = Peer("fixed", [sys.executable, "-c", PEER])
    try:
        rows = list(speed.measure(SMALL, weights.load(SMALL.model), [peer]))
    finally:
        peer.close()
    assert [[row.contender for row in task] for task in rows] == [["persyn_jax", "fixed"]] * 3
    for (ours, theirs), prompts in zip(rows, (1, 3, 2), strict=True):
        assert theirs.all_tokens_per_second == [prompts] * 2
        assert len(ours.all_tokens_per_second) == 2
        assert theirs.ratio == pytest.approx(ours.tokens_per_second / prompts)
        assert ours.ratio is None


def test_a_peer_that_ends_is_named():
    with pytest.raises(RuntimeError, match="peer 'gone' ended with status 3"):
        Peer("gone", [sys.executable, "-c", "raise SystemExit(3)"])
