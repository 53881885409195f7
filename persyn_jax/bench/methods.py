"""The methods that the gossip bench compares: a rule, over a schedule, with its parameters."""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from pydantic import Field

from persyn_jax import gossip
from persyn_jax.config import config_class
from persyn_jax.gossip import compose, contrib, faults, topologies
from persyn_jax.gossip.simulate import lognormal

Rate = Annotated[float, Field(gt=0)]


@config_class
class Method:
    """One method of the comparison. A key that its rule or its schedule does not use is refused."""

    rule: str
    """A key of RULES."""
    schedule: str | None = None
    """A key of SCHEDULES; left out for a rule that has its own."""
    period: Annotated[int, Field(ge=1)] | None = None
    """tau: exchange in each tau-th round only."""
    mean_every: Annotated[int, Field(ge=1)] | None = None
    """H: in each H-th round the exact mean in place of the exchange (gossip-PGA)."""
    exchange_probability: Annotated[float, Field(ge=0, le=1)] | None = None
    """gosgd, common_coin: p."""
    degree: Annotated[int, Field(ge=1)] | None = None
    """base_k_plus_1: k. d_equi_static, u_equi_static: how many shifts are drawn."""
    rate: Rate | None = None
    """easgd: moving rate. peer_average: weight of the peers. slowmo, diloco, noloco: outer rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """slowmo, diloco, noloco, gasloc: outer momentum."""
    learning_rates: Annotated[tuple[Rate, ...], Field(min_length=1)] | None = None
    """In place of the comparison's, and as many: for a rule that makes steps of another size, such
    as `downpour`, whose centre goes as far as all workers together."""

    def __post_init__(self):
        rule = _entry("rule", RULES, self.rule)
        if rule.schedule and self.schedule:
            raise ValueError(f"rule {self.rule} has its own schedule, leave it out")
        if not rule.schedule and not self.schedule:
            raise ValueError(f"rule {self.rule} needs a schedule: {', '.join(sorted(SCHEDULES))}")
        needs = rule.needs | _entry("schedule", SCHEDULES, self.schedule_key).needs
        for key in LETTERS:
            if key in needs and key not in self.parameters:
                raise ValueError(f"{self.name} needs {key}")
            if key in self.parameters and key not in needs | rule.allows:
                raise ValueError(f"{self.name} does not take {key}")
        if self.schedule == "random_pull" and rule.weight_bytes:
            raise ValueError(f"{self.name}: who pushes cannot be asked for more than there is")

    @property
    def schedule_key(self) -> str:
        return self.schedule or RULES[self.rule].schedule or ""

    @property
    def parameters(self) -> dict[str, float]:
        """Those that are given."""
        values = {key: getattr(self, key) for key in LETTERS}
        return {key: value for key, value in values.items() if value is not None}

    @property
    def name(self) -> str:
        """Short and unique: the label of plots and rows."""
        over = [f"over {self.schedule}"] if self.schedule not in (None, self.rule) else []
        given = [f"{LETTERS[key]}={value:g}" for key, value in self.parameters.items()]
        return " ".join([self.rule, *over, *given])


class Knobs(NamedTuple):
    """Numbers that may differ between runs of one compiled program. In it, each is a float32[]."""

    learning_rate: float
    rate: float
    momentum: float


LETTERS = {
    "exchange_probability": "p",
    "period": "tau",
    "mean_every": "H",
    "degree": "k",
    "rate": "rate",
    "momentum": "momentum",
}
"""The parameters of rules and schedules, and how they are called in short."""
OPTIONAL = frozenset({"period", "mean_every"})


class Rule(NamedTuple):
    """A rule of the library, as the bench sees it."""

    make: Callable[[gossip.Exchange, Knobs], gossip.MixingTransformation]
    needs: frozenset[str] = frozenset()
    """Keys of `Method` that must be given."""
    allows: frozenset[str] = OPTIONAL
    """Keys of `Method` that may be given."""
    schedule: str | None = None
    """The only schedule that makes sense for it; None if it goes over any."""
    travels_as: Any = None
    """dtype of the parameters on their way; None for their own."""
    weight_bytes: int = 0
    """Of a message, beside the parameters: the sum weight."""


def _plain(rule: Callable[[gossip.Exchange], gossip.MixingTransformation], **entries: Any) -> Rule:
    return Rule(lambda exchange, knobs: rule(exchange), **entries)


def _compressed(dtype: Any) -> Rule:
    return Rule(
        lambda exchange, knobs: gossip.in_dtype(dtype, gossip.d_psgd, exchange), travels_as=dtype
    )


RATE, MOMENTUM, PERIOD = frozenset({"rate"}), frozenset({"momentum"}), frozenset({"period"})

RULES: dict[str, Rule] = {
    "no_mixing": _plain(gossip.no_mixing, schedule="silent", allows=frozenset()),
    "all_reduce": _plain(gossip.all_reduce, schedule="complete", allows=frozenset()),
    "local_sgd": _plain(gossip.d_psgd, schedule="complete", allows=PERIOD),
    "easgd": Rule(
        lambda exchange, knobs: gossip.easgd(exchange, knobs.rate),
        needs=RATE,
        schedule="complete",
        allows=PERIOD,
    ),
    "downpour": _plain(gossip.downpour, schedule="complete", allows=PERIOD),
    "d_psgd": _plain(gossip.d_psgd),
    "d_psgd_delayed": _plain(lambda exchange: gossip.delayed(gossip.d_psgd(exchange), exchange)),
    "d_psgd_bf16": _compressed(jnp.bfloat16),
    "d_psgd_int8": _compressed(jnp.int8),
    "gosgd": _plain(gossip.gosgd, weight_bytes=4),
    "push_sum": _plain(gossip.push_sum, weight_bytes=4),
    "peer_average": Rule(
        lambda exchange, knobs: gossip.peer_average(exchange, knobs.rate), needs=RATE
    ),
    "slowmo": Rule(  # its inner rate is only the unit of its momentum
        lambda exchange, knobs: gossip.slowmo(exchange, knobs.momentum, knobs.rate, 1.0),
        needs=RATE | MOMENTUM,
    ),
    "diloco": Rule(
        lambda exchange, knobs: gossip.diloco(
            exchange, optax.sgd(knobs.rate, momentum=knobs.momentum, nesterov=True)
        ),
        needs=RATE | MOMENTUM,
    ),
    "noloco": Rule(
        lambda exchange, knobs: gossip.noloco(exchange, knobs.momentum, knobs.rate),
        needs=RATE | MOMENTUM,
    ),
    "gasloc": Rule(lambda exchange, knobs: gossip.gasloc(exchange, knobs.momentum), needs=MOMENTUM),
    "d2": _plain(contrib.d2),
}


class ScheduleEntry(NamedTuple):
    """A schedule of the library, as the bench sees it."""

    make: Callable[[Method, int, int, int], gossip.Schedule]
    """(method, workers, rounds, seed) -> a schedule of at least so many rounds."""
    needs: frozenset[str] = frozenset()
    """Keys of `Method` that must be given."""


def _fixed(make: Callable[[int, int], gossip.Schedule]) -> ScheduleEntry:
    return ScheduleEntry(lambda method, workers, rounds, seed: make(workers, rounds))


def _drawn(make: Callable[[int, int, int], gossip.Schedule]) -> ScheduleEntry:
    return ScheduleEntry(lambda method, workers, rounds, seed: make(workers, rounds, seed))


def _coins(make: Callable[..., gossip.Schedule]) -> ScheduleEntry:
    return ScheduleEntry(
        lambda method, workers, rounds, seed: make(
            workers, rounds, method.exchange_probability, seed
        ),
        frozenset({"exchange_probability"}),
    )


def _of_degree(make: Callable[..., gossip.Schedule]) -> ScheduleEntry:
    return ScheduleEntry(
        lambda method, workers, rounds, seed: make(workers, rounds, method.degree, seed),
        frozenset({"degree"}),
    )


def _pairs(workers: int, rounds: int, seed: int) -> gossip.Schedule:
    """Exact in pairs, then a random shift of the pairs."""
    if workers % 2:
        raise ValueError(f"schedule pairs: the number of workers must be even, got {workers}")
    return compose.hierarchical(topologies.random_shift(workers // 2, rounds, seed), slice_size=2)


def _torus(workers: int, rounds: int) -> gossip.Schedule:
    """As near to a square as the number of workers allows."""
    rows = max(n for n in range(1, int(np.sqrt(workers)) + 1) if workers % n == 0)
    return topologies.torus(rows, workers // rows, rounds)


SCHEDULES: dict[str, ScheduleEntry] = {
    "silent": _fixed(topologies.silent),
    "complete": _fixed(topologies.complete),
    "gosgd": _coins(topologies.gosgd_schedule),
    "common_coin": _coins(topologies.common_coin),
    "random_matching": _drawn(topologies.random_matching),
    "random_shift": _drawn(topologies.random_shift),
    "random_xor": _drawn(topologies.random_xor),
    "random_pull": _drawn(topologies.random_pull),
    "ou_equi_dyn": _drawn(topologies.ou_equi_dyn),
    "d_equi_static": _of_degree(topologies.d_equi_static),
    "u_equi_static": _of_degree(topologies.u_equi_static),
    "ring": _fixed(topologies.ring),
    "torus": _fixed(_torus),
    "star": _fixed(topologies.star),
    "static_exponential": _fixed(topologies.static_exponential),
    "one_peer_exponential": _fixed(topologies.one_peer_exponential),
    "hypercube": _fixed(topologies.hypercube),
    "base_k_plus_1": _of_degree(
        lambda workers, rounds, degree, seed: topologies.base_k_plus_1(workers, rounds, degree)
    ),
    "pairs": _drawn(_pairs),
}


@config_class
class Faults:
    """What goes wrong in a run. Exact means are no messages: of these, only the dead are missed."""

    drop: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability of each message to be lost."""
    symmetric: bool = False
    """Both directions between two workers are lost together."""
    dead_workers: Annotated[int, Field(ge=0)] = 0
    """So many die when half of the run is over."""
    straggling: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of the logarithm of the time of a local step, whose mean is one round."""

    @property
    def name(self) -> str:
        changed = {key: value for key, value in vars(self).items() if value}
        return " ".join(f"{key}={value:g}" for key, value in changed.items()) or "none"


def make_schedule(
    method: Method, fault: Faults, workers: int, rounds: int, seed: int
) -> gossip.Schedule:
    """The method's schedule with its faults: at least so many rounds.

    Raises ValueError if the schedule does not exist for this number of workers.
    """
    period = method.period or 1
    make = SCHEDULES[method.schedule_key].make
    schedule = make(method, workers, -(-rounds // period), seed)
    schedule = compose.stretch(schedule, period, offset=period - 1) if period > 1 else schedule
    if method.mean_every:
        schedule = compose.periodic_average(schedule, method.mean_every)
    if fault.drop:
        schedule = faults.drop_edges(schedule, fault.drop, seed, fault.symmetric)
    for worker in range(fault.dead_workers):
        schedule = faults.kill(schedule, worker, rounds // 2)
    if fault.straggling:
        schedule = faults.stragglers(schedule, lognormal(1.0, fault.straggling), seed)
    return schedule


def _entry(kind: str, table: dict[str, Any], key: str) -> Any:
    if key not in table:
        raise ValueError(f"no {kind} {key!r}; there are {', '.join(sorted(table))}")
    return table[key]
