"""A Llama decoder written from its equations in NumPy float64: one sequence, one head at a time.

The independent reference for `persyn_jax.models.decoder`; takes the same parameters, stacked.
"""

import numpy as np

from persyn_jax.models.decoder import DecoderConfig, Params

SMALL = {
    "vocab_size": 31,
    "layers": 2,
    "d_model": 24,
    "d_ff": 40,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 8,
    "rope_theta": 50.0,
    "norm_eps": 1e-3,
    "max_positions": 64,
}


def small_config(tied: bool) -> DecoderConfig:
    """A decoder in which no two lengths are equal that may be confused."""
    return DecoderConfig(**SMALL, tied_embeddings=tied)


def random_params(config: DecoderConfig, seed: int) -> Params:
    """Parameters of the shapes that the decoder documents, none of them special (no ones)."""
    rng = np.random.default_rng(seed)
    c, L = config, config.layers

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    params = {
        "embed": {"embedding": normal(c.vocab_size, c.d_model)},
        "layers": {
            "attention_norm": {"scale": 1 + normal(L, c.d_model)},
            "mlp_norm": {"scale": 1 + normal(L, c.d_model)},
            "q": {"kernel": normal(L, c.heads * c.head_dim, c.d_model)},
            "k": {"kernel": normal(L, c.kv_heads * c.head_dim, c.d_model)},
            "v": {"kernel": normal(L, c.kv_heads * c.head_dim, c.d_model)},
            "o": {"kernel": normal(L, c.d_model, c.heads * c.head_dim)},
            "gate": {"kernel": normal(L, c.d_ff, c.d_model)},
            "up": {"kernel": normal(L, c.d_ff, c.d_model)},
            "down": {"kernel": normal(L, c.d_model, c.d_ff)},
        },
        "final_norm": {"scale": 1 + normal(c.d_model)},
    }
    if not c.tied_embeddings:
        params["head"] = {"kernel": normal(c.vocab_size, c.d_model)}
    return params


def hidden_states(c: DecoderConfig, params: Params, tokens) -> np.ndarray:
    """Final hidden states [T, D] of one sequence."""
    x = params["embed"]["embedding"].astype(np.float64)[np.asarray(tokens)]
    for i in range(c.layers):
        w = {
            f"{module}.{leaf}": array[i].astype(np.float64)
            for module, leaves in params["layers"].items()
            for leaf, array in leaves.items()
        }
        h = _rms_norm(x, w["attention_norm.scale"], c.norm_eps)
        x = x + _attention(c, h, w) @ w["o.kernel"].T
        h = _rms_norm(x, w["mlp_norm.scale"], c.norm_eps)
        gate = h @ w["gate.kernel"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up.kernel"].T)) @ w["down.kernel"].T
    return _rms_norm(x, params["final_norm"]["scale"].astype(np.float64), c.norm_eps)


def log_probabilities(c: DecoderConfig, params: Params, tokens) -> np.ndarray:
    """log p(next token) [T, V] after each token of one sequence."""
    kernel = (params["embed"]["embedding"] if c.tied_embeddings else params["head"]["kernel"]).T
    logits = hidden_states(c, params, tokens) @ kernel.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def response_log_likelihoods(c: DecoderConfig, params: Params, prompt, response) -> np.ndarray:
    """log p of each response token, given all before it."""
    after = log_probabilities(c, params, [*prompt, *response])
    return np.array([after[len(prompt) - 1 + i, token] for i, token in enumerate(response)])


def _rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def _rotated(c: DecoderConfig, x) -> np.ndarray:
    """Pair (x_i, x_{i + E/2}) at position t, as a complex number, turned by t theta^(-2i/E)."""
    half = c.head_dim // 2
    angle = np.outer(np.arange(len(x)), c.rope_theta ** (-2 * np.arange(half) / c.head_dim))
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=1)


def _attention(c: DecoderConfig, h, w) -> np.ndarray:
    T, E = len(h), c.head_dim
    q, k, v = (h @ w[f"{name}.kernel"].T for name in "qkv")
    out = np.zeros((T, c.heads * E))
    for head in range(c.heads):
        shared = head // (c.heads // c.kv_heads)
        own, other = slice(head * E, (head + 1) * E), slice(shared * E, (shared + 1) * E)
        query, key = _rotated(c, q[:, own]), _rotated(c, k[:, other])
        for t in range(T):
            score = np.exp(key[: t + 1] @ query[t] / np.sqrt(E))
            out[t, own] = score / score.sum() @ v[: t + 1, other]
    return out
