"""Shapes of pods: who is a worker there, and what lies between two of them."""

import math

import numpy as np
import pytest

from persyn_jax.bench import pod_shapes
from persyn_jax.bench.pod_shapes import PodShape, link_model, pod_mesh, pod_shape
from persyn_jax.config import ConfigError


@pytest.mark.parametrize(
    ("arguments", "workers", "shards"),
    [
        (("v5e:4x4", 1, None), 16, (1, 1)),  # one slice: a worker a chip
        (("v6e:16x16", 1, None), 256, (1, 1)),
        (("v5e:4x4", 2, None), 2, (16, 1)),  # several: a worker a slice
        (("v5p:2x2x4", 8, None, 4), 8, (4, 4)),
        (("v5e:4x4", 2, 32), 32, (1, 1)),
        (("v5e:8x8", 1, 16), 16, (4, 1)),  # half a row of chips
        (("v5e:8x8", 2, 8), 8, (16, 1)),  # two rows of chips
    ],
)
def test_workers_are_slices_or_chips_or_what_is_asked_for(arguments, workers, shards):
    shape = pod_shape(*arguments)
    assert (shape.workers, shape.shards) == (workers, shards)
    chips = math.prod(shape.sides) * shape.slices
    assert workers * math.prod(shards) == chips == workers * shape.chips_per_worker


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("v5e-4x4", 1, None), "topology 'v5e-4x4': must be like v5e:4x4"),
        (("h100:8", 1, None), "one of v5e, v5p, v6e"),
        (("v5e:4x", 1, None), "must be like v5e:4x4"),
        (("v5e:4x4", 0, None), "slices: at least 1, got 0"),
        (("v5e:4x4", 2, 1), "a multiple of the 2 slices and divide the 32 chips, got 1"),
        (("v5e:4x4", 1, 5), "divide the 16 chips, got 5"),
        (("v5e:4x4", 1, 0), "got 0"),
        (("v5e:4x4", 2, None, 3), "mesh.tensor: must divide the 16 chips of a worker, got 3"),
    ],
)
def test_other_shapes_are_refused_in_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message):
        pod_shape(*arguments)


@pytest.mark.parametrize(
    ("shape", "torus"),
    [
        (PodShape("v5e:4x4", 1, 16), (4, 4)),
        (PodShape("v5e:4x4", 3, 3), (1, 1)),
        (PodShape("v5e:8x8", 1, 16), (8, 2)),
        (PodShape("v5e:8x8", 2, 8), (4, 1)),
        (PodShape("v5p:4x4x4", 1, 2), (2, 1, 1)),
        (PodShape("v5e:6x4", 1, 2), (2, 1)),
    ],
)
def test_workers_stand_on_a_torus_of_their_own(shape, torus):
    """With the bandwidth of all chips side by side; a slice's way out is that of all its chips."""
    links = link_model(shape)
    assert links.torus == torus
    assert links.workers_per_slice == np.prod(torus) == shape.workers // shape.slices
    chip = pod_shapes.CHIP_LINKS[shape.generation]
    assert links.inside_bandwidth == chip.neighbour * shape.chips_per_worker
    assert links.between_bandwidth == chip.outside * math.prod(shape.sides)


def test_without_libtpu_one_line_says_where_it_comes_from(monkeypatch):
    monkeypatch.setattr(pod_shapes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="libtpu is not installed: `uv run --group aot`"):
        pod_mesh(PodShape("v5e:4x4", 1, 16))
