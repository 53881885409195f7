"""Gossip training: workers keep their own parameters and now and then mix them with a partner's.

A *schedule* says who pushes to whom in which round (a NumPy table). A *rule* says what a push does
to the parameters (a `MixingTransformation`: pure functions of one worker, in the manner of optax).
Four workers on one device:

    >>> import jax, jax.numpy as jnp
    >>> from persyn_jax import gossip
    >>> schedule = gossip.gosgd_schedule(workers=4, rounds=50, exchange_probability=0.5, seed=0)
    >>> mixing = gossip.gosgd(gossip.Exchange(schedule.bank, axis_name="worker"))
    >>> step = jax.jit(jax.vmap(mixing.update, in_axes=(0, 0, 0, None), axis_name="worker"))
    >>> params_W = {"x": jnp.arange(4.0)}
    >>> state_W = jax.vmap(mixing.init)(params_W)
    >>> for t in range(schedule.rounds):
    ...     updates_W = {"x": jnp.zeros(4)}  # whatever an optax optimiser says
    ...     params_W, state_W = step(updates_W, state_W, params_W, schedule.round(t))
    >>> gossip.consensus_distance_stacked(params_W) < 1e-6
    True
    >>> round(float(state_W.sum_weight.sum()), 6)
    1.0

With a device a worker, `jax.shard_map` takes the place of `jax.vmap` and nothing else changes.

The schedules of the field are in `topologies`, ways to make your own in `graphs` and `compose`;
what is known of them in `theory` and `costs`; what can go wrong in `faults`; the asynchronous
algorithm, event by event, in `simulate`.
"""

from persyn_jax.gossip import (
    compose,
    contrib,
    costs,
    divergence,
    elastic,
    faults,
    graphs,
    simulate,
    theory,
    topologies,
)
from persyn_jax.gossip.audit import (
    AuditState,
    MassError,
    audited,
    check_audit,
    numerator_mass,
    plain_mass,
    sum_weight_mass,
)
from persyn_jax.gossip.banks import Bank, Dense, bank_of, shift_bank, xor_bank
from persyn_jax.gossip.base import MixingTransformation, MixState, Params, Round
from persyn_jax.gossip.combinators import (
    chain,
    delayed,
    every,
    fragments,
    in_dtype,
    masked,
    partition,
)
from persyn_jax.gossip.exchange import Exchange, average, incoming, mix, outgoing, receive, send
from persyn_jax.gossip.metrics import (
    consensus_distance,
    consensus_distance_stacked,
    weighted_mean,
    weighted_mean_stacked,
)
from persyn_jax.gossip.outer import OuterState, diloco, gasloc, noloco, slowmo
from persyn_jax.gossip.rules import (
    SumWeightState,
    all_reduce,
    d_psgd,
    downpour,
    easgd,
    gosgd,
    no_mixing,
    peer_average,
    push_sum,
    sum_weight_unit,
)
from persyn_jax.gossip.schedules import Law, Rows, Schedule, cycle, draw
from persyn_jax.gossip.topologies import gosgd_schedule

__all__ = [
    "AuditState",
    "Bank",
    "Dense",
    "Exchange",
    "Law",
    "MassError",
    "MixState",
    "MixingTransformation",
    "OuterState",
    "Params",
    "Round",
    "Rows",
    "Schedule",
    "SumWeightState",
    "all_reduce",
    "audited",
    "average",
    "bank_of",
    "chain",
    "check_audit",
    "compose",
    "consensus_distance",
    "consensus_distance_stacked",
    "contrib",
    "costs",
    "cycle",
    "d_psgd",
    "delayed",
    "diloco",
    "divergence",
    "downpour",
    "draw",
    "easgd",
    "elastic",
    "every",
    "faults",
    "fragments",
    "gasloc",
    "gosgd",
    "gosgd_schedule",
    "graphs",
    "in_dtype",
    "incoming",
    "masked",
    "mix",
    "no_mixing",
    "noloco",
    "numerator_mass",
    "outgoing",
    "partition",
    "peer_average",
    "plain_mass",
    "push_sum",
    "receive",
    "send",
    "shift_bank",
    "simulate",
    "slowmo",
    "sum_weight_mass",
    "sum_weight_unit",
    "theory",
    "topologies",
    "weighted_mean",
    "weighted_mean_stacked",
    "xor_bank",
]
