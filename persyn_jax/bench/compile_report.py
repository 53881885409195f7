"""What the compiler makes of the train step for TPU slices that are not there.

libtpu compiles for any slice on any machine, so collectives, code size and memory are known before
a pod is rented. Beside the schedule stands an all-reduce of the same model on the same chips, and
the program is checked: one collective-permute for each permutation and message, nothing gathered.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from persyn_jax.bench.hlo import KINDS, LINKS, Collective
from persyn_jax.bench.pod_programs import (
    ALL_REDUCE,
    Compiled,
    Program,
    chips_per_worker,
    compile_program,
)
from persyn_jax.bench.pod_shapes import PodShape
from persyn_jax.gossip.costs import LinkModel, costs, verdict
from persyn_jax.models.decoder import DecoderConfig, Params
from persyn_jax.training.config import TrainConfig
from persyn_jax.training.memory import trained_shapes
from persyn_jax.training.sharded import parameter_specs

INSIDE, WORKERS, SLICES = LINKS
NAME_WIDTH, CELL_WIDTH = 36, 15


@dataclass(frozen=True)
class Check:
    """A property of a program that must hold."""

    name: str
    expected: str
    found: str
    passed: bool


@dataclass(frozen=True)
class CollectiveCount:
    """How many collectives of a kind a program holds. Those in a loop count once."""

    kind: str
    link: str
    """`inside workers`, `between workers` (of a slice), or `between slices`."""
    asynchronous: int
    """Started and awaited apart, so that other work may go on meanwhile."""
    synchronous: int


@dataclass(frozen=True)
class ProgramReport:
    """A compiled train step. Bytes are those of one device, unless they say otherwise."""

    form: str
    """`bank`, `cycle`, `delayed cycle` or `all-reduce`, see `pod_programs.Program`."""
    rounds: int
    """Rounds that one run of the program goes through."""
    permutations: int
    """That the program holds, next to the identity. A `bank` serves any of them in any round."""
    messages: float
    """Collective-permutes of each permutation: the parameters in some groups, and a weight."""
    collectives: list[CollectiveCount]
    exchanges: int
    """Collectives between workers or slices."""
    overlapped: int
    """Of these, how many have a matrix product (or a loop of them) between start and end."""
    overlapped_part: float
    """Of their bytes."""
    code_bytes: int
    argument_bytes: int
    reused_bytes: int
    """Of the arguments, how much the results are written over."""
    temporary_bytes: int
    compile_seconds: float
    sent_between_workers: float
    """Bytes that a worker sends in a round, on average, inside its slice."""
    sent_between_slices: float
    """Bytes that a worker sends in a round, on average, to other slices."""
    exchange_seconds: float
    """Predicted by the link model, of a round in which something travels."""
    verdict: str
    """Whether gossip can pay against an all-reduce, by the same model."""
    checks: list[Check]


class Wire(NamedTuple):
    """One worker's trained parameters, as they cross between workers."""

    parameters: int
    leaves: int
    groups: int
    """Of leaves that share a message: of one dtype, one length of row on a chip, and cut along the
    same axes of the mesh."""
    sent_bytes: int
    """Of one copy of the model that leaves a worker; what is whole on every chip leaves each."""
    whole: int
    """Parameters that every chip of the worker holds."""


def wire(shapes: Params, mesh: Mesh) -> Wire:
    """How a worker of this mesh sends what it trains. shapes: of that, see
    `memory.trained_shapes`."""
    leaves = jax.tree.leaves(shapes)
    specs = jax.tree.leaves(
        parameter_specs(shapes, mesh), is_leaf=lambda value: isinstance(value, PartitionSpec)
    )
    parts = [
        NamedSharding(mesh, spec).shard_shape(leaf.shape)
        for leaf, spec in zip(leaves, specs, strict=True)
    ]
    sent = [math.prod(part) * leaf.dtype.itemsize for leaf, part in zip(leaves, parts, strict=True)]
    groups = {
        (leaf.dtype, part[1:][-1:], frozenset(jax.tree.leaves(tuple(spec))))
        for leaf, part, spec in zip(leaves, parts, specs, strict=True)
    }
    return Wire(
        parameters=sum(leaf.size for leaf in leaves),
        leaves=len(leaves),
        groups=len(groups),
        sent_bytes=chips_per_worker(mesh) * sum(sent),
        whole=sum(
            leaf.size for leaf, part in zip(leaves, parts, strict=True) if part == leaf.shape
        ),
    )


