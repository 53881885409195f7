"""reasoning-gym's own scores: the same through a reference of JSON as from the task itself."""

import inspect
import json
import re

import pytest

from persyn_jax.config import ConfigError
from persyn_jax.evaluation import generated
from persyn_jax.evaluation.generated import (
    ARITHMETIC,
    NOT_JSON,
    RUNS_ANSWERS,
    UNREPEATABLE_TASKS,
    own_score,
)
from persyn_jax.evaluation.verifiers import check_reference, one_answer

DATASETS, CREATE = generated._reasoning_gym()
# `composite` needs settings, `zebra_puzzles` a SAT solver that is not installed.
REFUSED = RUNS_ANSWERS | NOT_JSON | UNREPEATABLE_TASKS | {"composite", "zebra_puzzles"}
USABLE = sorted(DATASETS.keys() - REFUSED)


def draw_one(task: str, **settings):
    (question,) = generated.draw("mine", task, settings, seed=5, draws=1, own_scorer=True)
    return question


def score_in(dataset, answer: str, entry: dict) -> float:
    try:
        return dataset.score_answer(answer, entry)
    except (ValueError, IndexError, KeyError):
        return 0.0


@pytest.mark.parametrize("task", USABLE)
def test_the_tasks_own_answer_scores_as_the_task_says(task):
    question = draw_one(task)
    dataset = CREATE(task, seed=5, size=1)
    entry = dataset[0]
    assert question.messages[0]["content"] == entry["question"]
    for answer in (entry["answer"] or "", "no such thing"):
        own = own_score(f" {answer}\n", question.answer)
        assert own == pytest.approx(score_in(dataset, answer.strip(), entry))
        assert 0 <= own <= 1
    assert one_answer("reasoning_gym", question.answer) == entry["answer"]


def test_another_solution_is_right_too():
    question = draw_one("countdown", min_numbers=3, max_numbers=3)
    entry = json.loads(question.answer)["entry"]
    reversed_sum = f"0 + ({entry['answer']})"  # uses a number that is not there
    assert own_score(entry["answer"], question.answer) == 1.0
    assert own_score(f"({entry['answer']})", question.answer) == 1.0
    assert own_score(reversed_sum, question.answer) < 0.1


@pytest.mark.parametrize("text", ["print(1)", "1 + a", "9 ** 9 ** 9 ** 9", "__import__('os')", "٣"])
def test_what_is_no_arithmetic_never_gets_to_a_scorer_that_would_run_it(text, monkeypatch):
    question = draw_one("countdown")
    seen = []
    monkeypatch.setattr(
        DATASETS["countdown"][0], "score_answer", lambda self, answer, entry: seen.append(answer)
    )
    own_score(text, question.answer)
    assert seen == [""]


def test_tasks_whose_scorers_run_answers_are_all_known():
    runs = re.compile(r"\b(eval|exec|parse_expr|sympify)\(")
    found = {
        name
        for name, (kind, _) in DATASETS.items()
        if runs.search(re.sub(r"eval\(entry\b", "", inspect.getsource(kind.score_answer)))
    }
    assert found == RUNS_ANSWERS | ARITHMETIC


def test_they_are_refused():
    with pytest.raises(ConfigError, match="task 'n_queens' runs answers as Python code"):
        draw_one("n_queens")
    reference = json.dumps(
        {"task": "n_queens", "settings": {}, "entry": {"question": "", "answer": ""}}
    )
    with pytest.raises(ConfigError, match=r"here: verifier reasoning_gym: .*'n_queens'"):
        check_reference("reasoning_gym", reference, "here")


@pytest.mark.parametrize("reference", ["42", "yes", "[]", '{"task": "a", "settings": {}}'])
def test_a_reference_of_another_kind_is_refused(reference):
    with pytest.raises(ConfigError, match="here: the verifier reasoning_gym is for sources of"):
        check_reference("reasoning_gym", reference, "here")
