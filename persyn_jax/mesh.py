"""Devices and mesh axes. The only file that names the axes.

`worker`: gossip between; `fsdp` and `tensor`: exact sharding inside a worker.
"""

import contextlib
from typing import Literal

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

WORKER = "worker"
FSDP = "fsdp"
TENSOR = "tensor"
AXES = (WORKER, FSDP, TENSOR)

Platform = Literal["cpu", "gpu", "tpu"]


def start_platform(platform: Platform, host_devices: int) -> None:
    """Chooses the JAX platform before anything touches a device.

    host_devices: how many devices the CPU platform shall show (ignored by the others).
    Raises ValueError when too few devices are there.
    """
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda,rocm", "tpu": "tpu"}[platform])
    if platform == "cpu":
        # RuntimeError: a backend is already there; the check below says whether it is large enough.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", host_devices)
    if jax.device_count() < host_devices:
        raise ValueError(
            f"{host_devices} workers need as many devices, "
            f"and platform {platform} shows {jax.device_count()}"
        )


def make_mesh(workers: int, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """The mesh (worker, fsdp, tensor) over the first workers * fsdp * tensor devices."""
    devices = jax.devices() if devices is None else devices
    needed = workers * fsdp * tensor
    return jax.make_mesh(
        (workers, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:needed]
    )


def per_worker(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose leading axis is W: one row a worker.

    The full spec: a short one compiles twice.
    """
    return NamedSharding(mesh, PartitionSpec(WORKER))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
