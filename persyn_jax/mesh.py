"""Devices and mesh axes. The only file that names the axes.

`worker`: gossip between; `fsdp` and `tensor`: exact sharding inside a worker.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

WORKER = "worker"
FSDP = "fsdp"
TENSOR = "tensor"
AXES = (WORKER, FSDP, TENSOR)

Platform = Literal["cpu", "gpu", "tpu"]


def start_platform(platform: Platform, host_devices: int, processes: int = 1) -> None:
    """Chooses the JAX platform before anything touches a device.

    host_devices: how many devices the CPU platform shall show (ignored by the others), over all
    `processes` (0: unknown). Raises ValueError when too few devices are there.
    """
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda,rocm", "tpu": "tpu"}[platform])
    if platform == "cpu":
        if not processes:
            raise ValueError("platform cpu must be told how many processes there are")
        # RuntimeError: a backend is already there; the check below says whether it is large enough.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", -(-host_devices // processes))
    if jax.device_count() < host_devices:
        raise ValueError(
            f"{host_devices} devices are needed, and platform {platform} shows {jax.device_count()}"
        )


def make_mesh(workers: int, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """The mesh (worker, fsdp, tensor) over the first workers * fsdp * tensor devices.

    On several TPU slices workers never span two of them. Raises ValueError if they would have to,
    or there are too few devices.
    """
    devices = jax.devices() if devices is None else devices
    needed = workers * fsdp * tensor
    if len(devices) < needed:
        raise ValueError(f"{needed} devices are needed, and there are {len(devices)}")
    devices, shape = devices[:needed], (workers, fsdp, tensor)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    axis_types = (AxisType.Auto,) * 3
    if len(slices) == 1:
        return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
    if workers % len(slices):
        raise ValueError(f"{workers} workers must be a multiple of the {len(slices)} slices")
    from jax.experimental import mesh_utils

    inside = (workers // len(slices), fsdp, tensor)
    placed = mesh_utils.create_hybrid_device_mesh(inside, (len(slices), 1, 1), devices)
    return Mesh(placed, AXES, axis_types=axis_types)


def per_worker(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose leading axis is W: one row a worker.

    The full spec: a short one compiles twice.
    """
    return NamedSharding(mesh, PartitionSpec(WORKER))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def place(tree: Any, shardings: Any) -> Any:
    """NumPy arrays that every process has, as arrays of all devices.

    shardings: one, or a tree of them like `tree`.
    """

    def place_leaf(leaf, sharding):
        array = np.asarray(leaf, jax.dtypes.canonicalize_dtype(np.asarray(leaf).dtype))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: place_leaf(leaf, shardings), tree)
    return jax.tree.map(place_leaf, tree, shardings)


def place_copies(tree: Any, shardings: Any, workers: int) -> Any:
    """Every worker starts from `tree`: each leaf [...] becomes [W, ...], its memory taken once a
    worker and nowhere else."""

    def place_leaf(leaf, sharding):
        array = np.asarray(leaf)

        def own(index: Any) -> np.ndarray:
            return array[None][(slice(None), *index[1:])]

        return jax.make_array_from_callback((workers, *array.shape), sharding, own)

    return jax.tree.map(place_leaf, tree, shardings)


def place_workers(own: Callable[[int], Any], sharding: NamedSharding, workers: int) -> Any:
    """What `own(worker)` has for each worker, as arrays [W, ...]; asked for this process's only."""
    any_shape = (workers, *(1 for _ in sharding.spec[1:]))
    mine = {
        index[0].indices(workers)[0]  # pyrefly: ignore[unsupported-operation]
        for index in _worker_sharding(sharding).addressable_devices_indices_map(any_shape).values()
    }
    trees = {worker: own(worker) for worker in sorted(mine)}
    leaves = {worker: jax.tree.leaves(tree) for worker, tree in trees.items()}

    def place_leaf(number: int) -> jax.Array:
        shape = next(iter(leaves.values()))[number].shape

        def rows(index):
            return leaves[index[0].indices(workers)[0]][number][None][(slice(None), *index[1:])]

        return jax.make_array_from_callback((workers, *shape), sharding, rows)

    structure = jax.tree.structure(next(iter(trees.values())))
    return jax.tree.unflatten(structure, [place_leaf(n) for n in range(structure.num_leaves)])


def _worker_sharding(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))


def read(tree: Any, mesh: Mesh) -> Any:
    """All of each array, as NumPy, on every process."""

    def read_leaf(array: Any) -> np.ndarray:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            array = _gather_to_all(mesh)(array)
        return np.asarray(array)

    return jax.tree.map(read_leaf, tree)


@functools.cache
def _gather_to_all(mesh: Mesh) -> jax.stages.Wrapped:
    return jax.jit(lambda array: array, out_shardings=replicated(mesh))


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What the student's train step is compiled with, for `jax.jit(compiler_options=...)`: on CPU.

    There XLA starts whatever can start, to keep all cores busy, and so the layers' gradients are
    there as zeros all the way forward. Matrix products fill the cores anyway: with SmolLM2, the
    order that needs least memory takes 1 or 2 % more time, and memory for a step's arrays less by 3
    to 15 %. Where the head outweighs the layers it may take a little more.
    """
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if is_cpu else {}


def vary_alike(arrays: Sequence[Any]) -> list[jax.Array]:
    """The arrays, each varying over every axis of the `shard_map` that one of them varies over.

    The gradient of one that did not is summed over the axes that it got.
    """
    arrays = [jnp.asarray(array) for array in arrays]
    axes = frozenset().union(*map(_varying, arrays))

    def vary(array: jax.Array) -> jax.Array:
        more = tuple(sorted(axes - _varying(array)))
        return jax.lax.pcast(array, more, to="varying") if more else array

    return [vary(array) for array in arrays]


def _varying(array: jax.Array) -> frozenset[str]:
    return frozenset(jax.typeof(array).manual_axis_type.varying)
