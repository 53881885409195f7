"""How much memory a train step needs, from shapes alone: nothing is allocated or compiled."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from persyn_jax.mesh import Platform
from persyn_jax.models import decoder
from persyn_jax.models.adapters import adapter_shapes
from persyn_jax.models.decoder import DecoderConfig
from persyn_jax.models.recompute import Recompute
from persyn_jax.models.rows import CHUNK, Rows, pack
from persyn_jax.training.config import ComputeDtype, TrainConfig
from persyn_jax.training.losses import adapter_loss, response_loss
from persyn_jax.training.optimisers import make_optimiser
from persyn_jax.training.precision import cast_loss
from persyn_jax.training.step import LossFunction

# How many buffers of a kind are alive at the peak, as XLA lays them out on a CPU (see the test).
_LOGIT_COPIES = 3  # logits, what is made of them, their gradient
_HEAD_COPIES = 2  # of the head's gradient, which is there from the way forward on
_SCORE_COPIES = 1.5  # the attention scores' gradient in one layer
_UPDATE_COPIES = {"adamw": 1, "muon": 3, "sgd": 1, "adafactor": 1}  # of all, and the largest again


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device, for one worker (or the shard of a worker)."""

    state: int
    """Parameters and optimiser state, float32, and a frozen base: there all the time."""
    kept: int
    """What the backward pass finds kept by the forward pass."""
    working: int
    """At most, beside the state: gradients, what is kept, and what is worked on."""

    @property
    def total(self) -> int:
        return self.state + self.working


def estimate_training_memory(
    model: DecoderConfig, config: TrainConfig, platform: Platform, shards: int = 1
) -> TrainingMemory:
    """The memory of a fine-tuning step; of the batch, the program and the host, nothing.

    What is kept is exact: it is read off the traced loss. The peak is at the head, in the backward
    pass of the layers, or in the update, and how many buffers are alive there is as measured on a
    CPU under JAX 0.10 and 0.12, where it holds to a fifth (0.12 and a tiny model: to a third);
    other platforms lay out alike but have not been measured. shards: devices that share a worker,
    taken to split parameters and batch evenly.
    """
    widens = platform == "cpu" and jax.__version_info__ < (0, 11)  # keeps bfloat16 as float32
    stored = "float32" if widens else config.compute_dtype
    params, base = trained_shapes(model, config)
    size, largest = _bytes(params), max(map(_bytes, jax.tree.leaves(params)))
    frozen = _bytes(base) * np.dtype(config.compute_dtype).itemsize // 4
    state = size + _bytes(jax.eval_shape(make_optimiser(config.optimiser, 1).init, params))
    kept = kept_bytes(model, config, config.recompute, stored)
    again = (
        kept_bytes(model, config, "nothing", stored) - kept
    )  # of all layers; alive for one at a time
    sums = size * (config.accumulate > 1)
    if config.compute_dtype == "bfloat16":
        sums += size // 2  # gradients in bfloat16, before they are turned to float32
    logits = 4 * config.rows * min(config.row_response_tokens, CHUNK) * model.vocab_size
    scores = 4 * config.rows * model.heads * config.row_tokens**2
    layer = max(again, 0) // model.layers + int(_SCORE_COPIES * scores)
    head_gradient = 0 if base else _HEAD_COPIES * _head_bytes(model, "float32")
    working = max(
        kept + sums + _LOGIT_COPIES * logits + head_gradient,  # at the head
        kept + sums + size + layer,  # on the way back
        sums + _UPDATE_COPIES[config.optimiser.name] * size + largest,  # in the update
    )
    return TrainingMemory((state + frozen) // shards, kept // shards, working // shards)


def kept_bytes(
    model: DecoderConfig, config: TrainConfig, recompute: Recompute, dtype: ComputeDtype
) -> int:
    """Bytes that the loss keeps for its gradient, besides parameters and batch themselves.

    They count what is computed from the parameters, as their copies in bfloat16. They do not count
    the head's gradient, made on the way forward: it is one of the gradients, and none with LoRA.
    """
    loss: LossFunction = response_loss if config.lora is None else adapter_loss
    loss = cast_loss(functools.partial(loss, model, recompute), dtype)

    def kept(params: Any, batch: Rows, *frozen: Any) -> list[jax.Array]:
        _, pull_back = jax.vjp(lambda params: loss(params, batch, *frozen)[0], params)
        given = {id(leaf) for leaf in jax.tree.leaves((params, batch, frozen))}
        return [leaf for leaf in jax.tree.leaves(pull_back) if id(leaf) not in given]

    params, base = trained_shapes(model, config)
    in_dtype = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), base)
    frozen = (in_dtype,) if base else ()
    found = _bytes(jax.eval_shape(kept, params, batch_shapes(config), *frozen))
    return found - _head_bytes(model, dtype)


def _head_bytes(model: DecoderConfig, dtype: ComputeDtype) -> int:
    return model.vocab_size * model.d_model * np.dtype(dtype).itemsize


def trained_shapes(
    model: DecoderConfig, config: TrainConfig
) -> tuple[decoder.Params, decoder.Params]:
    """Shapes of (what is trained, what is frozen): with LoRA the adapters and all the rest."""
    params, lora = parameter_shapes(model), config.lora
    if lora is None:
        return params, {}
    return adapter_shapes(model, lora.rank, lora.targets), params


def parameter_shapes(model: DecoderConfig) -> decoder.Params:
    """Shapes and dtypes of the parameters, layers stacked."""
    return jax.eval_shape(lambda: decoder.init(model, jax.random.key(0)))


def batch_shapes(config: TrainConfig) -> Rows:
    """The shapes of one worker's batch: [B, T] and [B, R]."""
    empty = pack([()] * config.rows, config.row_tokens, config.row_response_tokens)
    return jax.eval_shape(lambda batch: batch, empty)


def _bytes(shapes: Any) -> int:
    leaves = jax.tree.leaves(shapes)
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
