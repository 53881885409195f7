"""Stage route: any strategy within limits, and what answers will cost before one is asked for."""

import json
import shutil

import numpy as np
import pytest
from pipeline_runs import CALIBRATION, SMALL, SMOKE, TRAIN, run_here, small_config

from persyn_jax import store
from persyn_jax.config import ConfigError
from persyn_jax.pipeline import route as pipeline_route
from persyn_jax.pipeline.config import RoutingConfig
from persyn_jax.pipeline.route import Expected, expect_cost, outline, route, summary_lines
from persyn_jax.records import Answer, Prompt, Route
from persyn_jax.routing.strategies import Asked, Calibration
from persyn_jax.sampling.config import TeacherConfig

TEACHERS = [
    TeacherConfig(
        name=name,
        licence=licence,
        usd_per_million_prompt_tokens=1.0,
        usd_per_million_completion_tokens=10.0,
    )
    for name, licence in (("ann", "MIT"), ("bob", "closed"), ("cy", "MIT"))
]
NAMES = [teacher.name for teacher in TEACHERS]


def make_prompt(number, split, source="s", characters=10):
    messages = [{"role": "user", "content": "x" * characters}]
    return Prompt(str(number), messages, source, split, None, "exact_match", "MIT")


def make_answer(prompt, teacher, prompt_tokens, completion_tokens):
    return Answer(
        key=prompt.id + teacher,
        prompt_id=prompt.id,
        teacher=teacher,
        sample_index=0,
        text="a",
        finish_reason="stop",
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        usd=None,
        licence="MIT",
        error=None,
    )


def test_expected_cost_by_hand():
    """Bob puts 20 tokens before each prompt, and says more on source t; a token is 2 characters."""
    seen = [
        make_prompt(0, "calibration", "s", 10),
        make_prompt(1, "calibration", "s", 30),
        make_prompt(2, "calibration", "t", 50),
    ]
    asked = [
        make_prompt(3, "train", "t", 100),
        make_prompt(4, "train", "s", 4),
        make_prompt(5, "train", "new", 10),
    ]
    said = {"ann": [4, 6, 8], "bob": [4, 6, 80], "cy": [1, 1, 1]}
    before = {"ann": 0, "bob": 20, "cy": 0}
    answers = [
        make_answer(prompt, name, before[name] + 5 * (2 * row + 1), said[name][row])
        for row, prompt in enumerate(seen)
        for name in NAMES
    ]
    expected = expect_cost(outline([*seen, *asked]), answers, TEACHERS)
    assert not expected.tokens_NM[:3].any(), "calibration answers are paid"
    by_hand_NM = [
        [50 + 8, 20 + 50 + 80, 50 + 1],
        [2 + 5, 20 + 2 + 5, 2 + 1],
        [5 + 6, 20 + 5 + 30, 5 + 1],
    ]
    np.testing.assert_allclose(expected.tokens_NM[3:], by_hand_NM)
    np.testing.assert_allclose(expected.usd_NM[3], [130e-6, 870e-6, 60e-6])
    unknown = [*TEACHERS[:2], TeacherConfig(name="cy", licence="MIT")]
    assert expect_cost(outline([*seen, *asked]), answers, unknown).usd_NM is None


def test_prompts_of_one_length_are_expected_to_take_the_mean():
    seen = [make_prompt(n, "calibration") for n in range(2)]
    answers = [make_answer(p, name, 6 + 2 * n, 1) for n, p in enumerate(seen) for name in NAMES]
    prompts = outline([*seen, make_prompt(2, "train", characters=99)])
    expected = expect_cost(prompts, answers, TEACHERS)
    np.testing.assert_allclose(expected.tokens_NM[2], 8)


SEEN, ASKED = 10, 50
RNG = np.random.default_rng(0)
COEFFICIENT_NM = RNG.normal(size=(SEEN + ASKED, 3)).astype(np.float32)
PROMPTS = [make_prompt(n, "calibration" if n < SEEN else "train") for n in range(SEEN + ASKED)]
COST_NM = np.where(np.arange(SEEN + ASKED)[:, None] < SEEN, 0, [1.0, 2.0, 4.0])
EXPECTED = Expected(COST_NM, COST_NM / 1000)
CALIBRATION_SEEN = Calibration(
    RNG.normal(size=(SEEN, 3)), ["s"] * SEEN, RNG.normal(size=(SEEN, 4)), RNG.random((SEEN, 3))
)


