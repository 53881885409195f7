"""Stage train_student: fine-tuning on the routed answers, by workers that gossip."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from persyn_jax import gossip
from persyn_jax import mesh as meshes
from persyn_jax.config import ConfigError
from persyn_jax.gossip import elastic
from persyn_jax.gossip.theory import contraction
from persyn_jax.models.adapters import Adapters, init_adapters, merge
from persyn_jax.models.decoder import Params
from persyn_jax.models.rows import Conversation, Rows
from persyn_jax.models.weights import Model
from persyn_jax.records import Answer
from persyn_jax.streams import numpy_stream
from persyn_jax.training.batches import (
    Row,
    batch_rows,
    first_fit,
    hold_out,
    make_plan,
    step_batch,
    with_steps,
)
from persyn_jax.training.checkpoint import Restored, restore_newest, saver
from persyn_jax.training.config import GossipConfig, TrainConfig
from persyn_jax.training.loop import (
    Taken,
    run_steps,
    stop_on_sigterm,
    uniform_mean,
    watchdog,
)
from persyn_jax.training.meters import Part, speed_row, time_exchange, timed, training_flops
from persyn_jax.training.optimisers import make_optimiser
from persyn_jax.training.profiling import profiled
from persyn_jax.training.sharded import (
    INNER_AXES,
    all_workers,
    batch_spec,
    check_mesh,
    every_worker,
    make_sharded_step,
    on_sharded_mesh,
    sharded_losses,
    sharded_mixing,
    state_shardings,
    student_loss,
)
from persyn_jax.training.step import (
    LossFunction,
    StepMetrics,
    TrainState,
    compiled_programs,
    init_state,
    placed_shapes,
)


@dataclass(frozen=True)
class StudentTraining:
    """What the student's training needs to know."""

    training: TrainConfig
    gossip: GossipConfig
    seed: int


@dataclass(frozen=True)
class _Tuning:
    """How the student is trained: whole, or by adapters beside a frozen base."""

    params: Params
    """What one worker starts from."""
    specs: Params
    """How it is cut among a worker's chips."""
    loss: LossFunction
    frozen: tuple[Params, ...] = ()
    """What the loss takes besides parameters and batch, placed: nothing, or the base."""
    frozen_specs: tuple[Params, ...] = ()
    adapters: int | None = None
    """How many parameters the adapters have."""


@dataclass(frozen=True)
class Trained:
    """A finished training, and what was counted on the way."""

    model: Model
    """The uniform mean of the workers; of LoRA, merged into the student."""
    adapters: Adapters | None
    """Of LoRA: that mean itself."""
    compiled_programs: int
    """Of the train step."""
    held_out: list[int]
    """Indices of the conversations that were held out."""
    steps: int
    """Taken in all."""


