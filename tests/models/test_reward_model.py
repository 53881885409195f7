"""Reward models against `transformers`: what torch said of tiny random ones.

`reward_models/record_rewards.py` recorded the numbers; see there for how.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from persyn_jax import mesh as meshes
from persyn_jax.config import ConfigError
from persyn_jax.models import tokenizer
from persyn_jax.models.reward_model import conversation_ids, load_reward_model, rewards
from persyn_jax.models.spec import ModelConfig
from persyn_jax.sampling.scoring import pooled_states

RECORDED = Path(__file__).parent / "reward_models"
FAMILIES = sorted(path.parent.name for path in RECORDED.glob("*/expected.npz"))
MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


def copied(name: str, folder: Path) -> Path:
    """A recorded model with a tokenizer, as a reward model is published."""
    tokenizer.byte_level().save_pretrained(folder)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(RECORDED / name / file, folder)
    return folder


def load(folder: Path):
    return load_reward_model(ModelConfig(weights=str(folder)))


def test_the_families_are_recorded():
    assert FAMILIES == ["gemma2", "llama", "qwen2"]


@pytest.mark.parametrize("name", FAMILIES)
def test_rewards_are_those_of_transformers(name, tmp_path):
    model, expected = load(copied(name, tmp_path)), np.load(RECORDED / name / "expected.npz")
    rows = [
        tuple(row[:length].tolist())
        for row, length in zip(expected["tokens"], expected["lengths"], strict=True)
    ]
    found = rewards(pooled_states(model.backbone, rows, meshes.make_mesh(1)), model.head_D)
    assert found.dtype == np.float32
    assert np.ptp(expected["rewards"]) > 1  # they differ much more than is tolerated
    np.testing.assert_allclose(found, expected["rewards"], rtol=0, atol=1e-4)


def test_the_conversation_ends_with_the_answer():
    text = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    tok = tokenizer.byte_level()
    assert conversation_ids(tok, MESSAGES) == tok(text, add_special_tokens=False)["input_ids"]


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_model_with_several_labels_is_refused(tmp_path):
    folder = copied("llama", tmp_path)
    change_tensors(folder, lambda t: t.update({"score.weight": np.zeros((3, 32), np.float32)}))
    with pytest.raises(ConfigError, match=f"{folder}: has 3 labels, a reward model has 1"):
        load(folder)


def test_a_language_model_is_refused(tmp_path):
    folder = copied("llama", tmp_path)
    change_tensors(folder, lambda t: t.pop("score.weight"))
    with pytest.raises(ConfigError, match=f"{folder}: has no tensor 'score.weight'"):
        load(folder)


def test_a_head_of_another_width_is_refused(tmp_path):
    folder = copied("llama", tmp_path)
    change_tensors(folder, lambda t: t.update({"score.weight": np.zeros((1, 31), np.float32)}))
    with pytest.raises(
        ConfigError, match=r"'score.weight' has shape \(1, 31\), expected \(1, 32\)"
    ):
        load(folder)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = copied("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 258}))
    with pytest.raises(ConfigError, match="token id 258 of the tokenizer is not in the model's"):
        load(folder)


def test_what_is_no_folder_is_refused():
    with pytest.raises(ConfigError, match="reward model 'random:tiny': must be a Hugging Face"):
        load(Path("random:tiny"))