def routed(**config):
    asked = Asked(["s"] * len(PROMPTS), coefficient_NM=COEFFICIENT_NM)
    prompts, config = outline(PROMPTS), RoutingConfig(**config)
    found = route(prompts, asked, CALIBRATION_SEEN, EXPECTED, TEACHERS, config, seed=0)
    return found._replace(routes=list(found.routes))


def test_by_default_the_highest_coefficient_is_asked_and_nothing_moves():
    found = routed()
    for each, row_M in zip(found.routes, COEFFICIENT_NM, strict=True):
        assert each.teacher == NAMES[int(row_M.argmax())]
        assert each.coefficients == [float(value) for value in row_M]
        first, second = sorted(row_M, reverse=True)[:2]
        assert each.margin == float(first - second)
    assert (found.summary["strategy"], found.summary["moved"]) == ("router", 0)


def test_the_summary_counts_what_is_still_to_be_asked():
    found = routed()
    new = [each.teacher for each in found.routes[SEEN:]]
    for column, name in enumerate(NAMES):
        row = found.summary["by_teacher"][name]
        assert row["to_ask"] == new.count(name)
        assert row["expected_tokens"] == new.count(name) * COST_NM[-1, column]
        assert row["expected_usd"] == pytest.approx(row["expected_tokens"] / 1000)
    assert sum(row["share"] for row in found.summary["by_teacher"].values()) == pytest.approx(1)
    assert found.summary["expected_usd"] == pytest.approx(found.summary["expected_tokens"] / 1000)
    json.dumps(found.summary, allow_nan=False)


def test_limits_hold_and_what_they_moved_is_counted():
    refused = routed(refuse_licences=["closed"])
    assert "bob" not in {each.teacher for each in refused.routes}
    assert refused.summary["moved"] == 0, "a refused teacher is preferred by no strategy"
    shared = routed(most_share={"cy": 0.1})
    assert sum(each.teacher == "cy" for each in shared.routes) <= 6
    preferred = [each.teacher for each in routed().routes]
    moved = sum(a != b.teacher for a, b in zip(preferred, shared.routes, strict=True))
    assert shared.summary["moved"] == moved > 0


@pytest.mark.parametrize(("key", "unit"), [("budget_tokens", 1), ("budget_usd", 1000)])
def test_a_budget_is_kept_and_buys_what_the_curve_says(key, unit):
    """Only what is still to be asked counts; the calibration prompts keep their best teacher."""
    curve = routed().summary["pareto"]
    assert curve["unit"] == "usd"
    rewards = [point["expected_reward"] for point in curve["points"]]
    assert rewards == sorted(rewards)
    for point in curve["points"]:
        tokens = round(1000 * point["budget"])
        budget = tokens if unit == 1 else tokens / unit * (1 + 1e-9)  # sums of cents round
        found = routed(**{key: budget})
        assert found.summary["expected_tokens"] <= budget * unit * (1 + 1e-9)
        chosen = [NAMES.index(each.teacher) for each in found.routes]
        assert chosen[:SEEN] == COEFFICIENT_NM[:SEEN].argmax(axis=1).tolist()
        new_NM = COEFFICIENT_NM[SEEN:].astype(np.float64)
        gained = new_NM[np.arange(ASKED), chosen[SEEN:]] - new_NM.mean(axis=1)
        assert gained.mean() == pytest.approx(point["expected_reward"], abs=0.01)


def test_a_few_prompts_at_a_time_come_to_the_same(monkeypatch):
    limits = {"budget_tokens": 90, "least_margin": 0.1}
    whole = routed(**limits)
    monkeypatch.setattr(pipeline_route, "_CHUNK", 7)
    assert routed(**limits) == whole


