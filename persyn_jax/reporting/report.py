"""report.json: what a run did and what came of it. Every key is documented in schema.md."""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from typing import Any

from persyn_jax.intervals import Interval, mean_ci95, paired_difference_ci95
from persyn_jax.records import Answer, Prompt, Reward, Route, Score
from persyn_jax.reporting.alpha_sweep import alpha_sweep, reward_terms
from persyn_jax.reporting.held_out import (
    HeldOut,
    compare_strategies,
    held_out_calibration,
    largest_losses,
)
from persyn_jax.reporting.lengths import LengthTrend, length_trend, prompt_characters, quarters
from persyn_jax.reporting.run_records import RunRecords
from persyn_jax.routing.router_study import reliability

SPLITS = ("calibration", "train", "eval")
DISAGREEMENTS = 10


def build_report(records: RunRecords) -> dict[str, Any]:
    """The report as plain values, ready for JSON. The same records give the same report."""
    return {
        "run": records.run,
        "prompts": _prompts(records.prompts),
        "teachers": _teachers(records),
        "rewards": _rewards(records),
        "gain_audit": records.gain_audit,
        "router": _router(records),
        "cost": _cost(records),
        "student": _student(records),
        "benchmarks": _benchmarks(records.benchmarks) if records.benchmarks else None,
        "gossip": _gossip(records),
        "stages": records.stages,
    }


def _prompts(prompts: list[Prompt]) -> dict[str, Any]:
    of_source = _grouped(prompts, lambda prompt: prompt.source)
    return {
        **_split_counts(prompts),
        "sources": {
            source: {
                **_split_counts(members),
                "licence": members[0].source_licence,
                "without_reference": sum(prompt.answer is None for prompt in members),
            }
            for source, members in of_source.items()
        },
    }


def _split_counts(prompts: list[Prompt]) -> dict[str, int]:
    counts = Counter(prompt.split for prompt in prompts)
    return {split: counts[split] for split in SPLITS}


def _teachers(records: RunRecords) -> dict[str, Any]:
    source_of = {prompt.id: prompt.source for prompt in records.prompts}
    routes_of_source = _grouped(records.routes, lambda route: source_of[route.prompt_id])
    return {
        "by_teacher": {teacher: _teacher(records, teacher) for teacher in records.teachers},
        "share_by_source": {
            source: teacher_shares(routes, records.teachers)
            for source, routes in routes_of_source.items()
        },
        "share_by_length": _share_by_length(records),
    }


def _share_by_length(records: RunRecords) -> dict[str, Any]:
    """By quarter of the routed prompts, from the shortest to the longest."""
    length_of = {prompt.id: prompt_characters(prompt) for prompt in records.prompts}
    length_N = [length_of[route.prompt_id] for route in records.routes]
    return {
        quarter: {
            "prompts": len(rows),
            "characters": [min(length_N[row] for row in rows), max(length_N[row] for row in rows)],
            "share": teacher_shares([records.routes[row] for row in rows], records.teachers),
        }
        for quarter, rows in quarters(length_N).items()
    }


def _teacher(records: RunRecords, teacher: str) -> dict[str, Any]:
    answers = [answer for answer in records.calibration_answers if answer.teacher == teacher]
    rewards = [reward for reward in records.rewards if reward.teacher == teacher]
    fates = Counter(_fate(answer) for answer in answers)
    routed = sum(route.teacher == teacher for route in records.routes)
    return {
        "calibration_answers": len(answers),
        **{fate: fates[fate] for fate in ("usable", "empty", "truncated", "failed")},
        "mean_quality": _mean(r.quality for r in rewards if r.quality is not None),
        "mean_learnability": _mean(reward.learnability for reward in rewards),
        "strictly_best_quality_share": _strictly_best_share(records.rewards, teacher),
        "routed": routed,
        "routed_share": routed / len(records.routes),
        "licence": records.teachers[teacher],
    }


def _fate(answer: Answer) -> str:
    if answer.usable:
        return "usable"
    return {"stop": "empty", "length": "truncated"}.get(answer.finish_reason, "failed")


def _strictly_best_share(rewards: list[Reward], teacher: str) -> float | None:
    """Share of the prompts with a quality on which `teacher` beats every other teacher."""
    qualities_of_prompt: dict[str, dict[str, float]] = defaultdict(dict)
    for reward in rewards:
        if reward.quality is not None:
            qualities_of_prompt[reward.prompt_id][reward.teacher] = reward.quality
    wins = [
        all(qualities[teacher] > q for other, q in qualities.items() if other != teacher)
        for qualities in qualities_of_prompt.values()
    ]
    return _mean(wins)


def teacher_shares(routes: list[Route], teachers: Iterable[str]) -> dict[str, float]:
    """The share of `routes` that goes to each teacher."""
    counts = Counter(route.teacher for route in routes)
    return {teacher: counts[teacher] / len(routes) for teacher in teachers}


def _rewards(records: RunRecords) -> dict[str, Any]:
    teachers = list(records.teachers)
    points = alpha_sweep(reward_terms(records.rewards, teachers), records.alpha)
    rewards_of = _grouped(records.rewards, lambda reward: reward.teacher)
    return {
        "quality": records.quality,
        "alpha": records.alpha,
        "alpha_sweep": {
            f"{point.alpha:g}": {
                "agreement": point.agreement,
                "mean_quality": point.mean_quality,
                "mean_learnability": point.mean_learnability,
                "share": dict(zip(teachers, point.share_M.tolist(), strict=True)),
            }
            for point in points
        },
        "total_by_length": {
            "overall": _as_trend(length_trend(records.rewards)),
            "by_teacher": {
                teacher: _as_trend(length_trend(rewards_of[teacher])) for teacher in teachers
            },
        },
    }


