"""The page: complete, self-contained, deaf to hostile text, and the same for the same records."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.reporting import build_report, render_page
from persyn_jax.reporting.page import CUT_AT, make_plots
from persyn_jax.reporting.page_rows import choose_disagreements, choose_rows, stage_rows
from persyn_jax.reporting.style import spread
from persyn_jax.reporting.text import gain_sentence

# Never closed in HTML.
VOID = {"meta", "link", "br"}
HOSTILE = (
    "</pre><script>alert(1)</script><img src=http://evil.test onerror=alert(2)>&amp;\"'{{ 1 }}"
)


class Page(HTMLParser):
    """Checks that tags nest, and keeps tags, attributes and text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def html(run_records):
    return render_page(run_records, build_report(run_records))


def test_the_page_asks_the_network_for_nothing(html):
    page = Page(html)
    assert not {"script", "img", "iframe", "object", "embed"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in html
    assert "url(h" not in html


def test_every_reference_inside_the_page_has_one_target(html):
    page = Page(html)
    ids = [value for name, value in page.attributes if name == "id"]
    targets = {value[1:] for name, value in page.attributes if name == "xlink:href"}
    assert targets <= set(ids)


def test_the_page_shows_the_numbers_of_the_report(html, run_records):
    text = " ".join(Page(html).text.split())
    report = build_report(run_records)
    assert report["router"]["verdict"] in text
    before, after = (report["student"][model]["mean"] for model in ("before", "after"))
    assert f"{before:.3f} → {after:.3f}" in text
    assert "544" in text
    assert "1,024 of generate-then-select" in text
    for row in choose_rows(run_records):
        assert " ".join(row.prompt.messages[-1]["content"].split()) in text


def test_gain_and_benchmarks_are_shown_where_they_were_measured(html, run_records):
    report = build_report(run_records)
    text = " ".join(Page(html).text.split())
    said = " ".join(gain_sentence(report["gain_audit"]).split())
    gain = text[text.index(f"Gain {said}") : text.index("Student Train")]
    total = report["gain_audit"]["correlation_within_slices"]["total"]
    assert f"{total['spearman']:+.2f} {total['p_value']:.3f}" in gain
    for unit in report["gain_audit"]["units"]:
        low, high = unit["gain_ci95"]
        row = f"{unit['teacher']} {unit['slice']} {unit['gain']:+.4f} {low:+.4f} to {high:+.4f}"
        assert row in gain
    for point in report["gain_audit"]["by_alpha"]:
        assert f"{point['alpha']} {point['spearman']:+.2f} {point['gain']:+.4f}" in gain
    benchmarks = text[text.index("Benchmarks Each") : text.index("Gossip Each")]
    gsm8k = report["benchmarks"]["gsm8k"]
    for words in (
        f"gsm8k exact_match before 200 {gsm8k['models']['before']['mean']:.3f}",
        f"after 200 {gsm8k['models']['after']['mean']:.3f}",
        f"{gsm8k['paired_difference']['mean']:+.3f}",
        "persyn_generated verifier another-student 50",
    ):
        assert words in benchmarks


def test_what_was_not_measured_has_no_section(html, run_records):
    bare = dataclasses.replace(run_records, gain_audit=None, benchmarks=None)
    shown = [Page(page).text for page in (html, render_page(bare, build_report(bare)))]
    for words in ("foresees the gain", "Benchmarks", "lm-eval"):
        assert [words in text for text in shown] == [True, False]


def test_hostile_text_stays_text(run_records):
    def spoil(name: str) -> str:
        return HOSTILE if name == "plain" else name

    records = dataclasses.replace(
        run_records,
        run=run_records.run | {"name": HOSTILE},
        teachers={spoil(name): HOSTILE for name in run_records.teachers},
        prompts=[
            dataclasses.replace(
                p, messages=[{"role": HOSTILE, "content": HOSTILE}] * 2, answer=HOSTILE
            )
            for p in run_records.prompts
        ],
        rewards=[dataclasses.replace(r, teacher=spoil(r.teacher)) for r in run_records.rewards],
        routes=[dataclasses.replace(r, teacher=spoil(r.teacher)) for r in run_records.routes],
        calibration_answers=[
            dataclasses.replace(a, teacher=spoil(a.teacher))
            for a in run_records.calibration_answers
        ],
        chosen_answers=[
            dataclasses.replace(a, teacher=spoil(a.teacher), text=HOSTILE, error=HOSTILE)
            for a in run_records.chosen_answers
        ],
        gain_audit=run_records.gain_audit
        | {
            "units": [
                unit | {"teacher": spoil(unit["teacher"]), "slice": HOSTILE}
                for unit in run_records.gain_audit["units"]
            ]
        },
        benchmarks={HOSTILE: run_records.benchmarks["gsm8k"] | {"metric": HOSTILE}},
    )
    page = Page(render_page(records, build_report(records)))
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count(HOSTILE) > 60  # twenty rows: two messages and an answer each


def test_plots_are_well_formed_and_take_their_colours_from_the_page(run_records):
    plots = make_plots(run_records, build_report(run_records))
    svgs = [plot.svg for section in plots.values() for plot in section]
    assert len(svgs) == 16
    for svg in svgs:
        root = ElementTree.fromstring(svg)
        assert root.get("width") is None
        assert root.get("viewBox")
        assert "var(--" in svg
        assert "#0e0e" not in svg


def test_colours_of_teachers_agree_between_plots_and_tables(html, run_records):
    """A teacher that got every route of a source fills its bar with the colour of its chip."""
    everything_to_last = [
        dataclasses.replace(route, teacher="number-specialist") for route in run_records.routes
    ]
    records = dataclasses.replace(run_records, routes=everything_to_last)
    shares = make_plots(records, build_report(records))["router"][1].svg
    assert "100 %" in shares
    assert '<i style="background: var(--series-3)"></i>number-specialist' in html
    assert shares.count("fill: var(--series-3)") == 4 + 1  # four sources and the legend


def test_twenty_rows_from_all_sources_splits_and_teachers(run_records):
    rows = choose_rows(run_records)
    assert len({row.prompt.id for row in rows}) == 20
    sources = [row.prompt.source for row in rows]
    assert {source: sources.count(source) for source in sources} == dict.fromkeys(sources[:4], 5)
    assert {row.prompt.split for row in rows} == {"calibration", "train"}
    assert {row.answer.teacher for row in rows} == set(run_records.teachers)
    for row in rows:
        assert row.answer.prompt_id == row.prompt.id
        assert row.answer.teacher == max(row.coefficients, key=row.coefficients.get)
        assert set(row.rewards) == (
            set(run_records.teachers) if row.prompt.split == "calibration" else set()
        )


def test_a_run_with_fewer_rows_shows_them_all(run_records):
    few = dataclasses.replace(run_records, chosen_answers=run_records.chosen_answers[:7])
    shown = {row.answer.key for row in choose_rows(few)}
    assert shown == {answer.key for answer in few.chosen_answers}


def test_many_teachers_many_workers_and_no_reference_answers(run_records):
    """Nineteen teachers with long names, a 64-worker run, quality unknown everywhere."""
    many = {f"老师 $teacher$_number_{number:02}_with_a_long_name": "MIT" for number in range(19)}
    first = next(iter(many))
    records = dataclasses.replace(
        run_records,
        teachers=many,
        routes=[
            dataclasses.replace(route, teacher=first, coefficients=[1.0] + [0.0] * 18)
            for route in run_records.routes
        ],
        rewards=[
            dataclasses.replace(reward, teacher=teacher, quality=None)
            for teacher in many
            for reward in run_records.rewards[:: len(run_records.teachers)]
        ],
        chosen_answers=[
            dataclasses.replace(answer, teacher=first) for answer in run_records.chosen_answers
        ],
        gain_audit=run_records.gain_audit
        | {"units": [unit | {"teacher": first} for unit in run_records.gain_audit["units"]]},
        training_metrics=[
            row | {"loss": row["loss"] * 32, "sum_weight": [1 / 64] * 64}
            for row in run_records.training_metrics
        ],
    )
    page = Page(render_page(records, build_report(records)))
    assert first in page.text


def test_one_source_of_equal_prompts_without_quality_or_losses(run_records):
    """Nothing to tell apart: one source, one length, no quality, equal totals; too few held out."""
    prompts = [
        dataclasses.replace(p, source="only", answer=None, messages=run_records.prompts[0].messages)
        for p in run_records.prompts
    ]
    level = {"quality": None, "quality_standardised": 0.0, "learnability_standardised": 0.0}
    records = dataclasses.replace(
        run_records,
        prompts=prompts,
        rewards=[dataclasses.replace(r, total=0.0, **level) for r in run_records.rewards],
        scores=[dataclasses.replace(score, source="only") for score in run_records.scores],
        quality="judge",
        router=run_records.router
        | {"held_out": 3, "held_out_prompts": run_records.router["held_out_prompts"][:3]},
    )
    report = build_report(records)
    json.dumps(report, allow_nan=False)
    text = " ".join(Page(render_page(records, report)).text.split())
    assert "Nowhere: the router asks a best teacher on every held-out prompt." in text
    assert "All totals are equal on every held-out prompt" in text
    assert "So few prompts decide nothing" in text
    assert "What the judge thinks of each teacher's answers" in text
    assert "by the verifier" not in text
    assert list(report["teachers"]["share_by_length"]) == ["shortest"]


def test_disagreements_show_prompt_answers_and_terms_and_cut_long_texts(run_records):
    long = "x" * (CUT_AT + 1234)
    worst = build_report(run_records)["router"]["largest_losses"][0]
    records = dataclasses.replace(
        run_records,
        calibration_answers=[
            dataclasses.replace(a, text=long)
            if (a.prompt_id, a.teacher) == (worst["prompt_id"], worst["router"])
            else a
            for a in run_records.calibration_answers
        ],
    )
    report = build_report(records)
    rows = choose_disagreements(records, report)
    assert [row.loss for row in rows] == [
        loss["loss"] for loss in report["router"]["largest_losses"]
    ]
    for row in rows:
        router, oracle = row.choices
        assert router.answer.prompt_id == oracle.reward.prompt_id == row.prompt.id
        assert oracle.reward.total - router.reward.total == row.loss
        assert router.coefficient >= oracle.coefficient
    text = Page(render_page(records, report)).text
    assert "x" * CUT_AT + " … (1,234 more characters)" in text
    section = text[text.index("Where router and oracle disagree") : text.index("Rows to read")]
    for row in rows:
        assert row.prompt.messages[-1]["content"] in section
        assert f"loses {row.loss:.3f}" in section


def test_stages_add_up_what_they_asked_of_everybody():
    counts = dict.fromkeys(("failed", "requests", "retries", "prompt_tokens"), 1)
    asked = {
        "a": {"answers": 3, "completion_tokens": 10, "usd": 0.25, **counts},
        "b": {"answers": 4, "completion_tokens": 20, "usd": 0.5, **counts},
    }
    unpriced = {"c": asked["a"] | {"usd": None}}
    rows = stage_rows(
        {
            "calibrate": {"seconds": 30.0, "peak_memory_gb": 0.5, "asked": asked},
            "generate": {"seconds": 10.0, "asked": asked | unpriced},
            "route": {"seconds": 0.0},
        }
    )
    assert [row.share for row in rows] == [0.75, 0.25, 0.0]
    assert (rows[0].answers, rows[0].completion_tokens, rows[0].usd) == (7, 30, 0.75)
    assert (rows[1].answers, rows[1].retries, rows[1].usd) == (10, 3, None)
    assert (rows[2].answers, rows[2].usd, rows[2].peak_memory_gb) == (None, None, None)


RENDER = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from conftest import make_run
from persyn_jax.reporting import build_report, render_page
records = make_run()
print(hashlib.sha256(render_page(records, build_report(records)).encode()).hexdigest())
"""


def test_another_process_makes_the_same_bytes(html):
    done = subprocess.run(
        [sys.executable, "-c", RENDER, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        timeout=120,
    )
    assert done.stdout.strip() == hashlib.sha256(html.encode()).hexdigest(), done.stderr


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.2))
def test_spread_labels_keep_their_order_and_their_distance(positions, gap):
    moved = np.array(spread(positions, gap))
    order = np.argsort(positions, kind="stable")
    assert (np.diff(moved[order]) >= 0.9 * gap).all()
    apart = np.diff(np.sort(positions)).min(initial=np.inf) >= gap
    if apart:
        assert moved.tolist() == positions