def test_calibration_prompts_must_come_first():
    with pytest.raises(ValueError, match="calibration prompt '1' must come before"):
        outline([make_prompt(0, "train"), make_prompt(1, "calibration")])


def test_drawn_scores_promise_nothing():
    assert routed(strategy="random").summary["pareto"] is None


def test_the_lines_name_every_teacher_and_the_curve():
    text = "\n".join(summary_lines(routed().summary))
    for word in (*NAMES, "strategy router", "budget", "0.05"):
        assert word in text
    free = routed()._replace(summary=routed().summary | {"expected_usd": None})
    assert "unknown" in "\n".join(summary_lines(free.summary))


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["routing.strategy=best"], r"routing.strategy: .*'best'"),
        (["routing.most_share={nobody: 0.5}"], "routing.most_share: no teacher 'nobody', only"),
        (["routing.most_share={plain: 2}"], r"routing.most_share.plain.*2"),
        (["routing.strong=nobody"], "routing.strong: no teacher 'nobody'"),
        (["routing.family=[plain, nobody]"], "routing.family: no teacher 'nobody'"),
        (["routing.refuse_licences=[Apache-2.0]"], "refuses every teacher's: Apache-2.0"),
        (["routing.budget_usd=1"], "routing.budget_usd 1: the price of teacher 'plain' is unknown"),
        (["routing.budget_usd=1", "routing.budget_tokens=1"], "only one of them"),
    ],
)
def test_bad_limits_are_refused_before_anything_is_asked(overrides, match):
    with pytest.raises(ConfigError, match=match):
        small_config(*overrides)


def test_states_made_a_few_prompts_at_a_time_route_the_same(script, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "smoke"
    before = store.read_records(run / "routes.parquet", Route)
    for name in ("states.safetensors", "routes.parquet", "stages/route.json"):
        (run / name).unlink()
    monkeypatch.setattr("persyn_jax.pipeline.states._CHUNK", 7)
    ended = script()
    assert ended.code == 0, ended.stderr
    after = store.read_records(run / "routes.parquet", Route)
    assert [(r.prompt_id, r.teacher) for r in after] == [(r.prompt_id, r.teacher) for r in before]
    for one, other in zip(after, before, strict=True):
        assert one.coefficients == pytest.approx(other.coefficients, rel=1e-5, abs=1e-6)


@pytest.fixture
def script(finished_run, tmp_path, monkeypatch, capfd):
    """route.py on a copy of the finished run, in this process."""
    shutil.copytree(finished_run.place.folder / "runs", tmp_path / "runs")

    def run(*words):
        arguments = ("--config", str(SMOKE), *SMALL, "--overwrite", *words)
        return run_here(
            "route.py", *arguments, folder=tmp_path, monkeypatch=monkeypatch, capfd=capfd
        )

    return run


def test_the_oracle_is_refused_unless_all_answers_are_there(script):
    ended = script("routing.strategy=oracle")
    assert ended.code == 2
    assert "routing.strategy oracle: needs the answers of all teachers" in ended.error
    assert f"of {TRAIN * 3}, the first that of teacher" in ended.error


def test_another_strategy_reads_no_prompt_again(script, tmp_path, monkeypatch):
    """The states are there: neither the backbone nor its tokenizer is loaded."""

    def never(*_):
        raise AssertionError("loaded a model")

    monkeypatch.setattr("persyn_jax.models.weights.load", never)
    monkeypatch.setattr("persyn_jax.pipeline.states.load_backbone", never)
    before = store.read_records(tmp_path / "runs" / "smoke" / "routes.parquet", Route)
    for strategy in ("knn", "car", "router"):
        ended = script(f"routing.strategy={strategy}")
        assert ended.code == 0, ended.stderr
        summary = json.loads(ended.stdout)
        assert (summary["strategy"], summary["routes"]) == (strategy, CALIBRATION + TRAIN)
        assert f"strategy {strategy}: {CALIBRATION + TRAIN} prompts" in ended.stderr
    after = store.read_records(tmp_path / "runs" / "smoke" / "routes.parquet", Route)
    assert after == before, "the router's routes again"
