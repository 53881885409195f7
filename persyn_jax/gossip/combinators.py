"""Transformations made of transformations, as in optax: `chain`, `every`, `partition`, ...

Where several rules meet, each may follow its own schedule: the round is then a tuple (or a dict, by
label) of their rounds, in the place of the one `Round`.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from persyn_jax.gossip.base import Array, MixingTransformation, Params, Round
from persyn_jax.gossip.exchange import Exchange, mine
from persyn_jax.gossip.rules import local_step, no_mixing, select
from persyn_jax.gossip.wire import rounded

Rule = Callable[[Exchange], MixingTransformation]


def chain(*rules: MixingTransformation) -> MixingTransformation:
    """One rule after the other: the first applies the update, all mix, in order.

    Example: gossip each round, and an exact mean each tenth, each with its own rounds:
    `chain(gosgd(exchange), every(10, d_psgd(exchange)))`.
    """

    def evaluate_at(params, mix_states):
        for rule, state in reversed(list(zip(rules, mix_states, strict=True))):
            params = rule.evaluate_at(params, state)
        return params

    def update(updates, mix_states, params, round):
        states = []
        for rule, state, own_round in zip(
            rules, mix_states, _rounds(round, len(rules)), strict=True
        ):
            params, state = rule.update(updates, state, params, own_round)
            updates = _zero_if_finite(updates)
            states.append(state)
        return params, tuple(states)

    return MixingTransformation(
        lambda params: tuple(rule.init(params) for rule in rules), evaluate_at, update
    )


def every(period: int, rule: MixingTransformation) -> MixingTransformation:
    """`rule` exchanges in each `period`-th round only, the last of every `period`; in the others it
    sees a round in which nobody exchanges, and so takes local steps.

    Raises ValueError: a period below 1. To stretch a schedule instead, so that no row of it is
    lost, see `compose.stretch`.
    """
    if period < 1:
        raise ValueError(f"every: the period must be at least 1, got {period}")

    def update(updates, mix_state, params, round):
        is_due = round.index % period == period - 1
        return rule.update(updates, mix_state, params, _silenced(round, is_due))

    return rule._replace(update=update)


def partition(
    rules: Mapping[str, MixingTransformation], labels: Callable[[Params], Any]
) -> MixingTransformation:
    """Another rule for each part of the parameters, as in `optax.partition`.

    labels: params -> a tree of the same structure, a label of `rules` at each leaf.
    Each rule judges by its own part whether an update is finite.
    The round is one `Round`, or a dict of them by label.
    Raises ValueError: a label without a rule.
    """

    def split(tree: Params, label_tree: Any) -> dict[str, list]:
        parts: dict[str, list] = {label: [] for label in rules}
        for leaf, label in zip(jax.tree.leaves(tree), jax.tree.leaves(label_tree), strict=True):
            if label not in parts:
                raise ValueError(f"partition: no rule for label {label!r}, only {sorted(parts)}")
            parts[label].append(leaf)
        return parts

    def join(parts: Mapping[str, list], params: Params, label_tree: Any) -> Params:
        leaves = {label: iter(part) for label, part in parts.items()}
        order = [next(leaves[label]) for label in jax.tree.leaves(label_tree)]
        return jax.tree.unflatten(jax.tree.structure(params), order)

    def init(params):
        parts = split(params, labels(params))
        return {label: rule.init(parts[label]) for label, rule in rules.items()}

    def evaluate_at(params, mix_states):
        parts = split(params, labels(params))
        at = {
            label: rule.evaluate_at(parts[label], mix_states[label])
            for label, rule in rules.items()
        }
        return join(at, params, labels(params))

    def update(updates, mix_states, params, round):
        label_tree = labels(params)
        parts, update_parts = split(params, label_tree), split(updates, label_tree)
        mixed, states = {}, {}
        for label, rule in rules.items():
            own_round = round if isinstance(round, Round) else round[label]
            mixed[label], states[label] = rule.update(
                update_parts[label], mix_states[label], parts[label], own_round
            )
        return join(mixed, params, label_tree), states

    return MixingTransformation(init, evaluate_at, update)


def masked(
    rule: MixingTransformation, mask: Callable[[Params], Any], exchange: Exchange
) -> MixingTransformation:
    """`rule` for the leaves where `mask(params)`, a tree of bools, says so; the others only take
    their local steps. Example: gossip the adapters, never the frozen backbone."""

    def labels(params):
        return jax.tree.map(lambda mixes: "mixed" if mixes else "local", mask(params))

    return partition({"mixed": rule, "local": no_mixing(exchange)}, labels)


def fragments(rules: tuple[MixingTransformation, ...]) -> MixingTransformation:
    """The parameters are cut in as many slices as there are rules, and each slice has its own rule,
    state and round: with a schedule each, another partner for every slice in every round.

    Leaves are cut along their first axis; one with fewer rows than there are rules belongs whole to
    one of them. The round is a tuple of rounds. Cutting and joining copies the tree once.
    """
    count = len(rules)

    def split(tree: Params) -> list[list]:
        slices: list[list] = [[] for _ in rules]
        for index, leaf in enumerate(jax.tree.leaves(tree)):
            for number, piece in _pieces(index, leaf, count):
                slices[number].append(piece)
        return slices

    def join(slices: list[list], params: Params) -> Params:
        iterators = [iter(part) for part in slices]
        leaves = []
        for index, leaf in enumerate(jax.tree.leaves(params)):
            pieces = [next(iterators[number]) for number, _ in _pieces(index, leaf, count)]
            leaves.append(pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces))
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    def evaluate_at(params, mix_states):
        at = [
            rule.evaluate_at(part, state)
            for rule, part, state in zip(rules, split(params), mix_states, strict=True)
        ]
        return join(at, params)

    def update(updates, mix_states, params, round):
        results = [
            rule.update(update_part, state, part, own_round)
            for rule, update_part, state, part, own_round in zip(
                rules,
                split(updates),
                mix_states,
                split(params),
                _rounds(round, count),
                strict=True,
            )
        ]
        return join([part for part, _ in results], params), tuple(state for _, state in results)

    return MixingTransformation(
        lambda params: tuple(
            rule.init(part) for rule, part in zip(rules, split(params), strict=True)
        ),
        evaluate_at,
        update,
    )


class DelayedState(NamedTuple):
    """State of one worker under `delayed`."""

    inner: Any
    """The state of the delayed rule."""
    past: tuple[Params, ...]
    """The parameters before each of the last `rounds` rounds, the oldest first."""


def delayed(
    rule: MixingTransformation, exchange: Exchange, rounds: int = 0
) -> MixingTransformation:
    """The exchange takes time: what is mixed is the parameters of `rounds` rounds ago.

        x <- x + u + (M(x_past) - x_past)

    with M the rule without a local step. With `rounds` = 0, x_past is x before the local step: the
    exchange does not wait for the gradient, so the two can overlap ("combine then adapt"; over
    `d_psgd` it is D-PSGD as printed). Each further round holds one more copy of the parameters.

    A worker whose update is not finite drops it; its message was about the past, and goes out if
    that was finite.
    Raises ValueError: negative rounds.
    """
    if rounds < 0:
        raise ValueError(f"delayed: the number of rounds must not be negative, got {rounds}")

    def update(updates, mix_state, params, round):
        history = (*mix_state.past, params)
        past = history[0]
        mixed, inner = rule.update(_zero_if_finite(past), mix_state.inner, past, round)
        stepped, _ = local_step(updates, params, round, exchange)
        params = jax.tree.map(lambda x, m, p: x + (m - p), stepped, mixed, past)
        return params, DelayedState(inner, history[1:])

    return MixingTransformation(
        lambda params: DelayedState(rule.init(params), (params,) * rounds),
        lambda params, mix_state: rule.evaluate_at(params, mix_state.inner),
        update,
    )


class FeedbackState(NamedTuple):
    """State of one worker under `in_dtype` of int8."""

    inner: Any
    """The state of the rule."""
    residual: Params
    """What rounding has kept back so far, to be sent with the next message."""


def in_dtype(dtype: Any, rule: Rule, exchange: Exchange) -> MixingTransformation:
    """`rule(exchange)` with parameters that travel as `dtype`: `jnp.bfloat16` or `jnp.int8`.

    A worker that sends m_i = Q(x_i) steps by gain (m_j - m_i), so an exchange between two leaves
    their sum alone. int8 comes with error feedback (Seide et al. 2014; in this form DeepSqueeze,
    Tang et al. 2019, arXiv 1907.07346): m_i = Q(x_i + e_i), e_i <- x_i + e_i - m_i. It is for rules
    that end in `mix` of the parameters as they are: `gosgd`, `d_psgd`, `peer_average`. e_i waits in
    rounds in which nobody sends, and in those with an exact mean, which is not rounded.

    Weights are float32 always. Raises ValueError: another dtype.
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.int8):
        raise ValueError(f"in_dtype: bfloat16 or int8, got {jnp.dtype(dtype)}")
    inner = rule(exchange._replace(dtype=dtype))
    if jnp.dtype(dtype) != jnp.int8:
        return inner

    def update(updates, mix_state, params, round):
        is_busy = (jnp.asarray(round.weight_KW) > 0).any() & ~jnp.asarray(round.average)
        feeds_back = is_busy & mine(round.present_W, exchange)
        residual = jax.tree.map(lambda leaf: jnp.where(feeds_back, leaf, 0), mix_state.residual)
        owed = jax.tree.map(jnp.add, params, residual)
        said, _ = local_step(updates, owed, round, exchange)
        mixed, inner_state = inner.update(updates, mix_state.inner, owed, round)
        params = jax.tree.map(jnp.subtract, mixed, residual)
        left = jax.tree.map(lambda leaf: leaf - rounded(leaf, dtype), said)
        return params, FeedbackState(inner_state, select(feeds_back, left, mix_state.residual))

    return MixingTransformation(
        lambda params: FeedbackState(inner.init(params), jax.tree.map(jnp.zeros_like, params)),
        lambda params, mix_state: inner.evaluate_at(params, mix_state.inner),
        update,
    )