def _as_trend(trend: LengthTrend) -> dict[str, Any]:
    correlation = trend.correlation
    return {
        "answers": trend.answers,
        "rank_correlation": None if correlation is None else correlation.mean,
        "ci95": None if correlation is None else correlation.ci95,
        "trend": trend.trend,
        "tokens": trend.tokens_K,
        "mean_total": trend.total_K,
    }


def _router(records: RunRecords) -> dict[str, Any]:
    held_out, teachers = held_out_calibration(records), list(records.teachers)
    outcomes, left_out = compare_strategies(
        held_out, teachers, records.strategies, records.run["seed"]
    )
    return {
        **records.router,
        "strategies": {
            strategy: {
                "mean_total": outcome.total.mean,
                "ci95": outcome.total.ci95,
                "regret": outcome.regret,
                "difference_to_router": _as_values(outcome.difference_to_router),
            }
            for strategy, outcome in outcomes.items()
        },
        "strategies_left_out": left_out,
        "reliability": _reliability(held_out),
        "largest_losses": [
            loss._asdict() for loss in largest_losses(held_out, teachers, DISAGREEMENTS)
        ],
    }


def _reliability(held_out: HeldOut) -> dict[str, Any]:
    """The bins that hold pairs; none, where every total equals every other of its prompt."""
    try:
        found = reliability(held_out.coefficient_NM, held_out.total_NM)
    except ValueError:
        empty = {"confidence": [], "right": [], "pairs": []}
        return {**empty, "expected_error": None, "log_loss": None}
    filled_K = found.pairs_K > 0
    return {
        "confidence": found.confidence_K[filled_K].tolist(),
        "right": found.right_K[filled_K].tolist(),
        "pairs": found.pairs_K[filled_K].tolist(),
        "expected_error": found.expected_error,
        "log_loss": found.log_loss,
    }


def _cost(records: RunRecords) -> dict[str, Any]:
    """Counts each answer once: some of the chosen answers are calibration answers too."""
    answers = {
        answer.key: answer for answer in records.calibration_answers + records.chosen_answers
    }.values()
    counts = _split_counts(records.prompts)
    asked = counts["calibration"] + counts["train"]
    teachers = len(records.teachers)
    answers_of = _grouped(answers, lambda answer: answer.teacher)
    return {
        "answers_generated": len(answers),
        "answers_generate_then_select": asked * teachers,
        "answers_expected": asked + counts["calibration"] * (teachers - 1),
        **_spent(answers),
        "by_teacher": {
            teacher: {
                "answers": len(answers_of.get(teacher, [])),
                **_spent(answers_of.get(teacher, [])),
            }
            for teacher in records.teachers
        },
    }


def _spent(answers: Collection[Answer]) -> dict[str, Any]:
    prices = [answer.usd for answer in answers]
    known = [price for price in prices if price is not None]
    return {
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "completion_tokens": sum(answer.completion_tokens for answer in answers),
        "usd": math.fsum(known) if len(known) == len(prices) else None,
    }


def _student(records: RunRecords) -> dict[str, Any]:
    held_out = [row["held_out_loss"] for row in records.training_metrics if "held_out_loss" in row]
    of_source = _grouped(records.scores, lambda score: score.source)
    return {
        "eval_prompts": len({score.prompt_id for score in records.scores}),
        **_before_and_after(records.scores),
        "by_source": {source: _before_and_after(scores) for source, scores in of_source.items()},
        "training_examples": len(records.examples),
        "training_tokens": sum(row["tokens"] for row in records.training_metrics),
        "held_out_loss": {
            "first": _mean(held_out[0]) if held_out else None,
            "last": _mean(held_out[-1]) if held_out else None,
        },
    }


def _before_and_after(scores: list[Score]) -> dict[str, Any]:
    before = {score.prompt_id: score.score for score in scores if score.model == "before"}
    after = {score.prompt_id: score.score for score in scores if score.model == "after"}
    paired = [after[prompt_id] for prompt_id in before]
    return {
        "before": _as_values(mean_ci95(list(before.values()))),
        "after": _as_values(mean_ci95(paired)),
        "paired_difference": _as_values(paired_difference_ci95(paired, list(before.values()))),
    }


def _benchmarks(tasks: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {
            "metric": task["metric"],
            "models": {
                model: {
                    "items": scores["items"],
                    **_as_values(_interval(scores)),
                    "lm_eval": scores["lm_eval"],
                }
                for model, scores in task["models"].items()
            },
            "paired_difference": _as_values(_interval(task["after_minus_before"]))
            if task["after_minus_before"]
            else {"mean": None, "ci95": None},
        }
        for name, task in tasks.items()
    }


def _interval(values: dict[str, float]) -> Interval:
    return Interval(values["mean"], values["low"], values["high"])


def _gossip(records: RunRecords) -> dict[str, Any]:
    rows = records.training_metrics
    return {
        "workers": records.run["workers"],
        "exchange_probability": records.gossip["exchange_probability"],
        "rounds": len(rows),
        "exchanges": sum(row["pushes"] for row in rows),
        "sum_weight_total": math.fsum(rows[-1]["sum_weight"]),
        "sum_weights": rows[-1]["sum_weight"],
        "compiled_programs": records.gossip["compiled_programs"],
        "consensus_distance": rows[-1]["consensus_distance"],
    }


def _as_values(interval: Interval) -> dict[str, Any]:
    return {"mean": interval.mean, "ci95": interval.ci95}


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return math.fsum(values) / len(values) if values else None


def _grouped(items: Iterable[Any], key) -> dict[str, list[Any]]:
    """Items by key, in the order of appearance."""
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
