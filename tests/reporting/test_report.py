"""report.json: documented key by key, and its numbers recounted from the records by other means."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from persyn_jax.records import Reward
from persyn_jax.reporting import build_report, report, summary_lines
from persyn_jax.reporting.text import gain_sentence

TOP_LEVEL = [
    *("run", "prompts", "teachers", "rewards", "gain_audit", "router", "cost", "student"),
    *("benchmarks", "gossip", "stages"),
]
NAMES_BELOW = {
    "sources": "<source>",
    "by_source": "<source>",
    "best_per_source": "<source>",
    "share_by_source": "<source>",
    "by_teacher": "<teacher>",
    "share_by_length": "<quarter>",
    "share": "<teacher>",
    "alpha_sweep": "<alpha>",
    "strategies": "<strategy>",
    "strategies_left_out": "<strategy>",
    "regret": "<strategy>",
    "regret_ci95": "<strategy>",
    "stages": "<stage>",
    "correlation": "<term>",
    "correlation_within_slices": "<term>",
    "benchmarks": "<task>",
    "models": "<model>",
}
SCHEMA = Path(report.__file__).with_name("schema.md")


@pytest.fixture(scope="module")
def built(run_records):
    return build_report(run_records)


def documented_keys() -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", SCHEMA.read_text(), flags=re.MULTILINE)


def leaf_keys(value, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if isinstance(value, dict):
        return set().union(*(leaf_keys(inner, (*path, key)) for key, inner in value.items()))
    return {path}


def with_placeholders(path: tuple[str, ...]) -> str:
    """The path as the documentation writes it: names of the run replaced."""
    parents = ("", "", *path)
    return ".".join(
        {"share_by_source": "<teacher>", "strategies": part}.get(
            grandparent, NAMES_BELOW.get(parent, part)
        )
        for grandparent, parent, part in zip(parents, parents[1:], path, strict=False)
    )


def test_every_key_is_documented_and_every_documented_key_is_there(built):
    assert list(built) == TOP_LEVEL
    keys = {with_placeholders(path) for path in leaf_keys(built)}
    assert keys == set(documented_keys())
    assert len(documented_keys()) == len(set(documented_keys()))


def test_it_is_json_and_the_same_every_time(built, run_records):
    text = json.dumps(built, allow_nan=False)
    assert json.loads(text) == built
    assert json.dumps(build_report(run_records)) == text


def test_only_stages_holds_timings(built, run_records):
    slower = dataclasses.replace(
        run_records, stages={name: {"seconds": 1e6} for name in run_records.stages}
    )
    other = build_report(slower)
    assert other.pop("stages") != built["stages"]
    assert other == {key: built[key] for key in TOP_LEVEL if key != "stages"}


def test_cost_is_that_of_route_then_generate(built):
    # |X| + |X_cal| (|M| - 1) with 256 prompts, 96 of them calibration, and 4 teachers.
    assert built["cost"]["answers_generated"] == built["cost"]["answers_expected"] == 256 + 96 * 3
    assert built["cost"]["answers_generate_then_select"] == 256 * 4


def test_an_answer_is_counted_and_paid_once(run_records):
    priced = [dataclasses.replace(a, usd=0.25) for a in run_records.calibration_answers]
    chosen = [priced[0], dataclasses.replace(priced[1], key="new", usd=0.5, prompt_tokens=7)]
    cost = build_report(
        dataclasses.replace(run_records, calibration_answers=priced, chosen_answers=chosen)
    )["cost"]
    assert cost["answers_generated"] == 96 * 4 + 1
    assert cost["usd"] == 96 * 4 * 0.25 + 0.5
    assert cost["prompt_tokens"] == sum(answer.prompt_tokens for answer in priced) + 7


def test_every_teachers_answers_are_counted_and_priced_once(run_records):
    """The calibration answers that were chosen, too, are in both lists."""
    priced = [dataclasses.replace(a, usd=0.25) for a in run_records.calibration_answers]
    records = dataclasses.replace(run_records, calibration_answers=priced)
    cost = build_report(records)["cost"]
    spent = cost["by_teacher"]
    assert list(spent) == list(run_records.teachers)
    for key in ("prompt_tokens", "completion_tokens"):
        assert sum(each[key] for each in spent.values()) == cost[key]
    assert sum(each["answers"] for each in spent.values()) == cost["answers_generated"]
    assert cost["usd"] is None
    only = build_report(dataclasses.replace(records, chosen_answers=priced[:5]))["cost"]
    assert [each["usd"] for each in only["by_teacher"].values()] == [24.0] * 4


def test_one_unknown_price_makes_the_price_unknown(run_records):
    priced = [dataclasses.replace(a, usd=0.0) for a in run_records.calibration_answers]
    priced[5] = dataclasses.replace(priced[5], usd=None)
    records = dataclasses.replace(run_records, calibration_answers=priced, chosen_answers=[])
    assert build_report(records)["cost"]["usd"] is None


def test_prompts_add_up(built):
    sources = built["prompts"]["sources"].values()
    for split, size in (("calibration", 96), ("train", 160), ("eval", 120)):
        assert built["prompts"][split] == sum(source[split] for source in sources) == size


def test_every_calibration_answer_has_one_fate(built, run_records):
    for name, teacher in built["teachers"]["by_teacher"].items():
        fates = [teacher[fate] for fate in ("usable", "empty", "truncated", "failed")]
        assert sum(fates) == teacher["calibration_answers"] == 96
        answers = [a for a in run_records.calibration_answers if a.teacher == name]
        assert teacher["failed"] == sum(answer.error is not None for answer in answers) > 0
        assert teacher["truncated"] == sum(a.finish_reason == "length" for a in answers) > 0
        assert teacher["usable"] == sum(answer.usable for answer in answers)


def test_strictly_best_counts_no_ties():
    qualities = {"p0": [1, 0, 0], "p1": [1, 1, 0], "p2": [0, 0, 0], "p3": [0.2, 0.9, 0.9]}
    qualities |= {"p4": [0.1, 0.9, 0.2], "without reference": [None, None, None]}
    rewards = [
        Reward("k", prompt, teacher, True, quality, -1.0, 3, 0.0, 0.0, 0.0)
        for prompt, row in qualities.items()
        for teacher, quality in zip("abc", row, strict=True)
    ]
    shares = [report._strictly_best_share(rewards, teacher) for teacher in "abc"]
    assert shares == [0.2, 0.2, 0.0]


def test_shares_by_source_are_shares_of_the_routes(built, run_records):
    source_of = {prompt.id: prompt.source for prompt in run_records.prompts}
    for source, shares in built["teachers"]["share_by_source"].items():
        routes = [route for route in run_records.routes if source_of[route.prompt_id] == source]
        assert sum(shares.values()) == pytest.approx(1)
        for teacher, share in shares.items():
            assert share * len(routes) == pytest.approx([r.teacher for r in routes].count(teacher))
    by_teacher = built["teachers"]["by_teacher"].values()
    assert sum(teacher["routed"] for teacher in by_teacher) == len(run_records.routes)


def test_shares_by_length_are_shares_of_the_routes(built, run_records):
    length_of = {p.id: len(p.messages[0]["content"]) for p in run_records.prompts}
    by_length = built["teachers"]["share_by_length"]
    assert sum(quarter["prompts"] for quarter in by_length.values()) == len(run_records.routes)
    for quarter in by_length.values():
        low, high = quarter["characters"]
        routes = [r for r in run_records.routes if low <= length_of[r.prompt_id] <= high]
        assert len(routes) == quarter["prompts"]
        for teacher, share in quarter["share"].items():
            assert share * len(routes) == pytest.approx([r.teacher for r in routes].count(teacher))


def test_scores_are_paired_by_prompt(built, run_records):
    student = built["student"]
    shuffled = build_report(
        dataclasses.replace(
            run_records, scores=run_records.scores[:120] + run_records.scores[:119:-1]
        )
    )["student"]
    assert shuffled["paired_difference"] == student["paired_difference"]
    means = [student[model]["mean"] for model in ("before", "after")]
    assert student["paired_difference"]["mean"] == pytest.approx(means[1] - means[0])
    low, high = student["paired_difference"]["ci95"]
    assert low < student["paired_difference"]["mean"] < high
    by_source = [scores["after"]["mean"] for scores in student["by_source"].values()]
    assert np.mean(by_source) == pytest.approx(means[1])  # 30 prompts each


def test_gossip_counts_the_rows_of_training(built, run_records):
    rows = run_records.training_metrics
    gossip = built["gossip"]
    assert gossip["rounds"] == 40
    assert gossip["exchanges"] == sum(row["pushes"] for row in rows)
    assert gossip["sum_weights"] == rows[-1]["sum_weight"]
    assert gossip["sum_weight_total"] == pytest.approx(1, abs=1e-6)
    assert built["student"]["training_tokens"] == 40 * 512
    assert built["student"]["held_out_loss"] == {
        "first": pytest.approx(np.mean(rows[0]["held_out_loss"])),
        "last": pytest.approx(np.mean(rows[-1]["held_out_loss"])),
    }


def test_what_was_not_run_is_null_and_the_rest_is_the_same(built, run_records):
    for nothing in (None, {}):
        bare = build_report(dataclasses.replace(run_records, gain_audit=None, benchmarks=nothing))
        assert list(bare) == TOP_LEVEL
        assert bare["gain_audit"] is bare["benchmarks"] is None
        assert {**bare, **{key: built[key] for key in ("gain_audit", "benchmarks")}} == built


def test_benchmarks_say_what_was_measured_and_compare_nothing_else(built, run_records):
    gsm8k = built["benchmarks"]["gsm8k"]
    means = [gsm8k["models"][model]["mean"] for model in ("before", "after")]
    assert gsm8k["paired_difference"]["mean"] == pytest.approx(means[1] - means[0])
    low, high = gsm8k["models"]["after"]["ci95"]
    assert low < means[1] < high
    alone = built["benchmarks"]["persyn_generated"]
    assert alone["models"]["another-student"]["items"] == 50
    assert alone["paired_difference"] == {"mean": None, "ci95": None}


@pytest.mark.parametrize(
    ("spearman", "p_value", "opens", "holds"),
    [
        (0.62, 0.01, "The total reward foresees the gain", "+0.62, p = 0.010, 16 fine-tunings"),
        (-0.5, 0.04, "The total reward misleads", "-0.50, p = 0.040"),
        (0.9, 0.05, "Undecided", "chance may give as much"),
        (None, None, "Undecided", "within a slice all totals or all gains are equal"),
    ],
)
def test_the_sentence_on_the_gain_says_no_more_than_its_p_value(spearman, p_value, opens, holds):
    terms = {"total": {"spearman": spearman, "p_value": p_value}}
    sentence = gain_sentence({"units": [{}] * 16, "correlation_within_slices": terms})
    assert sentence.startswith(opens)
    assert holds in sentence
    assert sentence.endswith(".")


def test_the_summary_has_ten_lines_with_the_verdict_and_the_cost(built):
    lines = summary_lines(built)
    assert len(lines) == 10
    assert not any("\n" in line for line in lines)
    text = "\n".join(lines)
    assert built["router"]["verdict"] in text
    assert "544 generated; generate-then-select: 1,024" in text
    assert "1 compiled program" in text