def train_student(
    load_student: Callable[[], Model],
    conversations: Sequence[Conversation],
    config: StudentTraining,
    mesh: Mesh,
    checkpoints: Path,
    on_start: Callable[[int, int], None],
    on_metrics: Callable[[dict[str, Any]], None],
    profiles: Path,
) -> Trained:
    """Trains from the newest intact checkpoint, or from the start.

    load_student: called when the parameters are needed; they are kept by the workers alone, so
    after a training by LoRA it is called again.
    on_start(first step, steps) is called before the first step, on_metrics(row) after each.
    profiles: folder for the profile of `training.profile_steps`.

    All processes of a run call it together. The checkpoint may be one of another number of workers
    or of another mesh. SIGTERM ends the training after the step that runs, with a checkpoint.

    Raises KeyboardInterrupt after a SIGTERM; RuntimeError: too few conversations, no checkpoint
    intact; ValueError: a conversation that no row has room for; ConfigError: a mesh that cannot
    divide the model.
    """
    c, workers = config.training, mesh.shape[meshes.WORKER]
    train, held_out = hold_out(conversations, c.held_out, config.seed)
    if not held_out or len(train) < workers:
        raise RuntimeError(
            f"{len(conversations)} usable answers: training needs one for each of {workers} "
            "workers and one for the held-out loss"
        )
    examples = [conversations[index] for index in train]

    student = load_student()
    check_mesh(student.config, c.rows, c.row_response_tokens, mesh)
    tuning = _tuning(student, c, config.seed, mesh)
    specs = tuning.specs
    restored = restore_newest(
        checkpoints, lambda saved: _state_like(tuning.params, config, mesh, specs, saved)
    )
    segments = restored.segments if restored else ()
    plan = make_plan(examples, c, workers, config.seed, segments)
    schedule, steps = _schedule(workers, len(plan), config), len(plan)
    optimiser, mixing = make_optimiser(c.optimiser, steps), _mixing(schedule, config.gossip.audit)
    state = _first_state(tuning.params, restored, optimiser, mixing, mesh, specs)
    first = restored.steps if restored else 0
    del restored
    student, tuning = replace(student, params={}), replace(tuning, params={})
    train_step = make_sharded_step(
        tuning.loss, optimiser, mixing, mesh, specs, c.accumulate, tuning.frozen_specs
    )
    compiled = on_sharded_mesh(train_step, mesh, state, specs)
    measure = _make_measure(tuning, [conversations[index] for index in held_out], c, mesh)
    predicted, kind = contraction(schedule).mean_per_round, mesh.devices.flat[0].device_kind
    exchange_seconds = None
    if c.time_exchange:
        exchange_seconds = _exchange_seconds(state, mixing, schedule, mesh, specs)
    on_start(first, steps)

    def step(*arguments: Any) -> tuple[TrainState, StepMetrics]:
        return compiled(*arguments, *tuning.frozen)

    def batch_at(number: int) -> Rows:
        return meshes.place_workers(
            lambda worker: step_batch(examples, plan[number][worker], c),
            NamedSharding(mesh, batch_spec(mesh, leading=int(c.accumulate > 1))),
            workers,
        )

    with (
        saver(checkpoints, c.async_checkpoints) as checkpoint,
        stop_on_sigterm() as stops,
        watchdog(c.step_seconds) as begins,
        profiled(c.profiled, profiles) as before_step,
    ):
        before_step(first)
        saving: dict[Part, float] = {}  # of the checkpoint since the last row
        for taken in run_steps(step, state, batch_at, schedule, range(first, steps), mesh):
            done, last = taken.number + 1, taken.number == steps - 1
            row = _metrics_row(taken) | _exchange_row(taken, schedule, mesh)
            if last or taken.number % c.measure_every == 0:
                row |= measure(taken.state)
                row |= _contraction_row(row, predicted)
            tokens, responses = _tokens(examples, plan[taken.number])
            counts = tokens, responses, c.row_tokens
            flops = training_flops(student.config, *counts, tuning.adapters)
            seconds = {**taken.seconds, **saving}
            speed = speed_row(seconds, tokens, flops, kind, mesh.size, exchange_seconds)
            # Before the checkpoint: who goes on from there does not tell of this step again.
            on_metrics(row | {"tokens": tokens, "measured": speed})
            saving = {}
            stop = not last and stops()
            if stop or (not last and done % c.checkpoint_every == 0):
                with timed(saving, "checkpoint"):
                    checkpoint.save(done, taken.state, with_steps(segments, workers, done))
            if stop:
                checkpoint.finish()
                raise KeyboardInterrupt
            before_step(done)
            begins(done)
    programs = compiled_programs(compiled)
    assert programs <= 1, f"one batch shape must compile one program, compiled {programs}"
    mean, adapters = uniform_mean(taken.state.params, mesh), None
    if c.lora is not None:
        adapters = Adapters(mean, c.lora.alpha)
        mean = merge(load_student().params, adapters)
    return Trained(replace(student, params=mean), adapters, programs, held_out, steps)


def _tuning(student: Model, c: TrainConfig, seed: int, mesh: Mesh) -> _Tuning:
    params, model = student.params, student.config
    if c.lora is None:
        loss, specs, _ = student_loss(model, c, params, {}, mesh)
        return _Tuning(params, specs, loss)
    adapters = init_adapters(model, c.lora.rank, c.lora.targets, seed, "student adapter")
    loss, specs, frozen_specs = student_loss(model, c, adapters, params, mesh)
    base = jax.tree.map(lambda leaf: leaf.astype(jax.numpy.dtype(c.compute_dtype)), params)
    return _Tuning(
        params=adapters,
        specs=specs,
        loss=loss,
        frozen=(meshes.place(base, every_worker(frozen_specs[0], mesh)),),
        frozen_specs=frozen_specs,
        adapters=sum(leaf.size for leaf in jax.tree.leaves(adapters)),
    )


