"""Records what `transformers` and torch say of tiny random reward models, one folder per family.

`record_rewards.py` writes the folders beside this file anew (weights, config.json and
expected.npz). It needs torch and transformers (recorded with torch 2.13 and transformers 5.24),
which the project itself does not.
"""

import os
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
PAD = 0
LENGTHS = (3, 17, 32, 9)

SHAPE = {
    "vocab_size": 259,  # our byte-level tokenizer's
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "num_labels": 1,
}
MODELS = {
    "llama": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "qwen2": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "gemma2": transformers.Gemma2Config(
        **SHAPE, head_dim=8, sliding_window=5, query_pre_attn_scalar=24
    ),
}


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items()):
        record(HERE / name, config, seed)


def record(folder: Path, config, seed: int) -> None:
    """Several rows together, padded on the right, as reward models are asked."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_config(
        config, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # larger than models begin with
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
        tokens = torch.full((len(LENGTHS), max(LENGTHS)), PAD)
        for row, length in enumerate(LENGTHS):
            tokens[row, :length] = torch.randint(PAD + 1, config.vocab_size, (length,))
        rewards = model(tokens, attention_mask=(tokens != PAD).long()).logits[:, 0]
    model.save_pretrained(folder)
    np.savez_compressed(
        folder / "expected.npz",
        tokens=tokens.numpy().astype(np.int32),
        lengths=np.array(LENGTHS, np.int32),
        rewards=rewards.numpy(),
    )
    print(folder.name, rewards.tolist())


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
