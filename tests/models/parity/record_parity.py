"""Records what `transformers` and torch say of tiny random models, one folder per family.

`record_parity.py` writes the folders beside this file anew (weights, config.json and
expected.npz); `record_parity.py --check FOLDER...` opens folders that we wrote in `transformers`
and compares their logits with those recorded under the same names. Random LoRA adapters of two are
recorded beside them, as PEFT writes them. It needs torch, transformers and peft (recorded
with torch 2.13, transformers 5.24 and peft 0.21), which the project itself does not.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

HERE = Path(__file__).parent
WINDOW = 5
PROMPT, GENERATED = 4, 20
ENTRIES = 16  # of each gradient
CLEAR = 1e-3  # how far the likeliest token must be ahead of the next one

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WIDE = {"head_dim": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [1.5, 2.5, 4.0, 8.0],
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
MODELS = {
    "llama": transformers.LlamaConfig(**SHAPE | WIDE, tie_word_embeddings=False),
    "llama3": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "qwen2": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2_windowed": transformers.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SHAPE | WIDE, tie_word_embeddings=False),
    "gemma2": transformers.Gemma2Config(
        **SHAPE | WIDE,
        sliding_window=WINDOW,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **SHAPE | WIDE | {"num_hidden_layers": 3},
        sliding_window=WINDOW,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": LINEAR,
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
    "phi3": transformers.Phi3Config(**SHAPE, sliding_window=WINDOW),
    "phi3_longrope": transformers.Phi3Config(
        **SHAPE | {"max_position_embeddings": 128},
        original_max_position_embeddings=48,
        rope_parameters=LONGROPE,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", nargs="+", type=Path, metavar="FOLDER")
    folders = parser.parse_args().check
    if folders:
        for folder in folders:
            check(folder)
        return
    for name, config in MODELS.items():
        record(HERE / name, config)
    record_adapter("llama", ["q_proj", "down_proj"], {})
    heads, groups = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    size = SHAPE["hidden_size"] // heads
    parts = {
        "qkv_proj": [heads * size, groups * size, groups * size],
        "gate_up_proj": [SHAPE["intermediate_size"]] * 2,
    }
    record_adapter("phi3", ["qkv_proj", "gate_up_proj", "o_proj"], parts)


def record(folder: Path, config) -> None:
    models = (random_model(config, seed) for seed in range(100))
    prompts = ((model, torch.randint(0, config.vocab_size, (PROMPT,))) for model in models)
    model, generated = next(
        (model, tokens) for model, prompt in prompts if (tokens := greedy(model, prompt))
    )
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.randint(0, config.vocab_size, (2, PROMPT + GENERATED))
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    expected = {
        "tokens": tokens.numpy().astype(np.int32),
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        "greedy": np.array(generated, np.int32),  # with the prompt
    }
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.flatten().numpy()
        expected[f"norm {name}"] = np.linalg.norm(gradient.astype(np.float64))
        expected[f"entries {name}"] = gradient[entry_places(gradient.size)]
    np.savez_compressed(folder / "expected.npz", **expected)
    print(folder.name, f"loss {loss:.4f}", "greedy", generated)


def record_adapter(name: str, targets: list[str], parts: dict[str, list[int]]) -> None:
    """parts: rows of each part of a fused tensor, which has an adapter for each part."""
    base = transformers.AutoModelForCausalLM.from_pretrained(
        HERE / name, attn_implementation="eager"
    )
    base.name_or_path = name
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=targets,
        task_type="CAUSAL_LM",
        rank_pattern={module: 2 * len(rows) for module, rows in parts.items()},
        alpha_pattern={module: 6 * len(rows) for module, rows in parts.items()},
    )
    model = peft.get_peft_model(base, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(0.0, 0.3)
            for module, rows in parts.items():
                if f"{module}.lora_B" in parameter_name:
                    parameter *= torch.block_diag(*(torch.ones(count, 2) for count in rows))
        tokens = torch.tensor(np.load(HERE / name / "expected.npz")["tokens"], dtype=torch.int64)
        logits = model(tokens).logits.numpy()
    folder = HERE / name / "adapter"
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    np.savez_compressed(folder / "logits.npz", logits=logits)


def random_model(config, seed: int):
    """Weights larger than models begin with, so that attention is far from even."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def entry_places(size: int) -> np.ndarray:
    """Which entries of a flattened gradient are recorded."""
    return np.linspace(0, size - 1, ENTRIES).astype(int)


def greedy(model, prompt: torch.Tensor) -> list[int] | None:
    """The prompt and the likeliest tokens one after the other, each from a whole forward.

    None if two tokens were ever about as likely, or the text repeats itself.
    """
    tokens = prompt.tolist()
    with torch.no_grad():
        for _ in range(GENERATED):
            values, places = model(torch.tensor([tokens])).logits[0, -1].topk(2)
            if values[0] - values[1] < CLEAR:
                return None
            tokens.append(int(places[0]))
    various = len(set(tokens[PROMPT:])) >= GENERATED // 3
    return tokens if various else None


def check(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected = np.load(HERE / folder.name / "expected.npz")
    with torch.no_grad():
        logits = model(torch.tensor(expected["tokens"], dtype=torch.int64)).logits.numpy()
    print(
        f"{folder.name}: {type(model).__name__}, largest difference of logits "
        f"{np.abs(logits - expected['logits']).max():.1e}"
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
