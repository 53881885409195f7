"""The HTML page of a run: one file that needs nothing else and asks the network for nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from persyn_jax.reporting import plots, study_plots, text
from persyn_jax.reporting.page_rows import choose_disagreements, choose_rows, stage_rows
from persyn_jax.reporting.run_records import RunRecords
from persyn_jax.reporting.style import css, series_color
from persyn_jax.routing.verdict import MIN_HELD_OUT

CUT_AT = 1500
"""Characters of a text shown where router and oracle disagree."""
QUALITY = {
    "verifier": "What the verifier gives each teacher's answers: the mark is the mean.",
    "reward_model": "What the reward model thinks of each teacher's answers: the mark is the mean.",
    "likelihood": "How likely each teacher's answers are to the larger model, in nats a token: the"
    " mark is the mean.",
    "judge": "What the judge thinks of each teacher's answers: the mark is the mean.",
}
"""What to see in the plot of quality, by what measured it."""
ASKS = {
    "router": "the highest coefficient",
    "strong": "the teacher of the highest mean quality",
    "mix": "the strong teacher for some prompts, any other for the rest; one draw",
    "family_strong": "the best in quality of the student's family",
    "car": "the teacher of the best quality for its loss under the student",
    "knn": "the best on the most similar prompts",
    "clusters": "the best on the nearest group of prompts",
    "random": "anyone; expected",
    "oracle": "the best teacher of each prompt, known afterwards",
}
"""Whom a strategy asks, for those that need no name of the run."""


@dataclass(frozen=True)
class Plot:
    """A plot with what to see in it."""

    title: str
    caption: str
    svg: Markup
    """Made by `plots`, which escapes names."""


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
        "cut": text.cut,
        "dollars": text.dollars,
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
        disagreements=choose_disagreements(records, report),
        stages=stage_rows(report["stages"]),
        asks=ASKS,
        cut_at=CUT_AT,
        min_held_out=MIN_HELD_OUT,
        trend_sentence=text.trend_sentence,
        gain_sentence=text.gain_sentence,
        colors=colors,
    )


def make_plots(records: RunRecords, report: dict[str, Any]) -> dict[str, list[Plot]]:
    """The plots of each section of the page."""
    return {
        "router": _router_plots(report),
        "router_study": _router_study_plots(report),
        "teachers": _teacher_plots(records),
        "alpha": _alpha_plots(report),
        "length": _length_plots(report),
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
            "Who is asked: bars that differ between sources show that the routes tell them apart.",
            plots.plot_teacher_shares(
                teachers["share_by_source"],
                list(teachers["by_teacher"]),
                "Share of each teacher by source",
            ),
        ),
    ]


def _router_study_plots(report: dict[str, Any]) -> list[Plot]:
    router, teachers = report["router"], report["teachers"]
    quarters = {
        f"{low:,} to {high:,}" if low < high else f"{low:,}": quarter["share"]
        for quarter in teachers["share_by_length"].values()
        for low, high in [quarter["characters"]]
    }
    return [
        _plot(
            "How sure, and how right",
            "Pairs of teachers on held-out prompts: on the diagonal (dashed) the coefficients mean"
            " what they say; below it the router is surer than it should be. Large dots stand for"
            " many pairs.",
            study_plots.plot_reliability(router["reliability"]),
        ),
        _plot(
            "Teacher share by prompt length",
            "Routed prompts in quarters by their characters: bars that differ show that the routes"
            " go by length, or by something that comes with it.",
            plots.plot_teacher_shares(
                quarters, list(teachers["by_teacher"]), "Share of each teacher by prompt length"
            ),
        ),
    ]


def _alpha_plots(report: dict[str, Any]) -> list[Plot]:
    rewards = report["rewards"]
    shares_of = {alpha: point["share"] for alpha, point in rewards["alpha_sweep"].items()}
    return [
        _plot(
            "What alpha trades",
            "The answers that the best possible routes would choose: how much quality a larger"
            " alpha gives up, and how much learnability it wins. Dashed: this run's"
            f" {rewards['alpha']:g}.",
            study_plots.plot_alpha(rewards),
        ),
        _plot(
            "Best teacher by alpha",
            "Share of the calibration prompts on which each teacher has the best total, by alpha;"
            " equally good teachers share a prompt.",
            plots.plot_teacher_shares(
                shares_of, list(report["teachers"]["by_teacher"]), "Best teacher by alpha"
            ),
        ),
    ]


def _length_plots(report: dict[str, Any]) -> list[Plot]:
    by_length = report["rewards"]["total_by_length"]
    return [
        _plot(
            "Does length pay?",
            "Right of 0 a teacher's longer answers have the higher totals, left of it the shorter;"
            " lines are 95 % intervals.",
            study_plots.plot_length_correlation(by_length["by_teacher"]),
        ),
        _plot(
            "Total reward by response length",
            "Usable answers in five parts of equal size, from the shortest to the longest, of each"
            " teacher and of all together (thick).",
            study_plots.plot_total_by_length(by_length),
        ),
    ]


def _metric(learnability: str) -> str:
    name = learnability.replace("_", " ")
    return f"{name}, nats a token" if learnability == "mean_log_likelihood" else name


def _teacher_plots(records: RunRecords) -> list[Plot]:
    rewards, teachers = records.rewards, list(records.teachers)
    return [
        _plot(
            "Quality by teacher",
            QUALITY[records.quality],
            plots.plot_rewards(rewards, teachers, "quality", "quality"),
        ),
        _plot(
            "Learnability by teacher",
            "How well each teacher's answers suit the student, by this metric: further right is"
            " better.",
            plots.plot_rewards(rewards, teachers, "learnability", _metric(records.learnability)),
        ),
        _plot(
            "Total reward by teacher",
            "What the router learns from: both terms together; wide overlap means that no teacher"
            " is best everywhere.",
            plots.plot_rewards(rewards, teachers, "total", "total reward, standardised"),
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


def _plot(title: str, caption: str, svg: str) -> Plot:
    return Plot(title=title, caption=caption, svg=Markup(svg))
