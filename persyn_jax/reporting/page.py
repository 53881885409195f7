"""The HTML page of a run: one file that needs nothing else and asks the network for nothing."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from markupsafe import Markup

from persyn_jax.records import Answer, Prompt, Reward
from persyn_jax.reporting import plots, text
from persyn_jax.reporting.report import RunRecords
from persyn_jax.reporting.style import css, series_color

T = TypeVar("T")

ROWS_TO_READ = 20


@dataclass(frozen=True)
class Plot:
    """A plot with what to see in it."""

    title: str
    caption: str
    svg: Markup
    """Made by `plots`, which escapes names."""


@dataclass(frozen=True)
class ReadingRow:
    """One prompt with all that the run made of it."""

    prompt: Prompt
    answer: Answer
    coefficients: dict[str, float]
    """By teacher."""
    rewards: dict[str, Reward]
    """By teacher; empty for a prompt that only the chosen teacher answered."""


def render_page(records: RunRecords, report: dict[str, Any]) -> str:
    """The page as HTML. All text of prompts, answers and configs is escaped.

    report: `build_report` of the same records.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": text.count,
        "difference": text.difference,
        "interval": text.interval,
        "percent": text.percent,
        "score": text.score,
        "signed": text.signed,
        "signed_interval": text.signed_interval,
    }
    colors = {teacher: css(series_color(index)) for index, teacher in enumerate(records.teachers)}
    return environment.get_template("report.html.j2").render(
        report=report,
        plots=make_plots(records, report),
        rows=choose_rows(records),
        colors=colors,
    )


def make_plots(records: RunRecords, report: dict[str, Any]) -> dict[str, list[Plot]]:
    """The plots of each section of the page."""
    return {
        "router": _router_plots(report),
        "teachers": _teacher_plots(records),
        "student": _student_plots(records, report),
        "gossip": _gossip_plots(records),
    }


def _router_plots(report: dict[str, Any]) -> list[Plot]:
    router, teachers = report["router"], report["teachers"]
    return [
        _plot(
            "Router against baselines",
            f"Regret on {router['held_out']} held-out prompts with 95 % intervals: the router is"
            " worth its cost where it lies left of best constant.",
            plots.plot_regret(router),
        ),
        _plot(
            "Teacher share by source",
            "Whom the router asks: bars that differ between sources show that it tells them apart.",
            plots.plot_teacher_shares(teachers["share_by_source"], list(teachers["by_teacher"])),
        ),
    ]


def _teacher_plots(records: RunRecords) -> list[Plot]:
    rewards, teachers = records.rewards, list(records.teachers)
    return [
        _plot(
            "Quality by teacher",
            "How often each teacher is right, by the verifier: the mark is its mean.",
            plots.plot_rewards(rewards, teachers, "quality", "quality"),
        ),
        _plot(
            "Learnability by teacher",
            "How natural each teacher's answers are to the student: further right is more"
            " familiar.",
            plots.plot_rewards(rewards, teachers, "learnability", "learnability, nats a token"),
        ),
        _plot(
            "Total reward by teacher",
            "What the router learns from: both terms together; wide overlap means that no teacher"
            " is best everywhere.",
            plots.plot_rewards(
                rewards, teachers, "total", "total reward, standardised within the prompt"
            ),
        ),
        _plot(
            "Total reward by teacher and source",
            "Where each teacher is strong: the more the best (bold) moves from source to source,"
            " the more there is for a router to find.",
            plots.plot_rewards_by_source(rewards, records.prompts, teachers),
        ),
    ]


def _student_plots(records: RunRecords, report: dict[str, Any]) -> list[Plot]:
    return [
        _plot(
            "Score before and after",
            "Each eval prompt is answered before and after training, and the difference is paired"
            " by prompt; lines are 95 % intervals.",
            plots.plot_scores(report["student"]),
        ),
        _plot(
            "Loss by worker",
            "The student learns as long as both fall; held-out loss that turns up again means"
            " overfitting.",
            plots.plot_losses(records.training_metrics),
        ),
    ]


def _gossip_plots(records: RunRecords) -> list[Plot]:
    return [
        _plot(
            "Consensus distance and exchanges",
            "Workers drift apart with every step of their own and come back with every push.",
            plots.plot_consensus(records.training_metrics),
        ),
        _plot(
            "Sum weights",
            "A push hands on half of a worker's weight, so single weights leave"
            f" 1/{records.run['workers']} (dashed) while their sum stays 1.",
            plots.plot_sum_weights(records.training_metrics),
        ),
    ]


def choose_rows(records: RunRecords) -> list[ReadingRow]:
    """Twenty chosen answers to read, in turn over sources, then splits, then teachers."""
    prompt_of = {prompt.id: prompt for prompt in records.prompts}
    route_of = {route.prompt_id: route for route in records.routes}
    groups: dict[str, dict[str, dict[str, list[Answer]]]] = {}
    for answer in records.chosen_answers:
        prompt = prompt_of[answer.prompt_id]
        splits = groups.setdefault(prompt.source, {})
        splits.setdefault(prompt.split, {}).setdefault(answer.teacher, []).append(answer)
    in_turn = _in_turn(
        _in_turn(_in_turn(teachers.values()) for teachers in splits.values())
        for splits in groups.values()
    )
    rows = []
    for answer in in_turn[:ROWS_TO_READ]:
        route = route_of.get(answer.prompt_id)
        rewards = [reward for reward in records.rewards if reward.prompt_id == answer.prompt_id]
        rows.append(
            ReadingRow(
                prompt=prompt_of[answer.prompt_id],
                answer=answer,
                coefficients=dict(zip(records.teachers, route.coefficients, strict=True))
                if route
                else {},
                rewards={reward.teacher: reward for reward in rewards},
            )
        )
    return rows


def _in_turn(lists: Iterable[Iterable[T]]) -> list[T]:
    """The first of each list, then the second of each, and so on."""
    missing: Any = object()
    return [
        item
        for turn in zip_longest(*lists, fillvalue=missing)
        for item in turn
        if item is not missing
    ]


def _plot(title: str, caption: str, svg: str) -> Plot:
    return Plot(title=title, caption=caption, svg=Markup(svg))
