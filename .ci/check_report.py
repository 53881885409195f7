"""Checks that a run's report says what it promises to say.

python .ci/check_report.py runs/NAME    exits with 1 and the first thing that is wrong
"""

import json
import math
import re
import sys
from functools import reduce
from pathlib import Path
from typing import Any

TOP_LEVEL = {
    *("run", "prompts", "teachers", "rewards", "gain_audit", "router", "cost", "student"),
    *("benchmarks", "gossip", "stages"),
}
STRATEGIES = ("router", "best_constant", "best_per_source", "knn", "random", "oracle")


def check(report: dict[str, Any], page: str) -> None:
    """Raises AssertionError or KeyError, with what is wrong."""
    assert set(report) == TOP_LEVEL, f"top-level keys: {sorted(report)}"

    generated = at(report, "cost.answers_generated")
    everything = at(report, "cost.answers_generate_then_select")
    assert 0 < generated < everything, f"cost.answers_generated: {generated} of {everything}"

    for name in STRATEGIES:
        assert at(report, f"router.regret.{name}") > -1e-9, f"router.regret.{name} is negative"
    assert isinstance(at(report, "router.verdict"), str), "router.verdict is no sentence"

    for name, outcome in at(report, "router.strategies").items():
        assert outcome["regret"] > -1e-9, f"router.strategies.{name}.regret is negative"
    assert "router" in at(report, "router.strategies"), "router.strategies: the router is missing"
    lost = [loss["loss"] for loss in at(report, "router.largest_losses")]
    assert lost == sorted(lost, reverse=True), f"router.largest_losses: not the worst first: {lost}"

    own, sweep = f"{at(report, 'rewards.alpha'):g}", at(report, "rewards.alpha_sweep")
    assert {"0", own, "1"} <= set(sweep), f"rewards.alpha_sweep: only {sorted(sweep)}"
    for alpha, point in sweep.items():
        shares = sum(point["share"].values())
        assert math.isclose(shares, 1), f"rewards.alpha_sweep.{alpha}.share: adds up to {shares}"
    agreement = sweep[own]["agreement"]
    assert math.isclose(agreement, 1), f"rewards.alpha_sweep.{own}.agreement: {agreement}"

    for name in ("before", "after", "paired_difference"):
        mean, (low, high) = at(report, f"student.{name}.mean"), at(report, f"student.{name}.ci95")
        assert low <= mean <= high, f"student.{name}.mean: {mean} is outside its interval"

    assert at(report, "gossip.workers") >= 2, "gossip.workers: nobody to gossip with"
    assert at(report, "gossip.exchanges") >= 1, "gossip.exchanges: none happened"
    assert at(report, "gossip.compiled_programs") == 1, "gossip.compiled_programs: not 1"
    total = at(report, "gossip.sum_weight_total")
    assert math.isclose(total, 1, abs_tol=1e-6), f"gossip.sum_weight_total: {total}"

    outside = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=[\"'](?!data:)[^\"']*", page)
    assert not outside, f"report.html is not self-contained: {outside[0]}"


def at(report: dict[str, Any], path: str) -> Any:
    return reduce(lambda values, key: values[key], path.split("."), report)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    check(json.loads((folder / "report.json").read_text()), (folder / "report.html").read_text())
    print(f"{folder}: report.json and report.html are as documented")
