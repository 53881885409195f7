"""Every example in the docstrings of the gossip room does what it says; so do two longer ones."""

import doctest
import importlib
import pkgutil
import sys

import jax
import pytest

from persyn_jax import gossip

MODULES = ["persyn_jax.gossip"] + [
    f"persyn_jax.gossip.{module.name}" for module in pkgutil.iter_modules(gossip.__path__)
]


def write_your_own_schedule():
    """A schedule in ten lines: neighbours average in pairs, even and odd ones in turn, and in each
    third round all take the exact mean.

    >>> import numpy as np
    >>> from persyn_jax import gossip
    >>> from persyn_jax.gossip import theory
    >>> def pairs_then_mean(workers, rounds):
    ...     w = np.arange(workers)
    ...     even, odd = w ^ 1, ((w - 1 ^ 1) + 1) % workers  # whom each worker sends to
    ...     bank, branches_SK = gossip.bank_of([[even], [odd], [w]])  # 3 rows, of one slot
    ...     rows = gossip.Rows(
    ...         branches_SK=branches_SK,
    ...         weights_SKW=np.array([[[0.5] * workers], [[0.5] * workers], [[0.0] * workers]]),
    ...         average_S=np.array([False, False, True]),
    ...     )
    ...     return gossip.cycle(bank, rows, rounds)
    >>> schedule = pairs_then_mean(workers=6, rounds=300)
    >>> schedule.pull_matrix(1)[0]
    array([0.5, 0. , 0. , 0. , 0. , 0.5])
    >>> theory.rounds_to_exact_consensus(schedule)
    3

    It is data, so it serves every rule, layout and measurement there is; and so does a list of
    permutations (`graphs.from_permutations`), of matrices, or a networkx graph.
    """


def write_your_own_rule():
    """A rule is its equation, over `send` (a few numbers), `mix` (the parameters) and `average`.
    This one takes a step towards a partner only if the partner's own update was the smaller one.

    >>> import jax, jax.numpy as jnp, optax
    >>> from persyn_jax import gossip
    >>> def humble(exchange):
    ...     def update(updates, mix_state, params, round):
    ...         params = optax.apply_updates(params, updates)
    ...         size = optax.tree.norm(updates)
    ...         size_K = gossip.send(jnp.full(round.branch_K.shape, size), round, exchange)
    ...         gain_K = jnp.where(size_K < size, gossip.incoming(round, exchange), 0)
    ...         params, _ = gossip.mix(params, gain_K, round, exchange)
    ...         return params, mix_state
    ...     return gossip.MixingTransformation(
    ...         init=lambda params: (),
    ...         evaluate_at=lambda params, mix_state: params,
    ...         update=update,
    ...     )
    >>> schedule = gossip.graphs.from_permutations([[1, 0, 3, 2]], rounds=1)
    >>> rule = humble(gossip.Exchange(schedule.bank, axis_name="worker"))
    >>> step = jax.vmap(rule.update, in_axes=(0, 0, 0, None), axis_name="worker")
    >>> params_W, _ = step(jnp.array([1.0, 3.0, 0.0, -8.0]), (), jnp.zeros(4), schedule.round(0))
    >>> params_W
    Array([ 1.,  2.,  0., -4.], dtype=float32)
    """


@pytest.mark.parametrize("name", [*MODULES, __name__])
def test_examples_do_what_they_say(name):
    with jax.numpy_rank_promotion("allow"):  # as a reader has it
        results = doctest.testmod(sys.modules.get(name) or importlib.import_module(name))
    assert results.failed == 0
    if name in ("persyn_jax.gossip", __name__):
        assert results.attempted > 8
