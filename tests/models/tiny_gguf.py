"""Writes small GGUF files with the `gguf` package, as llama.cpp's converter would.

What a tensor is called is the package's business, so that our own names are checked against it.
"""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy_llama
from gguf.constants import MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType
from gguf.quants import quantize

from persyn_jax.models.decoder import DecoderConfig, Params

CONFIG = DecoderConfig(
    vocab_size=14,
    layers=2,
    d_model=32,
    d_ff=64,
    heads=4,
    kv_heads=2,
    head_dim=8,
    rope_theta=777.0,
    norm_eps=1e-5,
    tied_embeddings=True,
    max_positions=128,
)
_GEMMA = dataclasses.replace(
    CONFIG,
    activation="gelu_tanh",
    post_norms=True,
    norm_offset=1.0,
    embedding_scale=32**0.5,
    query_scale=8**-0.5,
    window=5,
)
CONFIGS = {
    "llama": CONFIG,
    "qwen2": dataclasses.replace(
        CONFIG, family="qwen2", attention_bias=True, tied_embeddings=False
    ),
    "qwen3": dataclasses.replace(CONFIG, family="qwen3", qk_norm=True),
    "gemma2": dataclasses.replace(
        _GEMMA,
        family="gemma2",
        attention_softcap=7.0,
        final_softcap=3.0,
        local_layers=(True, False),
    ),
    "gemma3": dataclasses.replace(
        _GEMMA,
        family="gemma3",
        layers=7,
        qk_norm=True,
        local_layers=(True, True, True, True, True, False, True),
        local_rope_theta=10000.0,
    ),
    "phi3": dataclasses.replace(CONFIG, family="phi3", tied_embeddings=False, window=6),
}
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcde123", "ab", "abc"]
VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 10,
    "tokenizer.ggml.merges": ["a b", "ab c"],
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}",
}
# A vocabulary of the other kind, as changes to the metadata (`write`): its ids are past the
# embedding's, which only a whole model minds.
PIECES = ["<pad>", "<eos>", "<bos>", *map("<0x{:02X}>".format, range(256))]
PIECES += ["\n\n", *"abc12\u2581", "ab", "\u2581a", "\u2581ab", "bc"]
SENTENCE_PIECE: dict[str, Any] = {
    "tokenizer__ggml__model": "llama",
    "tokenizer__ggml__pre": "default",
    "tokenizer__ggml__tokens": PIECES,
    "tokenizer__ggml__token_type": [3] * 3 + [6] * 256 + [4] + [1] * 10,
    "tokenizer__ggml__scores": [-1000.0] * 3
    + [0.0] * 256
    + [-1000.0, *(-1.0 * i for i in range(10))],
    "tokenizer__ggml__merges": None,
    "tokenizer__ggml__eos_token_id": 1,
    "tokenizer__ggml__bos_token_id": 2,
    "tokenizer__ggml__padding_token_id": 0,
    "tokenizer__ggml__add_space_prefix": False,
    "tokenizer__chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
}
_NAMES = {
    "attention_norm.scale": MODEL_TENSOR.ATTN_NORM,
    "mlp_norm.scale": MODEL_TENSOR.FFN_NORM,
    "q.kernel": MODEL_TENSOR.ATTN_Q,
    "k.kernel": MODEL_TENSOR.ATTN_K,
    "v.kernel": MODEL_TENSOR.ATTN_V,
    "q.bias": MODEL_TENSOR.ATTN_Q,
    "k.bias": MODEL_TENSOR.ATTN_K,
    "v.bias": MODEL_TENSOR.ATTN_V,
    "o.kernel": MODEL_TENSOR.ATTN_OUT,
    "gate.kernel": MODEL_TENSOR.FFN_GATE,
    "up.kernel": MODEL_TENSOR.FFN_UP,
    "down.kernel": MODEL_TENSOR.FFN_DOWN,
    "q_norm.scale": MODEL_TENSOR.ATTN_Q_NORM,
    "k_norm.scale": MODEL_TENSOR.ATTN_K_NORM,
    "post_attention_norm.scale": MODEL_TENSOR.ATTN_POST_NORM,
    "post_mlp_norm.scale": MODEL_TENSOR.FFN_POST_NORM,
}