def draw_answers(answers: Sequence[Answer], count: int | None, seed: int) -> list[Answer]:
    """`count` of the usable answers (None: all), in their order.

    Drawn by prompts, usable or not: so two lists of answers to the same prompts differ in what is
    drawn only where they differ in what is usable. Raises ConfigError where fewer are usable.
    """
    usable = [answer for answer in answers if answer.usable]
    if count is None:
        return usable
    if len(usable) < count:
        raise ConfigError(f"training.examples {count}: only {len(usable)} answers are usable")
    order = numpy_stream(seed, "training examples").permutation(len(answers)).tolist()
    drawn = [index for index in order if answers[index].usable][:count]
    return [answers[index] for index in sorted(drawn)]


def _schedule(workers: int, rounds: int, config: StudentTraining) -> gossip.Schedule:
    probability = config.gossip.exchange_probability
    return gossip.gosgd_schedule(workers, rounds, probability, config.seed)


def _mixing(schedule: gossip.Schedule, audit: bool) -> gossip.MixingTransformation:
    exchange = gossip.Exchange(schedule.bank, meshes.WORKER, INNER_AXES)
    rule = gossip.gosgd(exchange)
    return gossip.audited(rule, gossip.sum_weight_mass, exchange) if audit else rule


def _state_like(
    params: Params, config: StudentTraining, mesh: Mesh, specs: Params, workers: int
) -> TrainState:
    """Shapes and shardings of a state of `workers`; whole along that axis unless they are the
    mesh's."""
    # What a state looks like does not depend on how many steps and rounds there are.
    optimiser = make_optimiser(config.training.optimiser, 1)
    mixing = _mixing(_schedule(workers, 1, config), config.gossip.audit)

    def start(_):
        return init_state(params, optimiser, mixing)

    shapes = jax.eval_shape(jax.vmap(start), jax.ShapeDtypeStruct((workers,), np.int32))
    shardings = state_shardings(shapes, mesh, specs, workers == mesh.shape[meshes.WORKER])
    return jax.tree.map(placed_shapes, shapes, shardings)


def _first_state(
    params: Params,
    restored: Restored | None,
    optimiser: optax.GradientTransformation,
    mixing: gossip.MixingTransformation,
    mesh: Mesh,
    specs: Params,
) -> TrainState:
    """The state to go on from: of `params`, or as restored, for the mesh's workers."""
    workers = mesh.shape[meshes.WORKER]

    def start(params):
        return jax.vmap(lambda own: init_state(own, optimiser, mixing))(params)

    if restored is not None and restored.segments[-1].workers == workers:
        return restored.state
    if restored is None:
        params_W = meshes.place_copies(params, all_workers(specs, mesh), workers)
        shardings = state_shardings(jax.eval_shape(start, params_W), mesh, specs)
        return jax.jit(start, out_shardings=shardings, donate_argnums=(0,))(params_W)
    saved = meshes.read(restored.state, mesh)
    (own_params, opt_state), sum_weight_W = elastic.resize(
        (saved.params, saved.opt_state), _sum_weights(saved.mix_state), workers
    )
    params_W = meshes.place(own_params, all_workers(specs, mesh))
    shardings = state_shardings(jax.eval_shape(start, params_W), mesh, specs)
    state = jax.jit(start, out_shardings=shardings, donate_argnums=(0,))(params_W)
    weights = meshes.place(sum_weight_W, _sum_weights(shardings.mix_state))
    return replace(
        state,
        opt_state=meshes.place(opt_state, shardings.opt_state),
        mix_state=_with_sum_weights(state.mix_state, weights),
    )


def _sum_weights(mix_state: Any) -> Any:
    inner = mix_state.inner if isinstance(mix_state, gossip.AuditState) else mix_state
    return inner.sum_weight


def _with_sum_weights(mix_state: Any, sum_weight_W: Any) -> Any:
    if isinstance(mix_state, gossip.AuditState):
        return mix_state._replace(inner=_with_sum_weights(mix_state.inner, sum_weight_W))
    return mix_state._replace(sum_weight=sum_weight_W)


def _exchange_seconds(
    state: TrainState,
    mixing: gossip.MixingTransformation,
    schedule: gossip.Schedule,
    mesh: Mesh,
    specs: Params,
) -> float | None:
    """Of one exchange in which somebody sends, on its own; None if there is no such round."""
    busy = [t for t in range(schedule.rounds) if schedule.round(t).branch_K.any()]
    if not busy:
        return None
    mix = jax.jit(sharded_mixing(mixing, mesh, specs))
    none = jax.tree.map(jax.numpy.zeros_like, state.params)
    round = meshes.place(schedule.round(busy[0]), meshes.replicated(mesh))
    return time_exchange(mix, none, state.mix_state, state.params, round)


