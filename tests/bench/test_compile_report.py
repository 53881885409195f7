"""The compile report, on host devices: what it says, and that it notices a bad program."""

import dataclasses
from pathlib import Path

import jax
import pytest

from persyn_jax.bench import pod_shapes
from persyn_jax.bench.compile_report import (
    checks,
    failures,
    report_lines,
    report_program,
    shape_lines,
    wire,
)
from persyn_jax.bench.hlo import Collective
from persyn_jax.bench.pod_programs import SCHEDULES, Compiled, programs
from persyn_jax.bench.pod_shapes import PodShape, link_model
from persyn_jax.config import ConfigError
from persyn_jax.gossip import theory
from persyn_jax.mesh import AXES, make_mesh
from persyn_jax.models import decoder
from persyn_jax.models.weights import RANDOM_TINY
from persyn_jax.training.config import LoraConfig, TrainConfig

MODEL = dataclasses.replace(RANDOM_TINY, layers=1)
PARAMS = jax.eval_shape(lambda: decoder.init(MODEL, jax.random.key(0)))
SIZE = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
LORA = LoraConfig(rank=2, targets=("q",))
SIZE_A = LORA.rank * MODEL.d_model
SIZE_B = MODEL.heads * MODEL.head_dim * LORA.rank
NORMS = 3 * MODEL.d_model  # of one layer and the last; small, so whole on every chip
LEAVES = len(jax.tree.leaves(PARAMS))


def reports_of(schedule, workers, shards, forms, **training):
    config = TrainConfig(rows=1, row_tokens=16, row_response_tokens=4, **training)
    links = link_model(PodShape("v5e:1x8", 1, workers))
    mesh = make_mesh(workers, *shards)
    return {
        program.form: report_program(program, MODEL, config, mesh, links)
        for program in programs(schedule, workers, with_cycle="delayed cycle" in forms)
        if program.form in forms
    }


@pytest.fixture(scope="module")
def whole():
    """A device a worker: the step that `train_student` runs."""
    return reports_of("gosgd", 4, (1, 1), ["bank", "all-reduce"])


@pytest.fixture(scope="module")
def sharded():
    """Four devices a worker; also with the rounds of a period unrolled."""
    return reports_of("hypercube", 2, (2, 2), ["bank", "delayed cycle"])


@pytest.fixture(scope="module")
def adapted():
    """As `whole`, with an adapter."""
    return reports_of("gosgd", 4, (1, 1), ["bank", "all-reduce"], lora=LORA)


@pytest.fixture(scope="module")
def adapted_and_sharded():
    """As `sharded`, with an adapter beside a base in bfloat16."""
    forms = ["bank", "delayed cycle"]
    return reports_of("hypercube", 2, (2, 2), forms, lora=LORA, compute_dtype="bfloat16")


def a_mesh(*shards):
    return jax.sharding.AbstractMesh((2, *shards), AXES)


def counted(report, kind, link):
    (count,) = [one for one in report.collectives if (one.kind, one.link) == (kind, link)] or [None]
    return count and count.asynchronous + count.synchronous


def test_a_program_holds_each_permutation_of_the_bank_once_a_message(whole):
    report = whole["bank"]
    assert (report.permutations, report.rounds) == (3, 1)
    assert report.messages == 4, "rows of d_model, rows of d_ff, vectors, and the sum weight"
    assert counted(report, "collective-permute", "between workers") == 12
    assert counted(report, "all-gather", "between workers") is None
    assert [check.passed for check in report.checks] == [True] * 3


def test_a_device_holds_one_worker_and_its_state_is_reused(whole):
    """Parameters and two moments in float32; batch, counts and sum weight are small beside them."""
    report, state = whole["bank"], 3 * 4 * SIZE
    assert state < report.argument_bytes < 1.1 * state
    assert state <= report.reused_bytes <= report.argument_bytes
    assert report.temporary_bytes > 0


def test_a_step_that_accumulates_is_compiled_as_it_is_trained(whole):
    """Its arguments are those of one batch, and the second batch, which nothing else grows by."""
    twice = reports_of("gosgd", 4, (1, 1), ["bank"], accumulate=2)["bank"]
    tokens, responses = 16, 4
    batch = 4 * (3 * tokens + 3 * responses)
    assert twice.argument_bytes - whole["bank"].argument_bytes == batch


