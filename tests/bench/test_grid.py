"""The gossip grid against plain SGD, closed forms, and what it promises of its store."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import grid_tasks
import numpy as np
import pytest
from scipy import stats

from persyn_jax.bench import grid_table
from persyn_jax.bench.grid import GridConfig, GridRow, best_learning_rate, run_grid
from persyn_jax.bench.grid_store import read_rows, save_rows
from persyn_jax.bench.replicas import make_program
from persyn_jax.bench.tasks import make_task
from persyn_jax.config import ConfigError, load, validate
from persyn_jax.reporting.gossip_plot import plot_grid
from persyn_jax.streams import jax_stream
from persyn_jax.training.step import compiled_programs

SCRIPT = Path(__file__).parents[2] / "scripts" / "gossip_bench.py"
TEACHERS = Path(__file__).parents[2] / "configs" / "gossip_bench_teachers.yaml"
WORKERS = 4
MODEL_BYTES = 4 * (grid_tasks.FEATURES + 1) * grid_tasks.CLASSES


def config_of(methods, **changes) -> GridConfig:
    values = {
        "task": "images",
        "workers": WORKERS,
        "steps": 20,
        "batch": 8,
        "evaluate_every": 10,
        "learning_rates": [0.5],
        "tuning_seeds": [100],
        "seeds": [0],
        "step_seconds": 0.01,
        "methods": methods,
    }
    return validate(GridConfig, values | changes, where="test")


def rows_of(config, make_task=grid_tasks.softmax_regression, finished=None) -> list[GridRow]:
    return [row for batch in run_grid(config, make_task, finished or {}) for row in batch]


def results_of(config, make_task=grid_tasks.softmax_regression) -> list[GridRow]:
    return [row for row in rows_of(config, make_task) if row.purpose == "result"]


def without_clock(rows):
    return [dataclasses.replace(row, wall_seconds=0.0) for row in rows]


# What is trained.


def sgd_losses(seed, rate, steps, every):
    """Test losses of one process that takes the batches of all workers as one, in NumPy."""
    params = grid_tasks.start(jax_stream(seed, "start"))
    weight, bias = (np.array(params[key], np.float64) for key in ("weight", "bias"))

    def probabilities(inputs):
        scores = np.exp(inputs @ weight + bias)
        return scores / scores.sum(axis=1, keepdims=True)

    losses = []
    for step in range(steps + 1):
        if step % every == 0:
            p = probabilities(grid_tasks.INPUTS[300:])
            losses.append(-np.log(p[np.arange(100), grid_tasks.LABELS[300:]]).mean())
        chosen = grid_tasks.drawn(seed, step, WORKERS, 8).ravel()
        inputs = grid_tasks.INPUTS[chosen]
        error = probabilities(inputs) - np.eye(grid_tasks.CLASSES)[grid_tasks.LABELS[chosen]]
        weight = weight - rate * inputs.T @ error / len(chosen)
        bias = bias - rate * error.mean(axis=0)
    return losses


@pytest.mark.parametrize(
    "method",
    [{"rule": "all_reduce"}, {"rule": "local_sgd", "period": 1}, {"rule": "local_sgd"}],
    ids=str,
)
def test_means_in_every_round_are_sgd_on_the_batches_of_all_workers(method):
    (row,) = results_of(config_of([method]))
    np.testing.assert_allclose(row.test_loss, sgd_losses(0, 0.5, 20, 10), rtol=1e-5)
    assert row.consensus_distance[-1] == pytest.approx(0, abs=1e-10)
    assert row.output_divergence[-1] == pytest.approx(0, abs=1e-10)


def test_the_learning_rate_is_that_of_the_tuning_seeds():
    """After 10 steps x is ten times the rate. Other seeds would choose otherwise."""
    goals = {100: 1.9, 101: 2.2, 0: 9.0}
    config = config_of(
        [{"rule": "all_reduce"}, {"rule": "no_mixing", "learning_rates": [0.15, 0.4, 0.9]}],
        steps=10,
        learning_rates=[0.1, 0.2, 0.9],
        tuning_seeds=[100, 101],
    )
    rows = rows_of(config, grid_tasks.walk(goals))
    assert len(rows) == config.row_count == 14
    assert {(row.method, row.learning_rate) for row in rows if row.purpose == "result"} == {
        ("all_reduce", 0.2),
        ("no_mixing", 0.15),
    }
    last = [row.test_loss[-1] for row in rows if row.purpose == "result"]
    np.testing.assert_allclose(last, [7.0, 7.5], rtol=1e-5)


def test_a_rate_at_which_a_run_diverged_is_not_chosen():
    rows = rows_of(config_of([{"rule": "all_reduce"}], learning_rates=[0.1, 0.5]))[:2]
    diverged = dataclasses.replace(rows[1], test_loss=[1.0, None])
    assert best_learning_rate([rows[0], diverged]) == 0.1
    assert best_learning_rate([dataclasses.replace(rows[0], learning_rate=0.9), diverged]) == 0.9


@pytest.mark.parametrize(
    ("method", "height"),
    [
        # All go up by 0.1 in each of 10 steps; in the fifth and the tenth they exchange.
        ({"rule": "local_sgd", "period": 5}, 1.0),
        # c <- 0 + 4 a 0.5, x <- 0.5 - a 0.5; then the same with 0.95 - c.
        ({"rule": "easgd", "period": 5, "rate": 0.1}, 0.2 + 0.4 * (0.45 + 0.5 - 0.2)),
        # c goes as far as the four together.
        ({"rule": "downpour", "period": 5}, 4.0),
    ],
    ids=str,
)
def test_the_model_that_is_tested_is_what_the_method_returns(method, height):
    config = config_of([method], steps=10, learning_rates=[0.1])
    (row,) = results_of(config, grid_tasks.walk({0: 100.0, 100: 100.0}))
    assert row.test_loss[-1] == pytest.approx(100 - height, abs=1e-4)


def test_the_dead_do_not_count():
    config = config_of(
        [{"rule": "no_mixing"}], steps=10, learning_rates=[0.1], faults=[{"dead_workers": 1}]
    )
    (row,) = results_of(config, grid_tasks.walk({0: 100.0, 100: 100.0}))
    assert row.test_loss == pytest.approx([100, 99], abs=1e-4)
    assert row.consensus_distance == pytest.approx([0, 0], abs=1e-9)


def test_workers_that_never_exchange_are_apart_as_their_runs_are():
    """A worker of its own is a run with one batch: the consensus distance from four of them."""
    config = config_of([{"rule": "no_mixing"}], steps=1, evaluate_every=1)
    (row,) = results_of(config)
    start = grid_tasks.start(jax_stream(0, "start"))
    scores = np.exp(grid_tasks.INPUTS @ np.array(start["weight"], np.float64))
    p = scores / scores.sum(axis=1, keepdims=True)
    moves = []
    for chosen in grid_tasks.drawn(0, 0, WORKERS, 8):
        error = p[chosen] - np.eye(grid_tasks.CLASSES)[grid_tasks.LABELS[chosen]]
        moves.append(np.append(grid_tasks.INPUTS[chosen].T @ error / 8, error.mean(axis=0)))
    expected = 0.5**2 * np.square(moves - np.mean(moves, axis=0)).sum()
    assert row.consensus_distance[-1] == pytest.approx(expected, rel=1e-4)
    assert row.output_divergence[-1] > 1e-5


def test_only_rules_with_sum_weights_have_a_spread_of_them():
    over = {"schedule": "gosgd", "exchange_probability": 0.5}
    rules = ("no_mixing", "gosgd", "push_sum", "d_psgd")
    rows = results_of(config_of([{"rule": rules[0]}, *({"rule": r} | over for r in rules[1:])]))
    spread = {row.rule: row.sum_weight_spread[-1] for row in rows}
    assert spread["no_mixing"] is spread["d_psgd"] is None
    assert spread["gosgd"] == pytest.approx(spread["push_sum"], rel=1e-5)
    assert spread["gosgd"] > 0.01


def test_workers_of_one_teacher_each_agree_on_nothing_unless_they_exchange():
    """Answers are certain to a worker that knows one rule, and differ between rules: divergence is
    then log W. Those that know all rules share their doubts."""
    smaller = ["workers=2", "steps=90", "evaluate_every=90", "batch=4", "seeds=[0]"]
    smaller += ["learning_rates=[0.3]", "methods=[{rule: no_mixing}]"]
    pooled, personalised = rows_of(load(GridConfig, TEACHERS, smaller), make_task)
    assert (pooled.split, personalised.split) == ("same", "one_class")
    assert personalised.output_divergence[-1] == pytest.approx(np.log(2), abs=0.02)
    assert pooled.output_divergence[-1] < np.log(2) / 2
    assert personalised.test_loss[-1] > pooled.test_loss[-1] + 0.2
    assert pooled.accuracy[-1] == pytest.approx(1 / 2, abs=0.05)


def test_the_teachers_preset_compares_both_shards_under_the_same_exchanges():
    preset = load(GridConfig, TEACHERS)
    assert preset.splits == ("same", "one_class")
    names = [method.name for method in preset.methods]
    assert names == ["all_reduce", "gosgd p=1", "gosgd p=0.1", "no_mixing"]


# What it costs.


@pytest.mark.parametrize(
    ("method", "useful", "wire"),
    [
        ({"rule": "no_mixing"}, 0, 0),
        ({"rule": "all_reduce"}, 20 * 2 * 3 / 4, 20 * 2 * 3 / 4),
        ({"rule": "local_sgd", "period": 10}, 2 * 2 * 3 / 4, 2 * 2 * 3 / 4),
        ({"rule": "d_psgd", "schedule": "ring"}, 20 * 2, 20 * 2),
        ({"rule": "d_psgd", "schedule": "ring", "period": 7}, 2 * 2, 2 * 2),
        ({"rule": "d_psgd_bf16", "schedule": "hypercube"}, 20 / 2, 20 / 2),
        # Every worker reads one other, by as many shifts as there are others in use.
        ({"rule": "d_psgd", "schedule": "random_pull"}, 20, None),
    ],
    ids=str,
)
def test_bytes_are_those_of_the_models_that_travel(method, useful, wire):
    (row,) = results_of(config_of([method]))
    assert row.useful_bytes[-1] == pytest.approx(useful * MODEL_BYTES)
    if wire is not None:
        assert row.wire_bytes[-1] == pytest.approx(wire * MODEL_BYTES)
    assert row.steps == [0, 10, 20]
    assert len(row.useful_bytes) == len(row.wire_bytes) == len(row.seconds) == 3
    assert row.seconds[-1] >= 20 * 0.01 - 1e-9


def test_other_links_only_change_the_modelled_time():
    config = config_of([{"rule": "d_psgd", "schedule": "ring"}])
    rows = rows_of(config)
    slow = dataclasses.replace(
        config, links=dataclasses.replace(config.links, between_bandwidth=1e3)
    )
    again = rows_of(slow, grid_tasks.untouchable, {row.key: row for row in rows})
    longer = 20 * 2 * MODEL_BYTES * (1e-3 - 1 / config.links.between_bandwidth)
    assert again[0].seconds[-1] - rows[0].seconds[-1] == pytest.approx(longer)
    assert [dataclasses.replace(row, seconds=[]) for row in again] == [
        dataclasses.replace(row, seconds=[]) for row in rows
    ]


# One program, and no cell twice.


def test_one_program_a_rule_serves_schedules_faults_rates_parameters_and_seeds():
    config = config_of(
        [
            {"rule": "d_psgd", "schedule": "ring"},
            {"rule": "d_psgd", "schedule": "one_peer_exponential", "period": 2},
            {"rule": "d_psgd", "schedule": "star", "mean_every": 3},
            {"rule": "slowmo", "schedule": "ring", "rate": 0.5, "momentum": 0.3},
            {"rule": "slowmo", "schedule": "random_shift", "rate": 1.0, "momentum": 0.6},
        ],
        workers=3,  # a program that no other test has
        steps=4,
        evaluate_every=2,
        learning_rates=[0.1, 0.2, 0.3],
        seeds=[0, 1],
        faults=[{}, {"drop": 0.5, "straggling": 0.3}],
    )
    rows = rows_of(config)
    assert len(rows) == 5 * 2 * 5
    for rule in ("d_psgd", "slowmo"):
        program = make_program(rule, 3, grid_tasks.softmax_loss, grid_tasks.logits)
        assert compiled_programs(program.step) == compiled_programs(program.view) == 1
    finals = {(row.method, row.faults): row.test_loss[-1] for row in rows}
    assert len(set(finals.values())) == len(finals)


METHODS = [
    {"rule": "gosgd", "schedule": "gosgd", "exchange_probability": 0.5},
    {"rule": "d_psgd", "schedule": "ring"},
]


def test_finished_cells_are_not_run_again():
    config = config_of(METHODS, learning_rates=[0.1, 0.5], seeds=[0, 1, 2])
    rows = rows_of(config)
    assert rows_of(config, grid_tasks.untouchable, {row.key: row for row in rows}) == rows
    assert len({row.key for row in rows}) == len(rows) == config.row_count


def test_rows_do_not_depend_on_what_ran_beside_them():
    """Some rows are lost; they come again, bitwise, and no other does."""
    config = config_of(METHODS, learning_rates=[0.1, 0.5], seeds=[0, 1, 2])
    rows = rows_of(config)
    kept = {row.key: row for index, row in enumerate(rows) if index % 3}
    again = rows_of(config, finished=kept)
    assert without_clock(again) == without_clock(rows)


def test_the_file_keeps_the_rows_of_other_comparisons(tmp_path):
    path = tmp_path / "bench.json"
    assert read_rows(path) == {}
    first, second = (config_of([method]) for method in METHODS)
    rows = rows_of(first)
    save_rows(path, first, rows, {})
    finished = read_rows(path)
    assert list(finished.values()) == rows
    more = rows_of(second, finished=finished)
    save_rows(path, second, more[:1], finished)
    saved = json.loads(path.read_text())
    assert saved["config"]["methods"][0]["rule"] == "d_psgd"
    assert [row["key"] for row in saved["rows"]] == [more[0].key]
    assert [row["key"] for row in saved["earlier_rows"]] == [row.key for row in rows]
    assert set(read_rows(path)) == {more[0].key} | {row.key for row in rows}


def run_script(folder, *words):
    return subprocess.run(
        [sys.executable, SCRIPT, *words], cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_the_script_goes_on_from_its_file(tmp_path):
    words = ["--preset", "quick", "--json", "bench.json", "--plot", "bench.png"]
    words += ["workers=2", "steps=2", "evaluate_every=1", "batch=1", "seeds=[0]"]
    words += ["methods=[{rule: no_mixing}, {rule: all_reduce}]"]
    first = run_script(tmp_path, *words)
    assert (first.returncode, first.stderr) == (0, "")
    written = json.loads((tmp_path / "bench.json").read_text())
    assert {row["method"] for row in written["rows"]} == {"no_mixing", "all_reduce"}
    assert all(set(row) == set(GridRow.__dataclass_fields__) for row in written["rows"])
    assert (tmp_path / "bench.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    again = run_script(tmp_path, *words)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert json.loads((tmp_path / "bench.json").read_text()) == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"config": {', "not valid JSON"),
        ("[1, 2]", "not a result of this script, got list"),
        ('{"rows": [{"schedule": "ring"}], "config": {}}', "not a result of this script"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_with_one_line(tmp_path, text, message):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_script_leaves_a_foreign_file_alone(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text("[1, 2]")
    result = run_script(tmp_path, "--preset", "quick", "--json", path)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert str(path) in line
    assert path.read_text() == "[1, 2]"


# What a person gives and gets.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate_every": 7}, "evaluate_every must divide steps (20), got 7"),
        ({"seeds": [3, 100]}, "seeds and tuning_seeds must differ, both have [100]"),
        ({"seeds": [1, 1]}, "seeds: each once, got [1, 1]"),
        ({"methods": [{"rule": "gossip"}]}, "no rule 'gossip'; there are all_reduce,"),
        ({"methods": [{"rule": "d_psgd", "schedule": "x"}]}, "no schedule 'x'; there are "),
        ({"methods": [{"rule": "d_psgd"}]}, "rule d_psgd needs a schedule: base_k_plus_1,"),
        ({"methods": [{"rule": "easgd", "schedule": "ring"}]}, "easgd has its own schedule"),
        ({"methods": [{"rule": "easgd"}]}, "easgd needs rate"),
        ({"methods": [{"rule": "all_reduce", "period": 2}]}, "does not take period"),
        (
            {"methods": [{"rule": "d_psgd", "schedule": "ring", "degree": 2}]},
            "d_psgd over ring k=2 does not take degree",
        ),
        (
            {"methods": [{"rule": "push_sum", "schedule": "random_pull"}]},
            "push_sum over random_pull: who pushes",
        ),
        (
            {"methods": [{"rule": "all_reduce", "learning_rates": [1, 2]}]},
            "all_reduce: learning_rates must be 1, as for all methods",
        ),
        ({"methods": [{"rule": "no_mixing"}] * 2}, "methods: each once, got 'no_mixing' twice"),
        (
            {"workers": 6, "methods": [{"rule": "d_psgd", "schedule": "hypercube"}]},
            "the number of workers must be a power of two, got 6",
        ),
        (
            {"workers": 3, "methods": [{"rule": "d_psgd", "schedule": "pairs"}]},
            "the number of workers must be even, got 3",
        ),
        ({"faults": [{"dead_workers": 4}]}, "of 4 workers 4 cannot die"),
        ({"links": {"workers_per_slice": 3}}, "4 workers do not fill slices of 3"),
    ],
)
def test_an_impossible_comparison_is_refused_with_one_line(changes, message):
    with pytest.raises(ConfigError) as error:
        config_of(changes.pop("methods", [{"rule": "no_mixing"}]), **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_table_says_what_the_rows_say():
    config = config_of(METHODS, learning_rates=[0.1, 0.3, 0.5], seeds=[0, 1, 2])
    rows = rows_of(config)
    lines = grid_table.table_lines(config, rows)
    assert "softmax regression" in lines[0]
    heads, first, second = lines[3:6]
    assert len(heads) == len(first) == len(second)
    ring = [row for row in rows if row.rule == "d_psgd" and row.purpose == "result"]
    losses = [row.test_loss[-1] for row in ring]
    half = stats.sem(losses) * stats.t.ppf(0.975, 2)
    assert f"{np.mean(losses):.4g} ± {half:.2g}" in second
    gosgd = [row for row in rows if row.rule == "gosgd" and row.purpose == "result"]
    differences = [a - b.test_loss[-1] for a, b in zip(losses, gosgd, strict=True)]
    half = stats.sem(differences) * stats.t.ppf(0.975, 2)
    assert f"{np.mean(differences):.4g} ± {half:.2g}" in second
    assert ("0.5*" in second) == (ring[0].learning_rate == 0.5)


def test_losses_at_equal_bytes_lie_between_evaluations():
    assert grid_table.loss_at(15.0, [0, 10, 20], [3.0, 2.0, 1.0]) == 1.5
    assert grid_table.loss_at(99.0, [0, 10, 20], [3.0, 2.0, 1.0]) == 1.0
    assert np.isnan(grid_table.loss_at(15.0, [0, 10, 20], [3.0, 2.0, None]))


def test_each_row_has_its_line_with_what_is_left():
    config = config_of([{"rule": "all_reduce"}], learning_rates=[0.1, 0.5])
    rows = [dataclasses.replace(row, wall_seconds=90.0) for row in rows_of(config)]
    (line,) = grid_table.row_lines(config, rows[:1], 1)
    assert line.split()[0] == "1/3"
    assert line.endswith("3.0 min left")
    lines = grid_table.row_lines(config, rows, 2)
    assert [line.split()[0] for line in lines] == ["2/3", "3/3"]
    assert lines[1].endswith(" 0 s left")


def test_a_plot_of_few_seeds_and_diverged_runs_is_drawn():
    config = config_of([*METHODS, {"rule": "no_mixing"}], faults=[{}, {"drop": 0.5}])
    values = [vars(row) for row in rows_of(config)]
    values[1] = values[1] | {"test_loss": [1.0, None, None]}
    assert plot_grid(values)[:8] == b"\x89PNG\r\n\x1a\n"