def _metrics_row(taken: Taken) -> dict[str, Any]:
    """A line of metrics.jsonl; the loss of a worker is null where its batch was empty."""
    loss_W, weight_W, norm_W = (field.tolist() for field in taken.metrics)
    return {
        "step": taken.number,
        "loss": [loss if weight else None for loss, weight in zip(loss_W, weight_W, strict=True)],
        "gradient_norm": norm_W,
    }


def _exchange_row(taken: Taken, schedule: gossip.Schedule, mesh: Mesh) -> dict[str, Any]:
    """What a line of metrics.jsonl says of the exchange, bytes over all workers.

    In a permutation everyone sends, also those whose message has no weight: wire against useful.
    The estimate of the consensus distance is from the distances of those that heard something to
    what they heard, for free; null where nobody did.
    """
    round = schedule.round(taken.number)
    workers = round.weight_KW.shape[1]
    mix_state = meshes.read(taken.state.mix_state, mesh)
    if isinstance(mix_state, gossip.AuditState):
        gossip.check_audit(mix_state)
        mix_state = mix_state.inner
    heard_W = (round.weight_KW > 0).sum(axis=0)
    pushes = int(heard_W.sum())
    model_bytes = sum(leaf.nbytes // workers for leaf in jax.tree.leaves(taken.state.params))
    estimate = None
    if pushes:
        distance_W = mix_state.pair_distance
        estimate = float(gossip.divergence.estimated_consensus_distance(distance_W, heard_W))
    return {
        "sum_weight": mix_state.sum_weight.tolist(),
        "pushes": pushes,
        "wire_bytes": int(np.count_nonzero(round.branch_K)) * workers * model_bytes,
        "useful_bytes": pushes * model_bytes,
        "estimated_consensus_distance": estimate,
    }


def _contraction_row(row: dict[str, Any], predicted: float) -> dict[str, Any]:
    """The factor of the consensus distance in this step's exchange: that of the exact distance
    after it to the free estimate of that before, beside the schedule's expected one."""
    before = row["estimated_consensus_distance"]
    measured = row["consensus_distance"] / before if before else None
    return {"predicted_contraction": predicted, "measured_contraction": measured}


def _tokens(examples: Sequence[Conversation], rows_by_worker: list[list[Row]]) -> tuple[int, int]:
    """Tokens of one step's rows over all workers, and how many of them are of responses."""
    seen = [examples[index] for own in rows_by_worker for row in own for index in row]
    return sum(one.length for one in seen), sum(len(one.response) for one in seen)


def _make_measure(
    tuning: _Tuning, held_out: list[Conversation], config: TrainConfig, mesh: Mesh
) -> Callable[[TrainState], dict[str, Any]]:
    """A function of the state: held-out loss by worker, and the parameters' consensus distance,
    in all and by group (the top level of the tree)."""
    packed = first_fit(held_out, list(range(len(held_out))), config)
    packed += [[]] * (-len(packed) % mesh.shape[meshes.FSDP])
    workers, spec = mesh.shape[meshes.WORKER], batch_spec(mesh)
    batch = meshes.place_workers(
        lambda _: batch_rows(held_out, packed, config), NamedSharding(mesh, spec), workers
    )
    losses = sharded_losses(tuning.loss, mesh, tuning.specs, tuning.frozen_specs)

    def all_of(params, batch, *frozen):
        loss_W = losses(params, batch, *frozen)
        distances = {
            group: jax.vmap(
                lambda own: gossip.consensus_distance(own, meshes.WORKER), axis_name=meshes.WORKER
            )(part)[0]
            for group, part in params.items()
        }
        return loss_W, distances

    compiled = jax.jit(all_of, out_shardings=meshes.replicated(mesh))

    def measure(state: TrainState) -> dict[str, Any]:
        loss_W, by_group = jax.tree.map(np.asarray, compiled(state.params, batch, *tuning.frozen))
        return {
            "held_out_loss": loss_W.tolist(),
            "consensus_distance": float(sum(by_group.values())),
            "consensus_distance_by_group": {g: float(value) for g, value in by_group.items()},
        }

    return measure
