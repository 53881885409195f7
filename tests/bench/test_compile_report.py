"""The compile report, on host devices: what it counts, and that it notices a bad program."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import lax

from persyn_jax.bench import compile_report
from persyn_jax.bench.compile_report import (
    COLLECTIVES,
    compile_student_step,
    complaint,
    count_collectives,
    report_lines,
    slice_mesh,
)
from persyn_jax.config import ConfigError
from persyn_jax.mesh import WORKER, make_mesh
from persyn_jax.models import decoder
from persyn_jax.models.weights import RANDOM_TINY
from persyn_jax.training.config import TrainConfig
from persyn_jax.training.step import on_mesh

PROGRAM = """
  %p = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, f32[8]{0}) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
  %d = f32[8]{0} collective-permute-done(%s)
  %c = f32[8]{0:T(8,128)} collective-permute(%d), channel_id=2
  ROOT %a = f32[16]{0} all-gather(%c), dimensions={0}, metadata={op_name="all-reduce(x)"}
"""


def test_collectives_are_counted_by_name_and_kind_and_once():
    asynchronous, synchronous = count_collectives(PROGRAM)
    assert {name: n for name, n in asynchronous.items() if n} == {"collective-permute": 1}
    assert {name: n for name, n in synchronous.items() if n} == {
        "collective-permute": 1,
        "all-gather": 1,
    }
    assert set(asynchronous) == set(synchronous) == set(COLLECTIVES)


@pytest.fixture(scope="module")
def report():
    config = TrainConfig(rows=1, row_tokens=16, row_response_tokens=4)
    return compile_student_step(RANDOM_TINY, config, make_mesh(4))


def test_the_student_step_exchanges_and_gathers_nothing(report):
    params = jax.eval_shape(lambda: decoder.init(RANDOM_TINY, jax.random.key(0)))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert (report.workers, report.permutations, report.parameters) == (4, 3, size)
    permutes = sum(kind["collective-permute"] for kind in (report.asynchronous, report.synchronous))
    assert permutes > 0
    assert permutes % report.permutations == 0, "each branch of the bank holds as many"
    assert complaint(report) is None


def test_a_device_holds_one_worker_and_its_state_is_reused(report):
    """Parameters and two moments in float32; batch, counts and sum weight are small beside them."""
    state = 3 * 4 * report.parameters
    assert state < report.argument_bytes < 1.05 * state
    assert state <= report.reused_bytes <= report.argument_bytes
    assert report.temporary_bytes > 0


def test_a_program_that_gathers_or_exchanges_nothing_is_complained_about(report):
    mesh = make_mesh(4)
    gathering = on_mesh(lambda x: lax.all_gather(x, WORKER).sum(axis=0), mesh, (0,))
    counts = count_collectives(gathering.lower(np.ones((4, 8), np.float32)).compile().as_text())
    bad = dataclasses.replace(report, asynchronous=counts[0], synchronous=counts[1])
    assert "no collective-permute" in complaint(bad)
    both = {name: report.synchronous[name] + counts[1][name] for name in COLLECTIVES}
    bad = dataclasses.replace(report, synchronous=both)
    assert "all-gather" in complaint(bad)


def test_the_report_reads_as_lines_of_words(report):
    lines = report_lines(report)
    words = [" ".join(line.split()) for line in lines]
    assert "all-gather 0 asynchronous, 0 synchronous" in words
    assert "programs 1, with 3 permutations to choose from in each round" in words
    assert all(len(line) < 100 for line in lines)


def test_without_libtpu_one_line_says_where_it_comes_from(monkeypatch):
    monkeypatch.setattr(compile_report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="libtpu is not installed: `uv run --group aot`"):
        slice_mesh("v5e:4x4")


def test_the_environment_that_libtpu_wants_is_the_one_that_ci_sets():
    """The report brings it along, so that the command works without it too."""
    ci = (Path(__file__).parents[2] / ".ci" / "run").read_text()
    for name, value in compile_report._ENVIRONMENT.items():
        assert f"{name}={value}" in ci
