"""LiveBench's rules on answers scored by hand, from the wording of its questions."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.evaluation.tasks import FOLDER
from persyn_jax.evaluation.tasks.livebench_scoring import (
    SCORERS,
    _edits,
    process_results,
    scored_questions,
)

FOUR_GROUPS = "a, b, c, d, e, f, g, h"
PLOT = "He wakes. He eats. He runs."
JOIN = "{'a': 'x', 'b': 'y'}"


@pytest.mark.parametrize(
    ("task", "text", "truth", "score"),
    [
        ("web_of_lies_v2", "So **yes, no, yes**.", "yes, no, yes", 1),
        ("web_of_lies_v2", "**yes, no, no** <solution>yes, no, yes</solution>", "yes, no, yes", 1),
        ("web_of_lies_v2", "**no, no, yes**", "yes, no, yes", 0),
        ("web_of_lies_v3", r"\boxed{\text{yes, no, unknown}}", "yes, no, no", 1 / 3),
        ("zebra_puzzle", "<solution>Norwegian, 3</solution>", "norwegian, 3", 1),
        ("zebra_puzzle", "<solution>norwegian, 2</solution>", "norwegian, 3", 1 / 4),
        ("zebra_puzzle", "<solution>3</solution>", "norwegian, 3", 0),
        ("zebra_puzzle", "I do not know.", "norwegian, 3", 0),
        ("spatial", "There are **three**.", "3", 1),
        ("spatial", "A **square**, no, a **circle**", "circle", 1),
        ("spatial", "3", "3", 0),  # the question asks for bold
        ("math_comp", "Therefore AAAAA.", "A", 1),
        ("math_comp", r"\boxed{\text{(A)}}", "A", 1),
        ("math_comp", "<solution>BBBBB</solution>", "A", 0),
        ("math_comp", "The answer is 073.", "073", 1),
        ("math_comp", "073 " + "x" * 60, "073", 0),
        ("connections", "<solution>d, c, b, a, e, f, g, x</solution>", FOUR_GROUPS, 1 / 2),
        ("connections", "<solution>a, b, c, e, d, f, g, h</solution>", FOUR_GROUPS, 0),
        ("typos", "Here:\nThe cat\nsat.", "The cat sat.", 1),
        ("typos", "The cat sat", "The cat sat.", 0),
        ("olympiad", "Hence\nAnswer: 3, 1, 2", "3,1,2", 1),
        ("olympiad", "**Answer:** 3, 1, 2.", "3,1,2", 1),
        ("olympiad", "Answer: 3, 2", "3,1,2", 2 / 3),
        ("olympiad", "3, two, 2", "3,1,2", 2 / 3),
        ("olympiad", r"\boxed{3, 1, 2, 4}", "3,1,2", 3 / 4),
        ("plot_unscrambling", "<PLOT_SUMMARY>He wakes. He eats. He runs.", PLOT, 1),
        ("plot_unscrambling", "Wrong. <PLOT_SUMMARY>He runs. He wakes. He eats.", PLOT, 1 / 3),
        ("plot_unscrambling", "", PLOT, 0),
        ("tablejoin", "Thus:\n```python\n{'a': 'x',\n 'b': 'y'}\n```", JOIN, 1),
        ("tablejoin", "{'a': 'x'}", JOIN, 0.67),
        ("tablejoin", "{'a': 'x', 'b': 'z', 'c': 'y'}", JOIN, 0.4),
        ("tablejoin", r"\boxed{{'a': 'x', 'b': 'y'}}", JOIN, 1),
        ("tablejoin", "['a', 'x']", JOIN, 0),
        ("tablejoin", "{['a']: 'x'}", JOIN, 0),
        ("olympiad", "9" * 5000, "3,1,2", 0),
        ("cta", "  Country Name. ", "country name", 1),
        ("cta", "It is country name", "country name", 0),
    ],
)
def test_score(task, text, truth, score):
    doc = {"task": task, "ground_truth": truth}
    assert process_results(doc, [text])["score"] == pytest.approx(score)


# Whatever it says, a plot has sentences that are nearest to the reference's.
@pytest.mark.parametrize("task", [task for task in SCORERS if task != "plot_unscrambling"])
@pytest.mark.parametrize("text", ["", "\n", "\\boxed{", "**", "<solution></solution>"])
def test_an_empty_or_broken_answer_scores_0(task, text):
    truth = {"math_comp": "073", "olympiad": "3,1,2", "tablejoin": JOIN}
    assert SCORERS[task](text, truth.get(task, "yes, no, unknown")) == 0


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
def test_the_edit_distance_is_that_of_its_recursion(some, others):
    @functools.cache
    def edits(i, j):
        if not (i and j):
            return i + j
        same = some[i - 1] == others[j - 1]
        return min(edits(i - 1, j) + 1, edits(i, j - 1) + 1, edits(i - 1, j - 1) + (not same))

    assert _edits(some, others) == edits(len(some), len(others))


def test_what_no_rule_scores_or_was_withdrawn_is_left_out():
    from datasets import Dataset

    rows = [
        {"task": "spatial", "livebench_removal_date": ""},
        {"task": "spatial", "livebench_removal_date": "2024-11-25"},
        {"task": "AMPS_Hard", "livebench_removal_date": ""},
    ]
    assert list(scored_questions(Dataset.from_list(rows))) == rows[:1]


def test_the_group_names_tasks_that_are_there():
    import yaml

    group = yaml.safe_load((FOLDER / "livebench.yaml").read_text())
    assert all((FOLDER / f"{name}.yaml").is_file() for name in group["task"])
