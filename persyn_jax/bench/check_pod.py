"""Five minutes on whatever devices somebody has: does gossip do there what it should?

Bits, sums and averages are held against NumPy; the time of a step is measured with and without
gossip. Every process of a multi-process run computes the same values and comes to the same verdict.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import platform as host
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from pydantic import Field

from persyn_jax import gossip
from persyn_jax import mesh as meshes
from persyn_jax.config import config_class, to_values
from persyn_jax.gossip.theory import predicted_consensus_of_table
from persyn_jax.mesh import WORKER, Platform
from persyn_jax.models import decoder, rows
from persyn_jax.models.decoder import DecoderConfig
from persyn_jax.streams import jax_stream, numpy_stream
from persyn_jax.training.batches import stack_workers
from persyn_jax.training.config import OptimiserConfig
from persyn_jax.training.losses import response_loss
from persyn_jax.training.optimisers import make_optimiser
from persyn_jax.training.step import compiled_programs, init_state, make_train_step, on_mesh

WORKERS_ON_ONE_DEVICE = 8
STARTUP = 10
"""1 / this of the rounds is not counted in the consensus distance, which rises from 0 there."""
FACTOR_TOLERANCE, LEVEL_TOLERANCE = 0.02, 0.05
"""Of measured against predicted contraction of a round, and consensus distance. The parameters are
random and finite in number, so neither is met exactly."""
WARM_UP = 2
"""Steps of each kind that are not timed: the first compiles."""
RULES = {"no gossip": gossip.no_mixing, "gossip": gossip.gosgd, "all-reduce": gossip.all_reduce}
PACKAGES = ("persyn-jax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")


@config_class
class CheckPodConfig:
    """What to check, and where."""

    platform: Platform
    host_devices: Annotated[int, Field(ge=1)] = 8
    """Devices of each process where the platform is the CPU, which can show any number."""
    seed: int = 0
    rounds: Annotated[int, Field(ge=10)] = 300
    """Of random gossip, for mass and consensus."""
    dimension: Annotated[int, Field(ge=1)] = 4096
    """Of the parameters there."""
    steps: Annotated[int, Field(ge=1)] = 20
    """Timed train steps of each kind."""
    layers: Annotated[int, Field(ge=1)] = 4
    """Of the decoder that they train."""
    width: Annotated[int, Field(ge=32, multiple_of=32)] = 256
    """Of the decoder."""
    rows: Annotated[int, Field(ge=1)] = 2
    """Of a batch, per worker."""
    row_tokens: Annotated[int, Field(ge=4)] = 128


@dataclass(frozen=True)
class Check:
    """A property that must hold."""

    name: str
    expected: str
    measured: float
    passed: bool


@dataclass(frozen=True)
class StepTime:
    """Wall-clock time of a train step."""

    rule: str
    """`no gossip`, `gossip` (GoSGD, everybody pushes in every step), or `all-reduce`."""
    median_ms: float
    fastest_ms: float
    ratio: float
    """Of the median to that without gossip."""


class Workers(NamedTuple):
    """The workers of a check: a device each, or all on the only device there is."""

    count: int
    mesh: Mesh

    @property
    def share_a_device(self) -> bool:
        return self.mesh.size < self.count


def all_workers() -> Workers:
    """One for each device of all processes; some, to have any to talk to, on a single device."""
    devices = jax.device_count()
    return Workers(devices if devices > 1 else WORKERS_ON_ONE_DEVICE, meshes.make_mesh(devices))


def run_checks(config: CheckPodConfig, workers: Workers) -> Iterator[Check]:
    """The checks, each as soon as it is done."""
    yield from check_exchange(config, workers)
    yield from check_mixing(config, workers)


def check_exchange(config: CheckPodConfig, workers: Workers) -> Iterator[Check]:
    """Every permutation of the bank of all pairs, held against NumPy bit by bit."""
    bank = gossip.gosgd_schedule(workers.count, 0, 1.0, config.seed).bank
    assert isinstance(bank, gossip.Bank)
    draw = numpy_stream(config.seed, "pod payload")
    payload_WN = draw.integers(2**32, size=(workers.count, 1024), dtype=np.uint32)
    payload = meshes.place(payload_WN, meshes.per_worker(workers.mesh))
    send = everywhere(
        lambda bits_N, branch: gossip.receive(bits_N, branch, bank, WORKER), (0, None), workers
    )
    wrong = 0
    for branch in range(bank.branches):
        received = send(payload, meshes.place(np.int32(branch), meshes.replicated(workers.mesh)))
        is_wrong_WN = meshes.read(received, workers.mesh) != payload_WN[bank.senders_BW[branch]]
        wrong += int(is_wrong_WN.any(axis=1).sum())
    yield Check("messages that differ from NumPy's permutation", "0", wrong, wrong == 0)
    programs = compiled_programs(send)
    name = f"programs compiled for {bank.branches} permutations"
    yield Check(name, "1", programs, programs == 1)


def check_mixing(config: CheckPodConfig, workers: Workers) -> Iterator[Check]:
    """GoSGD with single coins of 1/2, without updates and with random ones."""
    schedule = gossip.gosgd_schedule(workers.count, config.rounds, 0.5, config.seed)
    start_WN = (
        numpy_stream(config.seed, "pod start")
        .normal(size=(workers.count, config.dimension))
        .astype(np.float32)
    )
    run = gossip_program(schedule, config.seed, workers)
    still = run(start_WN, 0.0)

    weights = np.unique(still.weight_WT.sum(axis=0, dtype=np.float64))
    spread = float(weights.max() - weights.min())
    yield Check("change of the total sum weight", "0", spread, spread == 0)

    weight_WT = still.weight_WT.astype(np.float64)
    before, after = weight_WT[:, 0] @ start_WN, weight_WT[:, -1] @ still.params_WN
    drift = float(np.abs(after - before).max() / np.abs(start_WN).max())
    allowed = config.rounds * float(np.finfo(np.float32).eps)
    yield Check("drift of the weighted mean", f"<= {allowed:.1e}", drift, drift <= allowed)

    identity_WW = np.eye(workers.count)
    predicted_T = predicted_consensus_of_table(schedule, 0.0, identity_WW, sum_weights=True)
    last = int(np.flatnonzero(predicted_T >= predicted_T[0] / 1000)[-1])
    expected = _per_round(predicted_T, last)
    factor = _per_round(still.distance_T, last)
    yield Check(
        f"contraction a round, over {last} rounds",
        f"{expected:.4f} +- {FACTOR_TOLERANCE:.0%}",
        factor,
        abs(factor - expected) <= FACTOR_TOLERANCE * expected,
    )

    moving = run(np.zeros_like(start_WN), 1.0)
    predicted_T = predicted_consensus_of_table(schedule, sum_weights=True)
    begin = config.rounds // STARTUP
    level, expected = moving.distance_T[begin:].mean(), predicted_T[begin:].mean()
    level /= config.dimension
    yield Check(
        "consensus distance under random updates",
        f"{expected:.4g} +- {LEVEL_TOLERANCE:.0%}",
        float(level),
        bool(abs(level - expected) <= LEVEL_TOLERANCE * expected),
    )


class GossipRun(NamedTuple):
    """What a run of gossip left behind, on every process."""

    params_WN: np.ndarray
    weight_WT: np.ndarray
    """Sum weights before the first round and after each."""
    distance_T: np.ndarray
    """Consensus distance before the first round and after each."""


def gossip_program(
    schedule: gossip.Schedule, seed: int, workers: Workers
) -> Callable[[np.ndarray, float], GossipRun]:
    """A function of (float32[W, N], noise): all rounds of GoSGD from there on, in one program.

    Each worker's updates are noise times N(0, 1).
    """
    mixing = gossip.gosgd(gossip.Exchange(schedule.bank, WORKER))
    key = jax_stream(seed, "pod noise")

    def all_rounds(x_N, mix_state, noise, table):
        me = lax.axis_index(WORKER)

        def one_round(carry, row):
            x_N, mix_state = carry
            own_key = jax.random.fold_in(jax.random.fold_in(key, row.index), me)
            updates_N = noise * jax.random.normal(own_key, x_N.shape)
            x_N, mix_state = mixing.update(updates_N, mix_state, x_N, row)
            distance = gossip.consensus_distance(x_N, WORKER)
            return (x_N, mix_state), (mix_state.sum_weight, distance)

        first = mix_state.sum_weight, gossip.consensus_distance(x_N, WORKER)
        (x_N, _), later = lax.scan(one_round, (x_N, mix_state), table)
        weight_T, distance_T = (
            jnp.concatenate([one[None], rest]) for one, rest in zip(first, later, strict=True)
        )
        return x_N, weight_T, distance_T

    row, whole = meshes.per_worker(workers.mesh), meshes.replicated(workers.mesh)
    table = meshes.place(schedule.table(), whole)
    start = everywhere(mixing.init, (0,), workers)
    compiled = everywhere(all_rounds, (0, 0, None, None), workers)

    def run(start_WN: np.ndarray, noise: float) -> GossipRun:
        x_WN = meshes.place(start_WN, row)
        results = compiled(x_WN, start(x_WN), meshes.place(np.float32(noise), whole), table)
        params_WN, weight_WT, distance_WT = (
            meshes.read(result, workers.mesh) for result in results
        )
        return GossipRun(params_WN, weight_WT, distance_WT[0])

    return run


def time_steps(config: CheckPodConfig, workers: Workers) -> list[StepTime]:
    """Train steps of a small decoder, those of the three rules in turn.

    Raises FloatingPointError if a loss is not finite.
    """
    model = DecoderConfig(
        vocab_size=4096,
        layers=config.layers,
        d_model=config.width,
        d_ff=4 * config.width,
        heads=config.width // 32,
        kv_heads=config.width // 32,
        head_dim=32,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tied_embeddings=True,
        max_positions=config.row_tokens,
    )
    rounds = WARM_UP + config.steps
    schedule = gossip.gosgd_schedule(workers.count, rounds, 1.0, config.seed)
    exchange = gossip.Exchange(schedule.bank, WORKER)
    optimiser = make_optimiser(OptimiserConfig(), rounds)
    loss = functools.partial(response_loss, model, "nothing")
    batch = meshes.place(_batch(config, workers.count, model), meshes.per_worker(workers.mesh))
    key = jax_stream(config.seed, "pod decoder")
    params = everywhere(lambda _: decoder.init(model, key), (0,), workers)(batch)
    steps, states, seconds = {}, {}, {}
    for name, rule in RULES.items():
        mixing = rule(exchange)
        start = functools.partial(init_state, optimiser=optimiser, mixing=mixing)
        states[name] = everywhere(start, (0,), workers)(params)
        train_step = make_train_step(loss, optimiser, mixing)
        steps[name] = everywhere(train_step, (0, 0, None), workers, donate=True)
        seconds[name] = []
    for number in range(rounds):
        any_round = meshes.place(schedule.round(number), meshes.replicated(workers.mesh))
        for name in RULES:
            began = time.perf_counter()
            states[name], metrics = steps[name](states[name], batch, any_round)
            jax.block_until_ready(states[name])
            seconds[name].append(time.perf_counter() - began)
            if not np.isfinite(meshes.read(metrics.loss, workers.mesh)).all():
                raise FloatingPointError(f"{name}: the loss of step {number} is not finite")
    medians = {name: median(times[WARM_UP:]) for name, times in seconds.items()}
    return [
        StepTime(
            rule=name,
            median_ms=1e3 * medians[name],
            fastest_ms=1e3 * min(seconds[name][WARM_UP:]),
            ratio=medians[name] / medians["no gossip"],
        )
        for name in RULES
    ]


def summary(
    config: CheckPodConfig, workers: Workers, checks: Sequence[Check], times: Sequence[StepTime]
) -> dict[str, Any]:
    """What to send back. Step times are those that this process saw."""
    versions = {"python": host.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "passed": all(check.passed for check in checks),
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "workers": workers.count,
        "workers_share_a_device": workers.share_a_device,
        "versions": versions,
        "config": to_values(config),
        "checks": [dataclasses.asdict(check) for check in checks],
        "step_times": [dataclasses.asdict(one) for one in times],
    }


# Arrays of all workers, on one process or many.


def everywhere(
    function: Callable, in_axes: Sequence[int | None], workers: Workers, donate: bool = False
) -> jax.stages.Wrapped:
    """`function` of one worker, run for all. in_axes: as of `on_mesh`."""
    if workers.share_a_device:
        mapped = jax.vmap(function, tuple(in_axes), axis_name=WORKER)
        return jax.jit(mapped, donate_argnums=(0,) if donate else ())
    return on_mesh(function, workers.mesh, in_axes, donate)


def _per_round(distance_T: np.ndarray, last: int) -> float:
    """The mean factor of the distance in a round, over the first `last` rounds."""
    if not last or not distance_T[0]:
        return 0.0
    return float((distance_T[last] / distance_T[0]) ** (1 / last))


def _batch(config: CheckPodConfig, workers: int, model: DecoderConfig) -> rows.Rows:
    """Rows of random tokens, half of them response."""
    draw = numpy_stream(config.seed, "pod tokens")
    half = config.row_tokens // 2

    def row() -> list[rows.Conversation]:
        tokens = draw.integers(model.vocab_size, size=2 * half).tolist()
        return [rows.Conversation(tuple(tokens[:half]), tuple(tokens[half:]))]

    return stack_workers(
        [
            rows.pack([row() for _ in range(config.rows)], config.row_tokens, half)
            for _ in range(workers)
        ]
    )
