"""The engine under test: a tiny random model, shapes small enough that everything happens often."""

import dataclasses

import numpy as np

from persyn_jax.models import weights
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
