"""What a study found: a row a strategy, as values and as Markdown, and a verdict that may be
"undecided".

Heavy imports stay inside the functions.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from persyn_jax import store
from persyn_jax.config import to_values
from persyn_jax.intervals import (
    Interval,
    crossed_ci95,
    detectable_difference,
    mean_ci95,
    paired_deviation,
)
from persyn_jax.pipeline.gain_audit import audit_lines
from persyn_jax.pipeline.run_files import ANSWERS, CALIBRATION_ANSWERS, GAIN_AUDIT, ROUTES
from persyn_jax.pipeline.study import (
    ALL_ANSWERS,
    BASE,
    BEFORE,
    EXAMINATION,
    SWAPPED,
    Standing,
    StudyConfig,
    Trial,
    all_trials,
    compared,
    route_config,
    trial_name,
)
from persyn_jax.records import Answer, Route
from persyn_jax.routing.strategies import StrategyName

PERSYN: StrategyName = "router"


class Measured(NamedTuple):
    """Every eval prompt, and every seed that is finished."""

    score_NS: np.ndarray
    """float64, in [0, 1]."""
    log_likelihood_NS: np.ndarray
    """float64: of the reference answer, nats a token."""


def power_lines(config: StudyConfig) -> list[str]:
    """What the study can find, before it starts."""
    items = sum(source.counts.eval for source in config.sources.values() if source.counts)
    if not items:
        return ["detectable effect: not known before the prompt files are read"]
    c = config.study
    found = detectable_difference(items, paired_deviation(c.mean_score, c.correlation))
    return [
        f"detectable effect: a difference of {100 * found:.1f} points between two strategies is "
        "found with 80 % power",
        f"  ({items:,} eval prompts, paired; mean score {c.mean_score:g} and correlation "
        f"{c.correlation:g} expected; what differs from seed to seed comes on top)",
    ]


def study_results(config: StudyConfig, standing: Standing) -> dict[str, Any]:
    """What is finished so far, as values that JSON takes. The keys are stable:

    study, eval_prompts, examples
    trials           finished, of
    variants         name -> {rewards, router}: the keys in which that PerSyn differs
    untrained        mean_score and mean_log_likelihood of the student before training
    strategies       a row for each strategy of which a student is finished:
        strategy, seeds, mean_score, mean_log_likelihood
        difference, log_likelihood_difference
                     to PerSyn on the seeds that both have: mean, ci95 over prompts x seeds, and
                     corrected, wider, so that those of all strategies hold together; null for
                     PerSyn itself
        answers_generated, tokens
                     of all answers that the strategy needs, by itself
        usable, left_out
                     usable answers, and the prompts of those that were not trained on
        steps, response_tokens
                     of the training of the first seed: equally many answers are not equally long
    detectable       difference of scores that is found with 80 % power, by the median spread
                     of the differences to PerSyn; null while nothing differs
    verdict          score, log_likelihood: a sentence each
    swap             null without another student, or its `other_student` (weights), and
                     `agreement`, `ci95` and `by_chance` as in `agreement`, of PerSyn's routes for
                     the two students; the strategy `swapped` is the student on the other's routes
    gain_audit       null before it is done, or as in `gain_audit.audit_run`
    """
    measured = {
        strategy: _measured(config, [t for t in standing.trials if t.strategy == strategy])
        for strategy in compared(config)
        if any(trial.strategy == strategy for trial in standing.trials)
    }
    rows = [_row(config, standing, strategy, measured) for strategy in measured]
    before = _examinations(config, BASE, BEFORE)
    detectable, seeds = _detectable(measured), min(len(row["seeds"]) for row in rows)
    return {
        "study": config.run.name,
        "eval_prompts": len(before),
        "examples": standing.examples,
        "trials": {"finished": len(standing.trials), "of": len(list(all_trials(config)))},
        "variants": {name: to_values(own) for name, own in config.study.variants.items()},
        "untrained": {
            "mean_score": _mean([e.score for e in before]),
            "mean_log_likelihood": _mean([e.reference_log_likelihood for e in before]),
        },
        "strategies": rows,
        "detectable": detectable,
        "verdict": {
            "score": verdict_sentence("score", _differences(rows, "difference"), seeds, detectable),
            "log_likelihood": verdict_sentence(
                "log-likelihood of the reference answers",
                _differences(rows, "log_likelihood_difference"),
                seeds,
            ),
        },
        "swap": _swap(config),
        "gain_audit": _gain_audit(config),
    }


def _swap(config: StudyConfig) -> dict[str, Any] | None:
    if config.study.other_student is None:
        return None
    own, other = (
        [route.teacher for route in store.read_records(folder / ROUTES, Route)]
        for folder in (route_config(config, name).run_folder for name in (PERSYN, SWAPPED))
    )
    return {"other_student": config.study.other_student.weights, **agreement(own, other)}


def _gain_audit(config: StudyConfig) -> dict[str, Any] | None:
    path = config.folder / BASE / GAIN_AUDIT
    return store.read_json(path) if path.exists() else None


def agreement(own_N: Sequence[str], other_N: Sequence[str]) -> dict[str, Any]:
    """Of two lists of teachers for the same prompts: `agreement`, the share of prompts with the
    same teacher, with its `ci95`; and `by_chance`, that of routes with the same shares of teachers
    that have nothing to do with the prompts."""
    own, other = np.asarray(own_N), np.asarray(other_N)
    share = mean_ci95(own == other)
    teachers = np.unique(np.concatenate([own, other]))
    by_chance = sum(float((own == t).mean() * (other == t).mean()) for t in teachers)
    return {"agreement": share.mean, "ci95": share.ci95, "by_chance": by_chance}


def _measured(config: StudyConfig, trials: Sequence[Trial]) -> Measured:
    found = [_examinations(config, trial_name(trial), EXAMINATION) for trial in trials]
    return Measured(
        np.array([[e.score for e in each] for each in found]).T,
        np.array([[e.reference_log_likelihood for e in each] for each in found]).T,
    )


def _examinations(config: StudyConfig, name: str, file: str) -> list:
    from persyn_jax.pipeline.examine import Examination

    return store.read_records(config.folder / name / file, Examination)


def _row(
    config: StudyConfig,
    standing: Standing,
    strategy: str,
    measured: dict[str, Measured],
) -> dict[str, Any]:
    seeds = [trial.seed for trial in standing.trials if trial.strategy == strategy]
    folder = route_config(config, strategy).run_folder
    chosen = store.read_records(folder / ANSWERS, Answer)
    manifest = store.read_manifest(config.folder / trial_name(Trial(strategy, seeds[0])), "trial")
    assert manifest is not None
    own, persyn = measured[strategy], measured.get(PERSYN)
    differences: list[dict[str, Any] | None] = [None, None]
    if strategy != PERSYN and persyn is not None:
        differences = [
            _as_values(_difference(mine_NS, other_NS), len(measured) - 1)
            for mine_NS, other_NS in zip(own, persyn, strict=True)
        ]
    return {
        "strategy": strategy,
        "seeds": seeds,
        "mean_score": float(own.score_NS.mean()),
        "difference": differences[0],
        "mean_log_likelihood": float(own.log_likelihood_NS.mean()),
        "log_likelihood_difference": differences[1],
        **answer_cost(config, strategy, chosen),
        "usable": sum(answer.usable for answer in chosen),
        "left_out": manifest.summary["left_out"],
        "steps": manifest.summary["steps"],
        "response_tokens": manifest.summary["response_tokens"],
    }


def _difference(one_NS: np.ndarray, other_NS: np.ndarray) -> np.ndarray:
    """On the seeds that both have; seeds come in one order."""
    both = min(one_NS.shape[1], other_NS.shape[1])
    return one_NS[:, :both] - other_NS[:, :both]


def answer_cost(config: StudyConfig, strategy: str, chosen: Sequence[Answer]) -> dict[str, int]:
    """Answers, and their tokens, that the strategy needs: the chosen ones, those of all teachers on
    the calibration prompts unless it learns nothing from them, and all there are for the oracle."""
    base = config.folder / BASE
    needed = list(chosen)
    told = strategy in ("strong", "mix") and config.routing.strong is not None
    if strategy != "random" and not told:
        needed += store.read_records(base / CALIBRATION_ANSWERS, Answer)
    if strategy == "oracle":
        needed += store.read_records(base / ALL_ANSWERS, Answer)
    tokens = {(a.prompt_id, a.teacher): a.prompt_tokens + a.completion_tokens for a in needed}
    return {"answers_generated": len(tokens), "tokens": sum(tokens.values())}


def _detectable(measured: dict[str, Measured]) -> float | None:
    persyn = measured.get(PERSYN)
    if persyn is None:
        return None
    others = [own.score_NS for strategy, own in measured.items() if strategy != PERSYN]
    deviations = [_difference(own_NS, persyn.score_NS).mean(axis=1).std() for own_NS in others]
    different = [deviation for deviation in deviations if deviation > 0]
    if not different:
        return None
    return detectable_difference(len(persyn.score_NS), float(np.median(different)))


def _differences(rows: Sequence[dict[str, Any]], key: str) -> dict[str, Interval]:
    """Those that hold together, by strategy."""
    return {
        row["strategy"]: Interval(row[key]["mean"], *row[key]["corrected"])
        for row in rows
        if row[key] is not None
    }


def verdict_sentence(
    measure: str, differences: dict[str, Interval], seeds: int, detectable: float | None = None
) -> str:
    """One sentence on PerSyn against all others; differences: other strategy minus PerSyn, with
    intervals that hold together; seeds: that all strategies have.

    It opens with "By the" or "Undecided": always the latter with one seed, which cannot say what
    the next training would give. The oracle, which no strategy can beat at choosing, is compared
    like the others.
    """
    if not differences:
        return f"Undecided by the {measure}: no two strategies are finished."
    same = [name for name, d in differences.items() if d.low == d.mean == d.high == 0]
    rest = {name: d for name, d in differences.items() if name not in same}
    groups = {
        "better than": [name for name, d in rest.items() if d.high < 0],
        "worse than": [name for name, d in rest.items() if d.low > 0],
        "undecided against": [name for name, d in rest.items() if d.low <= 0 <= d.high],
        "the same students as": same,
    }
    over = "prompts x seeds" if seeds > 1 else "prompts alone"
    note = f"95 % intervals over {over}, corrected for {len(differences)} comparisons"
    if not groups["better than"] and not groups["worse than"]:
        size = "" if detectable is None else f"; about {100 * detectable:.1f} points can be seen"
        return f"Undecided by the {measure}: no strategy differs from PerSyn ({note}{size})."
    found = "; ".join(f"{word} {', '.join(names)}" for word, names in groups.items() if names)
    if seeds == 1:
        return (
            f"Undecided by the {measure}, because one seed does not say what the next training "
            f"would give; of these students alone, PerSyn's is {found} ({note})."
        )
    return f"By the {measure}, PerSyn is {found} ({note})."


def markdown_lines(results: dict[str, Any]) -> list[str]:
    """The results as a table in Markdown, with what stands around it."""
    trials, untrained = results["trials"], results["untrained"]
    lines = [
        f"# {results['study']}: strategies compared",
        "",
        f"{results['eval_prompts']:,} eval prompts; every student trained on "
        f"{results['examples']:,} answers; {trials['finished']} of {trials['of']} students "
        "finished. Differences are to PerSyn (router), with 95 % intervals over prompts x seeds.",
        "",
        "| strategy | seeds | mean score | difference | log-likelihood | difference | answers | "
        "tokens | left out | steps | response tokens |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results["strategies"]:
        lines.append(
            f"| {row['strategy']} | {len(row['seeds'])} | {row['mean_score']:.4f} | "
            f"{_interval(row['difference'])} | {row['mean_log_likelihood']:.4f} | "
            f"{_interval(row['log_likelihood_difference'])} | {row['answers_generated']:,} | "
            f"{row['tokens']:,} | {len(row['left_out'])} | {row['steps']} | "
            f"{row['response_tokens']:,} |"
        )
    lines += [
        f"| (untrained) | | {untrained['mean_score']:.4f} | | "
        f"{untrained['mean_log_likelihood']:.4f} | | | | | | |",
        "",
        *results["verdict"].values(),
        *_variant_lines(results["variants"]),
        *_swap_lines(results["swap"]),
        "",
        "log-likelihood: of the reference answers under the student, nats a token. answers, tokens:"
        " all that the strategy needs, by itself. left out: usable answers that were not drawn, so "
        "that all students train on equally many. steps, response tokens: of a training.",
    ]
    if results["gain_audit"] is not None:
        lines += [
            "",
            "## Do the rewards foresee the gain?",
            "",
            *audit_lines(results["gain_audit"]),
        ]
    return lines


def _variant_lines(variants: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    lines = []
    for name, sections in variants.items():
        differs = [
            f"{section}.{key} {value}"
            for section, own in sections.items()
            for key, value in own.items()
        ]
        lines += ["", f"{name}: PerSyn with {', '.join(differs) or 'nothing changed'}."]
    return lines


def _swap_lines(swap: dict[str, Any] | None) -> list[str]:
    if swap is None:
        return []
    low, high = swap["ci95"]
    return [
        "",
        f"swapped: the student on PerSyn's routes for {swap['other_student']}, which agree with its"
        f" own on {swap['agreement']:.1%} [{low:.1%}, {high:.1%}] of the prompts; "
        f"{swap['by_chance']:.1%} by chance.",
    ]


def _interval(values: dict[str, Any] | None) -> str:
    if values is None:
        return "-"
    low, high = values["ci95"]
    return f"{values['mean']:+.4f} [{low:+.4f}, {high:+.4f}]"


def _as_values(difference_NS: np.ndarray, comparisons: int) -> dict[str, Any]:
    alone, together = crossed_ci95(difference_NS), crossed_ci95(difference_NS, comparisons)
    return {
        "mean": alone.mean,
        "ci95": alone.ci95,
        "corrected": together.ci95,
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