def report_program(
    program: Program,
    model: DecoderConfig,
    config: TrainConfig,
    mesh: Mesh,
    links: LinkModel,
) -> ProgramReport:
    """Compiles and reports."""
    compiled = compile_program(program, model, config, mesh)
    trained, _ = trained_shapes(model, config)
    sent = wire(trained, mesh)
    price = costs(program.schedule, sent.sent_bytes, links)
    judged = verdict(program.schedule, sent.sent_bytes, links)
    exchanges = [one for one in compiled.collectives if one.link != INSIDE]
    overlapped = [one for one in exchanges if one.products]
    permutations = len(program.permutations())
    return ProgramReport(
        form=program.form,
        rounds=program.schedule.rounds if program.is_unrolled else 1,
        permutations=permutations,
        messages=compiled.permutes_written / max(permutations, 1),
        collectives=count_collectives(compiled),
        exchanges=len(exchanges),
        overlapped=len(overlapped),
        overlapped_part=_bytes(overlapped) / max(_bytes(exchanges), 1),
        code_bytes=compiled.code_bytes,
        argument_bytes=compiled.argument_bytes,
        reused_bytes=compiled.reused_bytes,
        temporary_bytes=compiled.temporary_bytes,
        compile_seconds=compiled.compile_seconds,
        sent_between_workers=float(price.inside_T.mean()),
        sent_between_slices=float(price.between_T.mean()),
        exchange_seconds=judged.seconds,
        verdict=judged.sentence,
        checks=[] if program.form == ALL_REDUCE else checks(program, compiled, sent, links),
    )


def count_collectives(compiled: Compiled) -> list[CollectiveCount]:
    """Those that are there, by kind and link."""
    counts = []
    for kind in KINDS:
        for link in LINKS:
            found = [one for one in compiled.collectives if (one.kind, one.link) == (kind, link)]
            asynchronous = sum(one.is_asynchronous for one in found)
            if found:
                synchronous = len(found) - asynchronous
                counts.append(CollectiveCount(kind, link, asynchronous, synchronous))
    return counts


def checks(program: Program, compiled: Compiled, sent: Wire, links: LinkModel) -> list[Check]:
    """Shards meet shards and nothing more, whichever permutation a round wants."""

    def count(kind: str, link: str, above: int = 0) -> int:
        return sum(
            (one.kind, one.link) == (kind, link) and one.size > above
            for one in compiled.collectives
        )

    permutations = program.permutations()
    messages, rest = divmod(compiled.permutes_written, max(len(permutations), 1))
    inside, between = _links_used(permutations, links)
    found = count("collective-permute", WORKERS), count("collective-permute", SLICES)
    most = 1 + (sent.leaves if program.is_unrolled else 2 * sent.groups)
    # An exact mean between slices ends in an all-gather of each slice's part of it.
    gathers = count("all-gather", WORKERS) + count("all-gather", SLICES)
    of_means = count("all-reduce", SLICES, above=4)
    return [
        Check(
            "one program, with a collective-permute for each permutation and message",
            f"{inside} x {messages} between workers, {between} x {messages} between slices",
            f"{found[0]} and {found[1]}",
            rest == 0 and found == (inside * messages, between * messages),
        ),
        Check(
            "a message for each leaf, and one for the weights"
            if program.is_unrolled
            else "a message for each group of leaves, one for its rest, one for the weights",
            f"at most {most}",
            str(messages),
            messages <= most and (messages > 0 or not permutations),
        ),
        Check(
            "no all-gather between workers, but at the end of an exact mean",
            f"at most {of_means}",
            str(gathers),
            gathers <= of_means,
        ),
    ]


