"""The student's train step under a schedule, compiled for chips that need not be there."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from persyn_jax import gossip
from persyn_jax import mesh as meshes
from persyn_jax.bench.hlo import Collective, collectives
from persyn_jax.config import ConfigError
from persyn_jax.gossip import topologies
from persyn_jax.models import rows
from persyn_jax.models.decoder import DecoderConfig
from persyn_jax.training.config import TrainConfig
from persyn_jax.training.memory import trained_shapes
from persyn_jax.training.optimisers import make_optimiser
from persyn_jax.training.sharded import (
    INNER_AXES,
    batch_spec,
    every_worker,
    make_sharded_step,
    on_sharded_mesh,
    state_shardings,
    student_loss,
)
from persyn_jax.training.step import TrainStep, init_state, placed_shapes

DRAWN_ROUNDS = 64
"""Of random schedules: what they cost is averaged over so many."""

Rule = Callable[[gossip.Exchange], gossip.MixingTransformation]

SCHEDULES: dict[str, tuple[Rule, Callable[[int, int], gossip.Schedule]]] = {
    "gosgd": (gossip.gosgd, lambda w, t: topologies.gosgd_schedule(w, t, 1.0, seed=0)),
    "random_shift": (gossip.d_psgd, lambda w, t: topologies.random_shift(w, t, seed=0)),
    "random_xor": (gossip.d_psgd, lambda w, t: topologies.random_xor(w, t, seed=0)),
    "random_matching": (gossip.d_psgd, lambda w, t: topologies.random_matching(w, t, seed=0)),
    "ring": (gossip.d_psgd, topologies.ring),
    "static_exponential": (gossip.d_psgd, topologies.static_exponential),
    "one_peer_exponential": (gossip.d_psgd, topologies.one_peer_exponential),
    "hypercube": (gossip.d_psgd, topologies.hypercube),
    "base_2": (gossip.d_psgd, lambda w, t: topologies.base_k_plus_1(w, t, degree=1)),
    "base_4": (gossip.d_psgd, lambda w, t: topologies.base_k_plus_1(w, t, degree=3)),
    "complete": (gossip.d_psgd, topologies.complete),
}
"""By name: a rule, and a schedule of (workers, rounds). GoSGD's coins all come up: the round that
is priced is one in which everybody pushes."""

ALL_REDUCE = "all-reduce"


class Program(NamedTuple):
    """A train step to compile."""

    form: str
    """`bank`: any round, chosen at run time. `cycle`: the rounds of one period, one after the
    other, known to the compiler. `delayed cycle`: the same, what is exchanged being the parameters
    before the step, so that the exchange need not wait for the gradient. `all-reduce`."""
    rule: Rule
    schedule: gossip.Schedule

    @property
    def is_unrolled(self) -> bool:
        return self.form.endswith("cycle")

    def permutations(self) -> list[np.ndarray]:
        """int[W], the receivers: each permutation that the program holds, as often as it should."""
        bank, branches_TK = self.schedule.bank, self.schedule.branches_TK
        assert isinstance(bank, gossip.Bank)
        if self.is_unrolled:
            return list(bank.receivers_BW[branches_TK[branches_TK > 0]])
        return [row for part in bank.digits or (bank,) for row in part.receivers_BW[1:]]


@dataclass(frozen=True)
class Compiled:
    """What came out."""

    collectives: list[Collective]
    permutes_written: int
    """Collective-permutes in the program before the compiler touched it."""
    code_bytes: int
    argument_bytes: int
    """Train state, batch, round and the base of adapters, on one device."""
    reused_bytes: int
    """Of the arguments, how much the results are written over."""
    temporary_bytes: int
    """On one device."""
    compile_seconds: float


def programs(schedule: str, workers: int, with_cycle: bool) -> list[Program]:
    """The programs of a report: the schedule's, and an all-reduce to compare with.

    Raises ConfigError: no such schedule, not for so many workers, no period where one is needed.
    """
    if schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ConfigError(f"schedule {schedule!r}: no such schedule, there are {known}")
    rule, function = SCHEDULES[schedule]
    try:
        table = function(workers, DRAWN_ROUNDS)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if table.period:
        table = function(workers, table.period)
    chosen = [Program("bank", rule, table)]
    if with_cycle:
        if not table.period:
            raise ConfigError(f"schedule {schedule}: it is random, so there is no cycle to unroll")
        chosen.append(Program("cycle", rule, table))
        chosen.append(Program("delayed cycle", _delayed(rule), table))
    return [*chosen, Program(ALL_REDUCE, gossip.all_reduce, topologies.complete(workers, 1))]


def compile_program(
    program: Program, model: DecoderConfig, config: TrainConfig, mesh: Mesh
) -> Compiled:
    """Compiles the train step of `training` for the mesh, from shapes alone.

    Raises ConfigError as `adapters.adapter_shapes`.
    """
    lowered = _lower(program, model, config, mesh)
    started = time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - started
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None, "every XLA back end has it"
    assert memory is not None, "every XLA back end has it"
    return Compiled(
        collectives=collectives(text, chips_per_worker(mesh)),
        permutes_written=lowered.as_text().count("stablehlo.collective_permute"),
        code_bytes=memory.generated_code_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        reused_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        compile_seconds=round(seconds, 1),
    )


def chips_per_worker(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in INNER_AXES)


def _lower(
    program: Program, model: DecoderConfig, config: TrainConfig, mesh: Mesh
) -> jax.stages.Lowered:
    exchange = gossip.Exchange(program.schedule.bank, meshes.WORKER, INNER_AXES)
    mixing, optimiser = program.rule(exchange), make_optimiser(config.optimiser, steps=1)
    trained, base = trained_shapes(model, config)
    loss, specs, frozen_specs = student_loss(model, config, trained, base, mesh)
    step = make_sharded_step(loss, optimiser, mixing, mesh, specs, config.accumulate, frozen_specs)
    if program.is_unrolled:
        step = _unrolled(step, program.schedule)

    def start(_):
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), trained)
        return init_state(params, optimiser, mixing)

    def frozen_shape(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, config.compute_dtype, sharding=sharding)

    workers = jax.ShapeDtypeStruct((mesh.shape[meshes.WORKER],), np.int32)
    state = jax.eval_shape(jax.vmap(start), workers)
    any_round = jax.eval_shape(lambda row: row, program.schedule.round(0))
    return on_sharded_mesh(step, mesh, state, specs).lower(
        jax.tree.map(placed_shapes, state, state_shardings(state, mesh, specs)),
        _batch_shapes(program, config, mesh),
        placed_shapes(any_round, meshes.replicated(mesh)),
        *(jax.tree.map(frozen_shape, base, every_worker(own, mesh)) for own in frozen_specs),
    )


def _unrolled(step: TrainStep, schedule: gossip.Schedule) -> TrainStep:
    """As many steps as the schedule has rounds; batch and metrics have them as their axis 1."""

    def steps(state, batches, _, *frozen):
        taken = []
        for t in range(schedule.rounds):
            batch = jax.tree.map(lambda leaf, t=t: leaf[:, t], batches)
            state, metrics = step(state, batch, schedule.round(t), *frozen)
            taken.append(metrics)
        return state, jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *taken)

    return steps


def _delayed(rule: Rule) -> Rule:
    return lambda exchange: gossip.delayed(rule(exchange), exchange)


def _batch_shapes(program: Program, config: TrainConfig, mesh: Mesh) -> rows.Rows:
    """A batch of all workers (of each round, if they are unrolled): each chip along `fsdp` has
    `training.rows` rows, `training.accumulate` times."""
    count = config.rows * mesh.shape[meshes.FSDP]
    empty = rows.pack([[]] * count, config.row_tokens, config.row_response_tokens)
    rounds = (program.schedule.rounds,) if program.is_unrolled else ()
    leading = (*rounds, config.accumulate) if config.accumulate > 1 else rounds
    sharding = NamedSharding(mesh, batch_spec(mesh, leading=len(leading)))
    shape = (mesh.shape[meshes.WORKER], *leading)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((*shape, *leaf.shape), leaf.dtype, sharding=sharding),
        empty,
    )
