"""What the compiler makes of the student's train step for a TPU slice that is not there.

libtpu compiles for any slice on any machine, so collectives, code size and memory are known before
a pod is rented.
"""

import functools
import importlib.util
import os
import re
import time
from collections import Counter
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from persyn_jax import gossip
from persyn_jax import mesh as meshes
from persyn_jax.config import ConfigError
from persyn_jax.models import decoder, rows
from persyn_jax.models.decoder import DecoderConfig
from persyn_jax.training.batches import stack_workers
from persyn_jax.training.config import TrainConfig
from persyn_jax.training.loop import make_optimiser
from persyn_jax.training.losses import response_loss
from persyn_jax.training.step import init_state, make_train_step, on_mesh, placed_shapes

COLLECTIVES = ("collective-permute", "all-gather", "all-reduce", "reduce-scatter", "all-to-all")

# What libtpu looks for on a TPU machine before it compiles; without answers it waits for a network
# that is not there. The last one lets two processes compile at once.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class CompileReport:
    """A compiled train step. Bytes are those of one device."""

    workers: int
    """One on each device of the slice."""
    parameters: int
    """Of one worker."""
    permutations: int
    """In the bank, next to the identity: one program serves any of them in any round."""
    asynchronous: dict[str, int]
    """Collectives by name that are started and awaited apart, so that work may go on meanwhile."""
    synchronous: dict[str, int]
    code_bytes: int
    argument_bytes: int
    """Train state, batch and round."""
    reused_bytes: int
    """Of the arguments, how much the results are written over."""
    temporary_bytes: int
    compile_seconds: float


def slice_mesh(topology: str) -> Mesh:
    """A mesh of the devices of an absent TPU slice, such as `v5e:4x4`: a worker each.

    Raises ConfigError: libtpu is not installed, it knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("libtpu is not installed: `uv run --group aot` brings it")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    except RuntimeError as error:
        raise ConfigError(f"topology {topology!r}: {error}") from None
    return meshes.make_mesh(len(devices), devices=devices)


def compile_student_step(model: DecoderConfig, config: TrainConfig, mesh: Mesh) -> CompileReport:
    """Compiles the train step as `train_student` runs it, GoSGD included, from shapes alone."""
    workers = mesh.shape[meshes.WORKER]
    schedule = gossip.gosgd_schedule(workers, rounds=1, exchange_probability=1.0, seed=0)
    mixing = gossip.gosgd(schedule.bank, meshes.WORKER)
    optimiser = make_optimiser(config.optimiser, steps=1)
    loss = functools.partial(response_loss, model, config.recompute)
    step = on_mesh(make_train_step(loss, optimiser, mixing), mesh, (0, 0, None), donate=True)
    start = on_mesh(lambda params: init_state(params, optimiser, mixing), mesh, (0,))

    params = jax.eval_shape(lambda: decoder.init(model, jax.random.key(0)))
    params_W = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((workers, *leaf.shape), leaf.dtype), params
    )
    empty = rows.pack([[]] * config.rows, config.row_tokens, config.row_response_tokens)
    row, whole = meshes.per_worker(mesh), meshes.replicated(mesh)
    state = placed_shapes(jax.eval_shape(start, params_W), row)
    batch = placed_shapes(stack_workers([empty] * workers), row)
    started = time.monotonic()
    compiled = step.lower(state, batch, placed_shapes(schedule.round(0), whole)).compile()
    seconds = time.monotonic() - started

    program, memory = compiled.as_text(), compiled.memory_analysis()
    assert program is not None, "every XLA back end has it"
    assert memory is not None, "every XLA back end has it"
    asynchronous, synchronous = count_collectives(program)
    return CompileReport(
        workers=workers,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        permutations=len(schedule.bank.receivers) - 1,
        asynchronous=asynchronous,
        synchronous=synchronous,
        code_bytes=memory.generated_code_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        reused_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        compile_seconds=round(seconds, 1),
    )


def count_collectives(program: str) -> tuple[dict[str, int], dict[str, int]]:
    """(asynchronous, synchronous) collectives by name in a compiled program's HLO text."""
    found = Counter(re.findall(rf"\s({'|'.join(COLLECTIVES)})(-start)?\(", program))
    return (
        {name: found[name, "-start"] for name in COLLECTIVES},
        {name: found[name, ""] for name in COLLECTIVES},
    )


def complaint(report: CompileReport) -> str | None:
    """What is wrong with the program, if anything is: shards must meet shards, nothing more."""
    if not report.asynchronous["collective-permute"] + report.synchronous["collective-permute"]:
        return "the program holds no collective-permute: workers do not exchange anything"
    gathers = report.asynchronous["all-gather"] + report.synchronous["all-gather"]
    if gathers:
        return f"the program holds {gathers} all-gathers: parameters are collected on one device"
    return None


def report_lines(report: CompileReport) -> list[str]:
    """The report as a person reads it."""
    counts = {
        name: f"{report.asynchronous[name]} asynchronous, {report.synchronous[name]} synchronous"
        for name in COLLECTIVES
        if report.asynchronous[name] + report.synchronous[name]
        or name in ("collective-permute", "all-gather", "all-reduce")
    }
    values = {
        "workers": f"{report.workers}, a device each",
        "parameters": f"{report.parameters:,} a worker",
        "programs": f"1, with {report.permutations} permutations to choose from in each round",
        **counts,
        "code": f"{report.code_bytes / 1e6:.1f} MB",
        "arguments": f"{report.argument_bytes / 1e6:.1f} MB a device,"
        f" {report.reused_bytes / 1e6:.1f} MB of them reused for results",
        "temporary": f"{report.temporary_bytes / 1e6:.1f} MB a device",
        "compiled in": f"{report.compile_seconds} s",
    }
    return [f"{name:<20}{value}" for name, value in values.items()]