def _rounds(round: Any, count: int) -> tuple[Round, ...]:
    """A round for each of `count` rules: the same, or those of a tuple."""
    if isinstance(round, Round):
        return (round,) * count
    if len(round) != count:
        raise ValueError(f"{count} rules need one round or {count}, got {len(round)}")
    return tuple(round)


def _zero_if_finite(tree: Params) -> Params:
    """An update of zero for the next rule, but NaN where it must know that a worker is not well."""
    return jax.tree.map(lambda leaf: 0 * leaf, tree)


def _silenced(round: Round, is_due: Array) -> Round:
    """The round itself if it is due, else one in which nobody exchanges."""
    return round._replace(
        sync=round.sync & is_due,
        average=round.average & is_due,
        branch_K=round.branch_K * is_due,
        weight_KW=round.weight_KW * is_due,
    )


def _pieces(index: int, leaf: Array, count: int) -> list[tuple[int, Array]]:
    """(number of the slice, piece) of the leaf: rows in `count` parts, or whole to one of them."""
    if leaf.ndim == 0 or leaf.shape[0] < count:
        return [(index % count, leaf)]
    bounds = [leaf.shape[0] * number // count for number in range(count + 1)]
    return [(n, leaf[low:high]) for n, (low, high) in enumerate(itertools.pairwise(bounds))]
