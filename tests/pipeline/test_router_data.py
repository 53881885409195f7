"""Votes and scores of others become rewards that a router is trained on."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from persyn_jax import store
from persyn_jax.config import ConfigError
from persyn_jax.mesh import make_mesh
from persyn_jax.models.router import coefficients
from persyn_jax.pipeline.router_data import (
    config_lines,
    read_llmrouterbench,
    read_p2l,
    read_routerbench,
    to_records,
    write_run,
)
from persyn_jax.pipeline.run_files import PROMPTS, REWARDS
from persyn_jax.pipeline.train_router import RouterTraining, train_router
from persyn_jax.records import Prompt, Reward
from persyn_jax.training.config import GossipConfig, OptimiserConfig


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def qualities(rewards) -> dict[tuple[str, str], float]:
    return {(reward.prompt_id, reward.teacher): reward.quality for reward in rewards}


# The sorted list of models is [ant, bee, cat].
VOTES = [
    {"prompt": "One?", "model_a": "cat", "model_b": "ant", "labels": [2, 0, 0]},
    {"prompt": ["Two?", "Sure?"], "model_a": "ant", "model_b": "bee", "labels": [0, 1, 1]},
    {"prompt": "one?", "model_a": "ant", "model_b": "bee", "labels": [0, 1]},
    {"prompt": "Three?", "model_a": "bee", "model_b": "cat", "labels": [2, 1, 2]},
]


def test_a_vote_is_two_scores_and_votes_on_one_prompt_are_averaged(tmp_path):
    prompts, rewards = to_records(read_p2l([write(tmp_path / "votes.jsonl", VOTES)]))
    assert [[m["content"] for m in p.messages] for p in prompts] == [
        ["One?"],
        ["Two?", "Sure?"],
        ["Three?"],
    ]
    one, two, three = (prompt.id for prompt in prompts)
    assert qualities(rewards) == {
        (one, "cat"): 1.0,
        (one, "ant"): 0.5,  # lost to cat, beat bee
        (one, "bee"): 0.0,
        (two, "ant"): 0.5,
        (two, "bee"): 0.5,
        (three, "cat"): 0.0,
        (three, "bee"): 0.0,
    }
    totals = [reward.total for reward in rewards if reward.prompt_id == one]
    assert totals == pytest.approx([1.5**0.5, 0, -(1.5**0.5)])  # z-scores of 1, 0.5, 0
    assert {reward.total for reward in rewards if reward.prompt_id != one} == {0.0}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"labels": [0, 1, 0]}, "labels .*: not the places of cat and ant in the sorted list"),
        ({"labels": [0, 9]}, "not the places of"),
        ({"labels": [2, 0, 3]}, "must be winner, loser and 0, 1 or 2"),
        ({"labels": "2"}, "labels must be a list of whole numbers, got '2'"),
        ({"model_a": None}, "model_a and model_b must be texts"),
        ({"prompt": []}, "prompt must be a text, or a list of texts, and not empty"),
    ],
)
def test_a_wrong_vote_is_named(tmp_path, change, complaint):
    path = write(tmp_path / "votes.jsonl", [VOTES[0] | change, *VOTES[1:]])
    with pytest.raises(ConfigError, match=f"votes.jsonl:1: .*{complaint}"):
        list(read_p2l([path]))


def test_routerbench_rows(tmp_path):
    row = {"sample_id": "grade-school-math.0", "eval_name": "gsm", "oracle_model_to_route_to": "x"}
    row |= {"m/a": 1.0, "m/a|total_cost": 0.1, "m/a|model_response": "['4']"}
    row |= {"b": 0.25, "b|total_cost": 0.2, "b|model_response": "['5']"}
    row |= {"c": None, "c|total_cost": 0.2}
    rows = [row | {"prompt": "['Be exact.', '2 + 2?']"}, row | {"prompt": "plain", "c": 0.5}]
    prompts, rewards = to_records(read_routerbench([write(tmp_path / "rb.parquet", rows)]))
    assert [(p.id, p.source, p.messages[0]["content"]) for p in prompts] == [
        ("gsm-000000", "gsm", "Be exact.\n\n2 + 2?"),
        ("gsm-000001", "gsm", "plain"),
    ]
    assert qualities(rewards) == {
        ("gsm-000000", "m/a"): 1.0,
        ("gsm-000000", "b"): 0.25,
        ("gsm-000001", "m/a"): 1.0,
        ("gsm-000001", "b"): 0.25,
        ("gsm-000001", "c"): 0.5,
    }
    with pytest.raises(ConfigError, match=r"has no column that ends in \|total_cost"):
        list(read_routerbench([write(tmp_path / "no.jsonl", [{"prompt": "a", "b": 1}])]))


def result(path, scores, **names):
    records = [
        {"index": n, "origin_query": f"Q{n}", "prompt": f"Answer: Q{n}", "score": score}
        for n, score in enumerate(scores)
    ]
    return write(path, [{"performance": 0.5, **names, "records": records}])


def test_llmrouterbench_results(tmp_path):
    named = result(tmp_path / "a.json", [1, 0], model_name="a", dataset_name="aime")
    by_folder = result(tmp_path / "aime" / "test" / "b" / "1.json", [0, None])
    trial = result(tmp_path / "c.json", [1], model_name="c", dataset_name="aime", demo=True)
    prompts, rewards = to_records(read_llmrouterbench([named, by_folder, trial]))
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["Q0", "Q1"]
    assert qualities(rewards) == {
        ("aime-000000", "a"): 1,
        ("aime-000000", "b"): 0,
        ("aime-000001", "a"): 0,
    }
    with pytest.raises(ConfigError, match="must hold an object with a list of `records`"):
        list(read_llmrouterbench([write(tmp_path / "d.json", [{"records": 1}])]))


def test_a_run_folder_is_made_once_and_the_config_lines_name_it(tmp_path):
    prompts, rewards = to_records(read_p2l([write(tmp_path / "votes.jsonl", VOTES)]))
    folder = tmp_path / "runs" / "votes"
    write_run(folder, prompts, rewards)
    assert store.read_records(folder / PROMPTS, Prompt) == prompts
    kept = store.read_records(folder / REWARDS, Reward)
    assert qualities(kept) == qualities(rewards)
    assert all(math.isnan(reward.learnability) for reward in kept)
    values = yaml.safe_load("\n".join(config_lines(folder, rewards)))
    assert values["run"] == {"folder": str(tmp_path / "runs"), "name": "votes"}
    assert [teacher["name"] for teacher in values["teachers"]] == ["cat", "ant", "bee"]
    assert values["teachers"][0]["licence"] is None
    (folder / "stages" / "train_router.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a run folder in use"):
        write_run(folder, prompts, rewards)


def test_a_router_learns_from_votes_between_two_of_many():
    """Each prompt's winner is the model with the higher planted utility; 300 votes, 4 models."""
    draw = np.random.default_rng(0)
    models = ["a", "b", "c", "d"]
    state_ND = draw.normal(size=(300, 8)).astype(np.float32)
    utility_NM = state_ND @ draw.normal(size=(8, 4))
    votes = []
    for n, utility_M in enumerate(utility_NM):
        pair = draw.choice(4, size=2, replace=False)
        winner, loser = sorted(pair.tolist(), key=lambda m: -utility_M[m])
        votes += [("p2l", (f"prompt {n}",), models[winner], 1.0)]
        votes += [("p2l", (f"prompt {n}",), models[loser], 0.0)]
    from persyn_jax.pipeline.router_data import Scored

    prompts, rewards = to_records(Scored(*vote) for vote in votes)
    config = RouterTraining(
        held_out=0.4,
        steps=60,
        pairs=64,
        optimiser=OptimiserConfig(learning_rate=0.3),
        neighbours=5,
        gossip=GossipConfig(workers=1),
        seed=0,
    )
    head, metrics = train_router(
        prompts, rewards, models, state_ND, config, make_mesh(1), lambda row: None
    )
    assert (metrics["trained_on"], metrics["pairs"]) == (180, 180)
    assert (metrics["held_out"], metrics["held_out_pairs"]) == (120, 120)
    assert metrics["pair_accuracy"] > 0.85
    chosen_N = np.asarray(coefficients(head, state_ND)).argmax(axis=1)
    assert (chosen_N == utility_NM.argmax(axis=1)).mean() > 0.7
