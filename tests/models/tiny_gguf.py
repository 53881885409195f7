"""Writes a small GGUF file with the `gguf` package, as llama.cpp's converter would."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
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
    norm_eps=float(np.float32(1e-5)),  # GGUF keeps float32
    tied_embeddings=True,
    max_positions=128,
)
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcde123", "ab", "abc"]
METADATA: dict[str, Any] = {
    "llama.block_count": CONFIG.layers,
    "llama.context_length": CONFIG.max_positions,
    "llama.embedding_length": CONFIG.d_model,
    "llama.feed_forward_length": CONFIG.d_ff,
    "llama.attention.head_count": CONFIG.heads,
    "llama.attention.head_count_kv": CONFIG.kv_heads,
    "llama.rope.freq_base": CONFIG.rope_theta,
    "llama.attention.layer_norm_rms_epsilon": CONFIG.norm_eps,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 10,
    "tokenizer.ggml.merges": ["a b", "ab c"],
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}",
}
_NAMES = {
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def write(
    path: Path,
    params: Params,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    more_tensors: dict[str, np.ndarray] | None = None,
    **changed: Any,
) -> Path:
    """Writes `params`, matrices as `kind`. changed: metadata with `__` for dots, None to omit."""
    writer = gguf.GGUFWriter(path, "llama")
    metadata = METADATA | {key.replace("__", "."): value for key, value in changed.items()}
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, array in (tensors(params) | (more_tensors or {})).items():
        if array.ndim == 2 and kind is not GGMLQuantizationType.F32:
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(params: Params) -> dict[str, np.ndarray]:
    """The file's tensors by name."""
    found = {
        "token_embd.weight": params["embed"]["embedding"],
        "output_norm.weight": params["final_norm"]["scale"],
    }
    if "head" in params:
        found["output.weight"] = params["head"]["kernel"]
    for module, leaves in params["layers"].items():
        for stack in leaves.values():
            for i, array in enumerate(stack):
                heads = {"q": CONFIG.heads, "k": CONFIG.kv_heads}.get(module)
                stored = array if heads is None else interleaved(array, heads)
                found[f"blk.{i}.{_NAMES[module]}.weight"] = stored
    return found


def interleaved(kernel: np.ndarray, heads: int) -> np.ndarray:
    """Rows (x_i, x_{i + E/2}) of each head next to each other, as llama.cpp's RoPE wants them."""
    width = len(kernel) // heads
    rows = []
    for head in range(heads):
        for i in range(width // 2):
            rows += [head * width + i, head * width + i + width // 2]
    return kernel[rows]
