"""Two ways to run one worker's function for all: on one device, or on a device each."""

import jax
from jax.sharding import PartitionSpec as P

from persyn_jax.mesh import WORKER, make_mesh


def on_one_device(function):
    """`function(*per_worker, shared)` over arrays [W, ...]; the last argument has no axis W."""

    def run(*arguments):
        in_axes = (*(0 for _ in arguments[1:]), None)
        return jax.vmap(function, in_axes=in_axes, axis_name=WORKER)(*arguments)

    return jax.jit(run)


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
