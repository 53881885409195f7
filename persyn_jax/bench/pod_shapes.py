"""TPU slices that are not there: their devices, to compile for, and the links between them."""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import AxisType, Mesh

from persyn_jax import mesh as meshes
from persyn_jax.config import ConfigError
from persyn_jax.gossip.costs import LinkModel

# What libtpu looks for on a TPU machine before it compiles; without answers it waits for a network
# that is not there. The last one lets two processes compile at once.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class ChipLinks(NamedTuple):
    """Links of one chip, in bytes a second in one direction (Google Cloud's TPU pages)."""

    neighbour: float
    """To each neighbour in the slice: the chip's total, divided by its links and directions."""
    outside: float
    """Its share of the data centre network of a pod."""


CHIP_LINKS = {
    "v5e": ChipLinks(neighbour=50e9, outside=3.125e9),
    "v5p": ChipLinks(neighbour=100e9, outside=6.25e9),
    "v6e": ChipLinks(neighbour=100e9, outside=12.5e9),
}
HOP_SECONDS = 1e-6
"""Of a message to a neighbouring chip: an order of magnitude."""
OUTSIDE_SECONDS = 5e-5
"""Of a message between slices: an order of magnitude."""


class PodShape(NamedTuple):
    """Some equal slices, and how many workers train on them."""

    topology: str
    """Of one slice, such as `v5e:4x4`."""
    slices: int
    workers: int
    tensor: int = 1
    """Chips of a worker along the axis `tensor`; the others lie along `fsdp`."""

    @property
    def generation(self) -> str:
        return self.topology.split(":")[0]

    @property
    def sides(self) -> tuple[int, ...]:
        """Chips along each dimension of a slice."""
        return tuple(int(side) for side in self.topology.split(":")[1].split("x"))

    @property
    def chips_per_worker(self) -> int:
        return self.slices * math.prod(self.sides) // self.workers

    @property
    def shards(self) -> tuple[int, int]:
        """Of a worker, along `fsdp` and `tensor`."""
        return self.chips_per_worker // self.tensor, self.tensor


def pod_shape(topology: str, slices: int, workers: int | None, tensor: int = 1) -> PodShape:
    """workers: if not given, the slices if there are several, else the chips.

    On several slices the exact mean is cheap inside and gossip is for what lies between. Raises
    ConfigError: no such kind of topology, workers that would not be equal or would span slices.
    """
    if not re.fullmatch(r"\w+:\d+(x\d+)*", topology) or topology.split(":")[0] not in CHIP_LINKS:
        known = ", ".join(CHIP_LINKS)
        raise ConfigError(f"topology {topology!r}: must be like v5e:4x4, and one of {known}")
    if slices < 1:
        raise ConfigError(f"slices: at least 1, got {slices}")
    chips = math.prod(PodShape(topology, slices, 1).sides)
    if workers is None:
        workers = slices if slices > 1 else chips
    if workers < 1 or workers % slices or chips * slices % workers:
        raise ConfigError(
            f"workers: must be a multiple of the {slices} slices and divide the"
            f" {chips * slices} chips, got {workers}"
        )
    if chips * slices // workers % tensor:
        raise ConfigError(
            f"mesh.tensor: must divide the {chips * slices // workers} chips of a worker, "
            f"got {tensor}"
        )
    return PodShape(topology, slices, workers, tensor)


def pod_mesh(shape: PodShape) -> Mesh:
    """The mesh (worker, fsdp, tensor) of the absent chips: slice by slice, row by row of each.

    Raises ConfigError: libtpu is not installed, it knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("libtpu is not installed: `uv run --group aot` brings it")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        pod = topologies.get_topology_desc(
            topology_name=shape.topology, platform="tpu", num_slices=shape.slices
        )
    except RuntimeError as error:
        raise ConfigError(f"topology {shape.topology!r}: {error}") from None
    devices = sorted(pod.devices, key=lambda chip: (getattr(chip, "slice_index", 0), chip.coords))
    return Mesh(
        np.array(devices).reshape(shape.workers, *shape.shards),
        meshes.AXES,
        axis_types=(AxisType.Auto,) * 3,
    )


def link_model(shape: PodShape) -> LinkModel:
    """The links between workers. The chips of two neighbouring workers talk side by side."""
    links = CHIP_LINKS[shape.generation]
    return LinkModel(
        inside_bandwidth=links.neighbour * shape.chips_per_worker,
        inside_latency=HOP_SECONDS,
        between_bandwidth=links.outside * math.prod(shape.sides),
        between_latency=OUTSIDE_SECONDS,
        workers_per_slice=shape.workers // shape.slices,
        torus=_torus_of_workers(shape.sides, shape.chips_per_worker),
    )


def _torus_of_workers(sides: tuple[int, ...], chips_per_worker: int) -> tuple[int, ...]:
    """Workers along each dimension, when each takes whole rows of chips, from the last side on."""
    lengths = []
    for side in reversed(sides):
        taken = math.gcd(side, chips_per_worker)
        chips_per_worker //= taken
        lengths.append(side // taken)
    return tuple(reversed(lengths))
