"""Where the engine's weights and caches lie: on one device, or cut over a tensor-parallel mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from persyn_jax import mesh as meshes
from persyn_jax.config import ConfigError
from persyn_jax.mesh import TENSOR
from persyn_jax.models.decoder import DecoderConfig, Params
from persyn_jax.sampling.config import EngineConfig

# Which axis of a kernel [out, in] is cut (Megatron-LM, arXiv 1909.08053): heads and features are
# dealt out, so that a layer needs two sums over the devices and nothing else.
_CUT_AXIS = {"q": 0, "k": 0, "v": 0, "gate": 0, "up": 0, "o": 1, "down": 1, "head": 0}


class Placement:
    """Says where parameters and caches lie, and puts them there."""

    def __init__(self, shape: DecoderConfig, config: EngineConfig, devices: Any = None):
        """devices: other ones than JAX's own, such as those of a slice that is not there.

        Raises ConfigError when the model or the machine cannot be cut so.
        """
        self._mesh = None
        if config.tensor == 1 and devices is None:
            return
        devices = jax.devices() if devices is None else devices
        if config.tensor > len(devices):
            raise ConfigError(
                f"engine.tensor {config.tensor} needs as many devices, there are {len(devices)}"
            )
        if shape.kv_heads % config.tensor:
            raise ConfigError(
                f"engine.tensor {config.tensor} must divide the model's {shape.kv_heads} "
                "key-value heads"
            )
        self._mesh = meshes.make_mesh(1, tensor=config.tensor, devices=devices)

    def params(self, params: Params, dtype: str) -> Params:
        """The parameters in `dtype`, placed. They may be shapes alone."""
        return jax.tree.map_with_path(
            lambda path, leaf: self._put(leaf, jnp.dtype(dtype), _cut_axis(path)), params
        )

    def cache(self, cache: Any) -> Any:
        """A cache of buffers [rows, length, K E], cut between heads."""
        return jax.tree.map(lambda buffer: self._put(buffer, buffer.dtype, 2), cache)

    def whole(self, arrays: Any) -> Any:
        """Shapes of arrays that every device holds whole; the arrays themselves on one device."""
        if self._mesh is None:
            return arrays
        return jax.tree.map(
            lambda leaf: self._put(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), leaf.dtype, None),
            arrays,
        )

    def like(self, tree: Any) -> Any:
        """The shardings of placed arrays, for a program's results; None on one device."""
        return jax.tree.map(lambda leaf: leaf.sharding, tree) if self._mesh else None

    def _put(self, leaf: Any, dtype: Any, axis: int | None) -> Any:
        if self._mesh is None:
            return jnp.asarray(leaf, dtype)
        cut = axis is not None and leaf.shape[axis] % self._mesh.shape[TENSOR] == 0
        spec = [TENSOR if cut and i == axis else None for i in range(len(leaf.shape))]
        sharding = NamedSharding(self._mesh, PartitionSpec(*spec))
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)
        return jax.device_put(np.asarray(leaf, dtype), sharding)


def _cut_axis(path: tuple) -> int | None:
    names = [getattr(key, "key", None) for key in path]
    axis = next((_CUT_AXIS[name] for name in names if name in _CUT_AXIS), None)
    # Of an adapter, [r, in] and [out, r], only one factor has the axis that is cut.
    whole = {0: "lora_a", 1: "lora_b"}
    return None if axis is None or names[-1] == whole[axis] else axis