def _links_used(permutations: list[np.ndarray], links: LinkModel) -> tuple[int, int]:
    """How many permutations send anything inside slices, and how many between slices."""
    inside = between = 0
    for receivers_W in permutations:
        senders_W = np.arange(len(receivers_W))
        leaves_W = receivers_W // links.workers_per_slice != senders_W // links.workers_per_slice
        inside += bool((~leaves_W & (receivers_W != senders_W)).any())
        between += bool(leaves_W.any())
    return inside, between


def failures(reports: Sequence[ProgramReport]) -> list[str]:
    """A line for each check that failed."""
    return [
        f"{report.form}: {check.name}: expected {check.expected}, found {check.found}"
        for report in reports
        for check in report.checks
        if not check.passed
    ]


def shape_lines(shape: PodShape, schedule: str, sent: Wire) -> list[str]:
    """What was compiled for, as a person reads it."""
    chips = shape.chips_per_worker
    values = {
        "topology": f"{shape.slices} x {shape.topology}",
        "workers": f"{shape.workers}, {'a chip' if chips == 1 else f'{chips} chips'} each",
        "schedule": schedule,
        "parameters": f"{sent.parameters:,} that learn, {sent.sent_bytes / 1e6:.1f} MB to send",
    }
    if sent.whole and chips > 1:
        values["not cut"] = f"{sent.whole:,} of them, whole on every chip and sent by each"
    return [f"{name:<{NAME_WIDTH}}{value}" for name, value in values.items()]


def report_lines(reports: Sequence[ProgramReport]) -> list[str]:
    """The reports side by side as a person reads them, then the checks and the verdict."""
    places = [(kind, link) for link in reversed(LINKS) for kind in KINDS]
    always = [("collective-permute", WORKERS), ("all-gather", WORKERS), ("all-reduce", WORKERS)]
    table = [("form", [report.form for report in reports])]
    table += [(name, [cell(report) for report in reports]) for name, cell in _CELLS[:2]]
    for kind, link in places:
        counts = [_count(report, kind, link) for report in reports]
        if any(counts) or (kind, link) in always:
            table.append((f"{kind} {link}", [_count_cell(count) for count in counts]))
    table += [(name, [cell(report) for report in reports]) for name, cell in _CELLS[2:]]
    lines = [
        f"{name:<{NAME_WIDTH}}" + "".join(f"{cell:>{CELL_WIDTH}}" for cell in cells)
        for name, cells in table
    ]
    for report in reports:
        for check in report.checks:
            lines.append(f"{'ok' if check.passed else 'FAILED':<8}{report.form}: {check.name}")
            lines.append(f"{'':<8}expected {check.expected}; found {check.found}")
    return [*lines, *textwrap.wrap(reports[0].verdict, 96)]


_CELLS = (
    ("rounds in one run", lambda r: f"{r.rounds}"),
    ("permutations", lambda r: f"{r.permutations}"),
    ("overlapped by matrix products", lambda r: f"{r.overlapped} of {r.exchanges}"),
    ("  part of the bytes", lambda r: f"{r.overlapped_part:.0%}"),
    ("code, MB", lambda r: f"{r.code_bytes / 1e6:.1f}"),
    ("arguments, MB a device", lambda r: f"{r.argument_bytes / 1e6:.1f}"),
    ("  reused for results", lambda r: f"{r.reused_bytes / 1e6:.1f}"),
    ("temporary, MB a device", lambda r: f"{r.temporary_bytes / 1e6:.1f}"),
    ("compiled in, s", lambda r: f"{r.compile_seconds}"),
    ("sent a round, MB a worker", lambda r: f"{r.sent_between_workers / 1e6:.1f}"),
    ("  to other slices", lambda r: f"{r.sent_between_slices / 1e6:.1f}"),
    ("predicted ms of an exchange", lambda r: f"{r.exchange_seconds * 1e3:.3g}"),
)


def _count(report: ProgramReport, kind: str, link: str) -> CollectiveCount | None:
    return next((c for c in report.collectives if (c.kind, c.link) == (kind, link)), None)


def _count_cell(count: CollectiveCount | None) -> str:
    return f"{count.asynchronous} + {count.synchronous} sync" if count else "0"


def _bytes(found: Sequence[Collective]) -> int:
    return sum(one.size for one in found)
