"""Ways to run one worker's function for all workers, and many rounds in one program."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from persyn_jax.mesh import WORKER, make_mesh

QUICK = {"xla_backend_optimization_level": 0}
"""Compiles several times as fast. The numbers may differ from those of the default in the last
bits, as the compiler fuses other products and sums."""
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False  # later releases have no such option


def on_one_device(function, **jit_options):
    """`function(*per_worker, shared)` over arrays [W, ...]; the last argument has no axis W."""

    def run(*arguments):
        in_axes = (*(0 for _ in arguments[1:]), None)
        return jax.vmap(function, in_axes=in_axes, axis_name=WORKER)(*arguments)

    return jax.jit(run, **jit_options)


def on_a_device_each(function, workers, **jit_options):
    """The same by shard_map over a mesh of `workers` host devices."""

    def local(*arguments):
        *per_worker, shared = arguments
        per_worker = jax.tree.map(lambda leaf: leaf[0], per_worker)
        return jax.tree.map(lambda leaf: leaf[None], function(*per_worker, shared))

    def run(*arguments):
        in_specs = (*(P(WORKER) for _ in arguments[1:]), P())
        return jax.shard_map(
            local, mesh=make_mesh(workers), in_specs=in_specs, out_specs=P(WORKER)
        )(*arguments)

    return jax.jit(run, **jit_options)


def over_rounds(update):
    """(params, state, updates [T, ...], rounds [T]) -> (params, state) [T, ...] after each round,
    by a scan over the rounds."""

    def run(params, state, updates_T, rounds):
        def step(carry, row):
            carry = update(row[0], carry[1], carry[0], row[1])
            return carry, carry

        return jax.lax.scan(step, (params, state), (updates_T, rounds))[1]

    return run


def over_static_rounds(update, rounds):
    """The same for a list of rounds that are no arguments: one after the other in the program."""

    def run(params, state, updates_T, _):
        after_T = []
        for t, row in enumerate(rounds):
            updates = jax.tree.map(lambda leaf_T, t=t: leaf_T[t], updates_T)
            params, state = update(updates, state, params, row)
            after_T.append((params, state))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *after_T)

    return run
