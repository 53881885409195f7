"""The engine under test: a tiny random model, shapes small enough that everything happens often."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from persyn_jax.models import decoder, weights
from persyn_jax.models.spec import ModelConfig
from persyn_jax.models.weights import Model
from persyn_jax.sampling.config import EngineConfig
from persyn_jax.sampling.engine import Request


def sharp_model(seed: int) -> Model:
    """A random model whose next token depends on its context much more than on chance."""
    model = weights.load(ModelConfig(weights="random:tiny"), seed)
    embedding = 25 * model.params["embed"]["embedding"]
    return dataclasses.replace(model, params=model.params | {"embed": {"embedding": embedding}})


MODEL = sharp_model(seed=0)
EOS = MODEL.tokenizer.eos_token_id
# Attention reads this cache in two blocks of 80.
CONFIG = EngineConfig(
    slots=4,
    cache_length=160,
    prefill_rows=3,
    prefill_chunk=8,
    decode_steps=3,
    prefix_blocks=6,
    score_rows=2,
)
_PREFIXES = np.random.default_rng(0).integers(3, 259, (3, 24)).tolist()


def log_probabilities(model: Model, tokens: Sequence[int]) -> np.ndarray:
    """log p(next token) after each token of one sequence, from its full logits: float64 [T, V]."""
    longest = 256
    padded_1T = np.zeros((1, longest), np.int32)
    padded_1T[0, : len(tokens)] = tokens
    logits_TV = np.asarray(_full_logits(model.config, model.params, padded_1T)[0], np.float64)
    logits_TV = logits_TV[: len(tokens)]
    return logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))


@functools.partial(jax.jit, static_argnums=0)
def _full_logits(config, params, tokens_1T):
    positions_1T = np.arange(tokens_1T.shape[1], dtype=np.int32)[None]
    attend = decoder.attend_causally(np.ones_like(positions_1T))
    hidden_1TD, _ = decoder.hidden_states(config, params, tokens_1T, positions_1T, attend)
    return decoder.logits(config, params, hidden_1TD)


def random_request(rng: np.random.Generator, max_tokens: int = 12) -> Request:
    """Prompts of all lengths, many of them with a common beginning; every kind of sampling."""
    prefix = _PREFIXES[rng.integers(3)][: rng.integers(25)]
    longest = 120 if rng.random() < 0.2 else 20
    own = rng.integers(3, 259, rng.integers(1, longest)).tolist()
    return Request(
        tokens=tuple(prefix + own),
        max_tokens=int(rng.integers(1, max_tokens + 1)),
        temperature=float(rng.choice([0.0, 0.7, 1.5])),
        top_p=float(rng.choice([0.6, 1.0])),
        top_k=int(rng.choice([0, 0, 3])),
        seed=int(rng.integers(2**32)),
        logprobs=[None, 0, 4][rng.integers(3)],
    )
