"""What a student gains from a few answers: a short fine-tuning, and how much likelier it then holds
the reference answers of other prompts."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from persyn_jax.models import tokenizer
from persyn_jax.models.adapters import Adapters, init_adapters, merge
from persyn_jax.models.decoder import Params
from persyn_jax.models.rows import Conversation
from persyn_jax.models.weights import Model
from persyn_jax.records import Prompt
from persyn_jax.sampling.scoring import mean_log_likelihoods
from persyn_jax.streams import numpy_stream
from persyn_jax.training.batches import batch_rows
from persyn_jax.training.config import TrainConfig
from persyn_jax.training.losses import adapter_loss, response_loss
from persyn_jax.training.optimisers import make_optimiser
from persyn_jax.training.precision import cast_loss
from persyn_jax.training.step import LossFunction


class Tuning(NamedTuple):
    """Short fine-tunings of one student; the step is compiled once for all of them."""

    student: Model
    config: TrainConfig
    steps: int
    seed: int
    optimiser: optax.GradientTransformation
    step: Callable[..., tuple[Params, Any]]
    """(params, optimiser state, batch, *frozen) -> (params, optimiser state); the first two are
    donated."""
    start: Params
    """What is trained, NumPy: all parameters, or adapters beside frozen ones."""
    frozen: tuple[Params, ...]


def make_tuning(student: Model, config: TrainConfig, steps: int, seed: int) -> Tuning:
    """By one worker, as `config` says: its optimiser, rows, room in a row, LoRA and dtype.

    Raises ConfigError as `adapters.adapter_shapes`.
    """
    loss, start, frozen = _parts(student, config, seed)
    optimiser = make_optimiser(config.optimiser, steps)
    gradient_of = jax.grad(cast_loss(loss, config.compute_dtype), has_aux=True)

    def step(params: Any, state: Any, batch: Any, *frozen: Params) -> tuple[Any, Any]:
        gradients, _ = gradient_of(params, batch, *frozen)
        updates, state = optimiser.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    return Tuning(student, config, steps, seed, optimiser, compiled, start, frozen)


def _parts(
    student: Model, config: TrainConfig, seed: int
) -> tuple[LossFunction, Params, tuple[Params, ...]]:
    """(loss, what is trained, what is frozen)."""
    if config.lora is None:
        loss = functools.partial(response_loss, student.config, config.recompute)
        return loss, student.params, ()
    rank, targets = config.lora.rank, config.lora.targets
    adapters = init_adapters(student.config, rank, targets, seed, "gain adapter")
    adapted = replace(student.config, lora_scale=Adapters(adapters, config.lora.alpha).scale)
    dtype = jax.numpy.dtype(config.compute_dtype)
    base = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, dtype), student.params)
    return functools.partial(adapter_loss, adapted, config.recompute), adapters, (base,)


def fine_tune(tuning: Tuning, conversations: Sequence[Conversation]) -> Model:
    """The student after all steps on these conversations, each of which has a row of its own.

    They come in an order that depends on their number and the seed alone, again and again until the
    steps are taken.
    """
    config, size = tuning.config, tuning.config.rows
    params = jax.tree.map(jax.numpy.array, tuning.start)  # a copy: it is donated
    state = tuning.optimiser.init(params)
    order = _order(len(conversations), tuning.steps * size, tuning.seed)
    for number in range(tuning.steps):
        rows = [[index] for index in order[number * size : (number + 1) * size]]
        batch = batch_rows(conversations, rows, config)
        params, state = tuning.step(params, state, batch, *tuning.frozen)
    learned = jax.tree.map(np.asarray, params)
    if config.lora is not None:
        learned = merge(tuning.student.params, Adapters(learned, config.lora.alpha))
    return replace(tuning.student, params=learned)


def _order(count: int, length: int, seed: int) -> list[int]:
    """`length` indices: all of the `count` in one order, then all in another, ..."""
    epochs = -(-length // count)
    orders = [numpy_stream(seed, "gain order", epoch).permutation(count) for epoch in range(epochs)]
    return np.concatenate(orders)[:length].tolist()


def reference_log_likelihoods(model: Model, prompts: Sequence[Prompt], mesh: Mesh) -> np.ndarray:
    """Mean log-likelihood of a token of each prompt's reference answer, EOS included, in nats,
    float64 [N]. Every prompt must have one."""
    tok = model.tokenizer
    references = [
        Conversation(
            tuple(tokenizer.prompt_ids(tok, prompt.messages)),
            tuple(tokenizer.response_ids(tok, prompt.answer or "", ended=True)),
        )
        for prompt in prompts
    ]
    return mean_log_likelihoods(model, references, mesh)