def test_an_all_reduce_stands_beside_it(whole):
    report = whole["all-reduce"]
    assert report.permutations == 0
    assert counted(report, "collective-permute", "between workers") is None
    assert counted(report, "all-reduce", "between workers") >= 1
    assert report.checks == []


def test_adapters_alone_are_trained_and_sent(adapted):
    bank, all_reduce = adapted["bank"], adapted["all-reduce"]
    sent = 4 * (SIZE_A + SIZE_B)
    assert (bank.sent_between_workers, all_reduce.sent_between_workers) == (sent, 1.5 * sent)
    assert bank.messages == 3, "rows of d_model, rows of the rank, and the sum weight"
    assert counted(bank, "collective-permute", "between workers") == 9
    assert failures([bank]) == []
    held = 3 * sent + 4 * SIZE  # with two moments each, and the base
    assert held < bank.argument_bytes < 1.1 * held
    assert 3 * sent <= bank.reused_bytes < 3.5 * sent


def test_sharded_adapters_leave_their_base_where_it_lies(adapted_and_sharded):
    for report in adapted_and_sharded.values():
        assert failures([report]) == []
        assert counted(report, "all-gather", "inside workers") > 0
        assert counted(report, "reduce-scatter", "inside workers") is None, "it has no gradient"
        # lora_a is whole on each of the four chips, lora_b on each of two.
        assert report.sent_between_workers == 4 * (4 * SIZE_A + 2 * SIZE_B)
        held = 3 * 4 * (SIZE_A + SIZE_B // 2) + 2 * (SIZE + 3 * NORMS) // 4
        assert held < report.argument_bytes < 1.1 * held
    assert adapted_and_sharded["bank"].messages == 3
    assert adapted_and_sharded["delayed cycle"].messages == 1 + 2


def test_a_sharded_worker_gathers_inside_itself_and_sends_its_parts(sharded):
    for report in sharded.values():
        assert failures([report]) == []
        assert counted(report, "all-gather", "between workers") is None
        assert counted(report, "all-gather", "inside workers") > 0
        assert counted(report, "reduce-scatter", "inside workers") > 0
        # A quarter of the three copies, and little else.
        assert 3 * SIZE <= report.argument_bytes < 3.5 * SIZE
    assert sharded["bank"].messages < 1 + LEAVES
    assert sharded["delayed cycle"].messages == 1 + LEAVES
    assert sharded["delayed cycle"].rounds == sharded["delayed cycle"].permutations == 1


def test_what_is_sent_in_a_round_is_one_model_however_it_is_sharded(whole, sharded):
    for report, copies in ((whole["bank"], 1), (sharded["bank"], 4)):
        sent = 4 * (SIZE + (copies - 1) * NORMS)
        assert (report.sent_between_workers, report.sent_between_slices) == (sent, 0)
    assert whole["all-reduce"].sent_between_workers == 2 * 3 / 4 * 4 * SIZE


def test_parameters_that_cannot_be_cut_are_counted_and_sent_by_every_chip():
    cut, by_3 = wire(PARAMS, a_mesh(2, 2)), wire(PARAMS, a_mesh(3, 1))
    assert (cut.parameters, cut.leaves, cut.whole) == (SIZE, LEAVES, NORMS)
    assert cut.sent_bytes == 4 * (SIZE + 3 * NORMS)
    assert 0 < by_3.whole <= SIZE
    assert by_3.sent_bytes == 4 * (SIZE + 2 * by_3.whole)


def a_permute(link="between workers"):
    return Collective("collective-permute", link, True, 8, 0, "main")


def outcomes(found, written, with_slices=False):
    """Whether each check passes, for GoSGD on 4 workers: 3 permutations."""
    program = programs("gosgd", 4, with_cycle=False)[0]
    slices = 2 if with_slices else 1
    links = link_model(PodShape("v5e:1x2" if with_slices else "v5e:1x4", slices, 4))
    compiled = Compiled(found, written, 0, 0, 0, 0, 0.0)
    return [check.passed for check in checks(program, compiled, wire(PARAMS, a_mesh(1, 1)), links)]


def test_bad_programs_are_noticed():
    gather = Collective("all-gather", "between workers", True, 8, 0, "main")
    mean = Collective("all-reduce", "between slices", True, 64, 0, "main")
    inside = dataclasses.replace(gather, link="inside workers")
    assert outcomes([a_permute()] * 6, written=6) == [True, True, True]
    assert outcomes([a_permute()] * 5, written=6) == [False, True, True], "one was lost"
    assert outcomes([a_permute()] * 7, written=7) == [False, True, True], "one branch has more"
    assert outcomes([], written=0) == [True, False, True], "nobody sends anything"
    assert outcomes([a_permute()] * 30, written=30) == [True, False, True], "10 messages"
    assert outcomes([a_permute()] * 6 + [gather], written=6) == [True, True, False]
    assert outcomes([a_permute()] * 6 + [inside], written=6) == [True, True, True]
    # XOR with 1 stays in a slice of two, the others leave it.
    across = [a_permute()] * 2 + [a_permute("between slices")] * 4
    assert outcomes(across, written=6, with_slices=True) == [True, True, True]
    assert outcomes([a_permute()] * 6, written=6, with_slices=True)[0] is False
    assert outcomes([*across, gather, mean], written=6, with_slices=True) == [True, True, True]


def test_a_failed_check_is_a_line_that_says_what_was_found(whole):
    report = whole["bank"]
    bad = dataclasses.replace(report.checks[0], found="5 and 0", passed=False)
    report = dataclasses.replace(report, checks=[bad])
    (line,) = failures([report])
    assert line.startswith("bank: one program, with a collective-permute for each permutation")
    assert line.endswith("expected 3 x 4 between workers, 0 x 4 between slices, found 5 and 0")
    assert (
        f"FAILED  {bad.name}".split() == report_lines([report])[-4].split()[:1] + bad.name.split()
    )


def test_the_report_reads_as_lines_of_words(sharded):
    shape = PodShape("v5e:1x8", 1, 2)
    lines = [
        *shape_lines(shape, "hypercube", wire(PARAMS, a_mesh(4, 1))),
        *report_lines(list(sharded.values())),
    ]
    words = [" ".join(line.split()) for line in lines]
    assert "topology 1 x v5e:1x8" in words
    assert "workers 2, 4 chips each" in words
    assert "form bank delayed cycle" in words
    assert "all-gather between workers 0 0" in words
    assert any(line.startswith("Gossip can") for line in lines)
    assert all(len(line) < 100 for line in lines)


@pytest.mark.parametrize("workers", [2, 6, 8, 16, 256])
def test_every_schedule_makes_programs_or_says_why_not(workers):
    for name in SCHEDULES:
        if workers == 6 and name in ("random_xor", "hypercube"):
            with pytest.raises(ConfigError, match="power of two, got 6"):
                programs(name, workers, with_cycle=False)
            continue
        bank, *_ = programs(name, workers, with_cycle=False)
        assert bank.schedule.workers == workers
        assert bank.schedule.rounds == (bank.schedule.period or 64)
        permutations = bank.permutations()
        assert len(permutations) <= (30 if name == "gosgd" else workers)
        assert all(sorted(receivers) == list(range(workers)) for receivers in permutations)


def test_an_unrolled_cycle_holds_the_permutations_of_its_rounds_in_order():
    _, cycle, *_ = programs("one_peer_exponential", 8, with_cycle=True)
    assert theory.rounds_to_exact_consensus(cycle.schedule) == cycle.schedule.rounds == 3
    assert [receivers[0] for receivers in cycle.permutations()] == [1, 2, 4]


def test_bad_input_is_one_line():
    with pytest.raises(ConfigError, match="schedule 'gossip': no such schedule, there are gosgd, "):
        programs("gossip", 4, with_cycle=False)
    with pytest.raises(ConfigError, match="gosgd: it is random, so there is no cycle"):
        programs("gosgd", 4, with_cycle=True)


def test_the_environment_that_libtpu_wants_is_the_one_that_ci_sets():
    """The report brings it along, so that the command works without it too."""
    ci = (Path(__file__).parents[2] / ".ci" / "run").read_text()
    for name, value in pod_shapes._ENVIRONMENT.items():
        assert f"{name}={value}" in ci
