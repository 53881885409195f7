"""The mass audit: does a rule conserve, in every round, what it says it conserves?"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from persyn_jax.gossip.base import Array, MixingTransformation, Params, Round
from persyn_jax.gossip.exchange import Exchange
from persyn_jax.gossip.rules import local_step

Mass = Callable[[Params, Any], Any]
"""(params, mix_state) -> a tree whose sum over the workers no exchange may change."""


def sum_weight_mass(params: Params, mix_state: Any) -> Any:
    """GoSGD's: alpha and alpha x."""
    alpha = mix_state.sum_weight
    return alpha, jax.tree.map(lambda leaf: alpha * leaf.astype(jnp.float32), params)


def numerator_mass(params: Params, mix_state: Any) -> Any:
    """Push-sum's: w and the numerators x, which are its parameters."""
    return mix_state.sum_weight, params


def plain_mass(params: Params, mix_state: Any) -> Any:
    """That of an averaging rule over doubly stochastic matrices: x."""
    return params


class AuditState(NamedTuple):
    """State of one worker under `audited`; the audit is the same on all workers."""

    inner: Any
    """The state of the rule."""
    violated_in: Array
    """int32[]: the first round that changed the mass by more than the tolerance, -1 for none."""
    error: Array
    """float32[]: by how much it did, or, for none, the largest error so far: relative to the
    largest magnitude of each array."""


class MassError(RuntimeError):
    """An exchange has made or lost mass."""


def audited(
    rule: MixingTransformation, mass: Mass, exchange: Exchange, tolerance: float = 1e-5
) -> MixingTransformation:
    """`rule`, with its mass before and after every exchange compared. Costs two all-reduces of the
    parameters a round: for debugging. `check_audit` raises on the host."""

    def total(params, mix_state):
        return jax.tree.map(
            lambda leaf: lax.psum(leaf.astype(jnp.float32), exchange.axis_name),
            mass(params, mix_state),
        )

    def update(updates: Params, mix_state: AuditState, params: Params, round: Round):
        stepped, _ = local_step(updates, params, round, exchange)
        before = total(stepped, mix_state.inner)
        params, inner = rule.update(updates, mix_state.inner, params, round)
        error = _relative_error(before, total(params, inner))
        was_clean = mix_state.violated_in < 0
        violated = ~(error <= tolerance)  # NaN violates
        return params, AuditState(
            inner,
            jnp.where(was_clean & violated, round.index, mix_state.violated_in),
            jnp.where(was_clean, jnp.maximum(error, mix_state.error), mix_state.error),
        )

    return MixingTransformation(
        lambda params: AuditState(rule.init(params), jnp.int32(-1), jnp.float32(0)),
        lambda params, mix_state: rule.evaluate_at(params, mix_state.inner),
        update,
    )


def check_audit(mix_state: AuditState) -> None:
    """Raises MassError, with the round and the error, if the audit found any. On the host, for
    one worker's state or that of all."""
    violated_in = int(np.asarray(mix_state.violated_in).flat[0])
    if violated_in >= 0:
        error = float(np.asarray(mix_state.error).flat[0])
        raise MassError(
            f"mass audit: round {violated_in} changed the mass of the workers by {error:.3g}"
            " (relative); an exchange must leave it as it is"
        )


def _relative_error(before: Any, after: Any) -> jax.Array:
    def error(b, a):
        largest = jnp.maximum(jnp.max(jnp.abs(b)), jnp.finfo(jnp.float32).tiny)
        return jnp.max(jnp.abs(a - b)) / largest

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(error, before, after))))
