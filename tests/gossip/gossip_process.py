"""One process of a run over eight devices, for `test_gossip_processes.py`.

    python gossip_process.py PORT PROCESSES INDEX OUT

writes to the file OUT what its own workers hold after each round.
"""

import sys

import jax
import numpy as np
from gossip_cases import ROUNDS, SHIFTS, WORKERS, random_schedule
from gossip_layouts import QUICK, on_a_device_each, over_rounds
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from persyn_jax import gossip
from persyn_jax.mesh import WORKER, make_mesh

FAULTS = {"dropped": 0.3, "absent": 0.1, "late": 0.1}
RUNS = {
    "permutations": (gossip.gosgd, random_schedule(SHIFTS, ROUNDS, 2, seed=0, **FAULTS)),
    "means": (gossip.push_sum, random_schedule(SHIFTS, ROUNDS, 2, seed=1, average=0.3, **FAULTS)),
}


def run_own_workers() -> dict[str, np.ndarray]:
    """Of each run, the parameters and the sum weights [W, T, ...] of this process's workers."""
    rng = np.random.default_rng(0)
    own, shared = (NamedSharding(make_mesh(WORKERS), spec) for spec in (P(WORKER), P()))
    params_W = rng.normal(size=(WORKERS, 3, 8)).astype(np.float32)
    updates_WT = rng.normal(size=(WORKERS, ROUNDS, 3, 8)).astype(np.float32)
    updates_WT[3, ::7, 0, 0] = np.nan
    results = {}
    for name, (make_rule, schedule) in RUNS.items():
        rule = make_rule(gossip.Exchange(schedule.bank, WORKER))
        state_W = jax.vmap(rule.init)(params_W)
        run = on_a_device_each(over_rounds(rule.update), WORKERS, compiler_options=QUICK)
        carry = [place(tree, own) for tree in (params_W, state_W, updates_WT)]
        after_WT, state_WT = run(*carry, place(schedule.table(), shared))
        results[f"{name}, parameters"] = own_rows(after_WT)
        results[f"{name}, sum weights"] = own_rows(state_WT.sum_weight)
    return results


def place(tree, sharding):
    """A global array, of which this process holds a part."""

    def place_leaf(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place_leaf, tree)


def own_rows(array_W) -> np.ndarray:
    shards = sorted(array_W.addressable_shards, key=lambda shard: shard.index[0].start)
    return np.concatenate([shard.data for shard in shards])


if __name__ == "__main__":
    port, processes, index, out = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", WORKERS // int(processes))
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(index))
    np.savez(out, **run_own_workers())
    jax.distributed.shutdown()