def metadata(c: DecoderConfig) -> dict[str, Any]:
    """What the converter writes of `c`: all but which layers are local, which one must know."""
    found = {
        "block_count": c.layers,
        "context_length": c.max_positions,
        "embedding_length": c.d_model,
        "feed_forward_length": c.d_ff,
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "rope.freq_base": c.rope_theta,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "attention.sliding_window": c.window,
        "attn_logit_softcapping": c.attention_softcap,
        "final_logit_softcapping": c.final_softcap,
    }
    return {f"{c.family}.{key}": value for key, value in found.items()} | VOCABULARY


def random_params(c: DecoderConfig, seed: int) -> Params:
    """Those of `numpy_llama`, and what the family has on top."""
    params = numpy_llama.random_params(c, seed)
    rng = np.random.default_rng(seed)

    def draw(width: int) -> np.ndarray:
        return rng.normal(size=(c.layers, width)).astype(np.float32)

    layers = params["layers"]
    if c.attention_bias:
        for part, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)):
            layers[part] = layers[part] | {"bias": draw(heads * c.head_dim)}
    if c.qk_norm:
        layers |= {"q_norm": {"scale": draw(c.head_dim)}, "k_norm": {"scale": draw(c.head_dim)}}
    if c.post_norms:
        norms = ("post_attention_norm", "post_mlp_norm")
        layers |= {name: {"scale": draw(c.d_model)} for name in norms}
    return params


def write(
    path: Path,
    params: Params,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    more_tensors: dict[str, np.ndarray] | None = None,
    config: DecoderConfig = CONFIG,
    **changed: Any,
) -> Path:
    """Writes `params`, matrices as `kind`. changed: metadata with `__` for dots, None to omit."""
    writer = gguf.GGUFWriter(path, config.family)
    new = {key.replace("__", "."): value for key, value in changed.items()}
    for key, value in (metadata(config) | new).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, array in (tensors(config, params) | (more_tensors or {})).items():
        if array.ndim == 2 and kind is not GGMLQuantizationType.F32:
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(c: DecoderConfig, params: Params) -> dict[str, np.ndarray]:
    """The file's tensors by name."""
    shift = np.float32(c.norm_offset)
    found = {
        TENSOR_NAMES[MODEL_TENSOR.TOKEN_EMBD] + ".weight": params["embed"]["embedding"],
        TENSOR_NAMES[MODEL_TENSOR.OUTPUT_NORM] + ".weight": params["final_norm"]["scale"] + shift,
    }
    if "head" in params:
        found[TENSOR_NAMES[MODEL_TENSOR.OUTPUT] + ".weight"] = params["head"]["kernel"]
    for i in range(c.layers):
        leaves = {
            f"{module}.{leaf}": stack[i]
            for module, stacks in params["layers"].items()
            for leaf, stack in stacks.items()
        }
        for leaf, array in stored(c, leaves).items():
            ending = "bias" if leaf.endswith("bias") else "weight"
            tensor = _NAMES.get(leaf, MODEL_TENSOR.ATTN_QKV)
            found[f"{TENSOR_NAMES[tensor].format(bid=i)}.{ending}"] = array
    return found


def stored(c: DecoderConfig, leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A layer's leaves as the family's files have them."""
    found = {
        leaf: array + np.float32(c.norm_offset) if "norm" in leaf else array
        for leaf, array in leaves.items()
    }
    if c.family == "llama":
        found["q.kernel"] = interleaved(found["q.kernel"], c.heads)
        found["k.kernel"] = interleaved(found["k.kernel"], c.kv_heads)
    if c.family == "phi3":
        found["qkv"] = np.concatenate([found.pop(f"{part}.kernel") for part in "qkv"])
        gate, up = found.pop("gate.kernel"), found.pop("up.kernel")
        found["up.kernel"] = np.concatenate([gate, up])
    return found


def interleaved(kernel: np.ndarray, heads: int) -> np.ndarray:
    """Rows (x_i, x_{i + E/2}) of each head next to each other, as llama.cpp's RoPE wants them."""
    width = len(kernel) // heads
    rows = []
    for head in range(heads):
        for i in range(width // 2):
            rows += [head * width + i, head * width + i + width // 2]
    return kernel[rows]
