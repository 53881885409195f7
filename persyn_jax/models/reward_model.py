"""Reward models: a decoder with a scalar head, as `transformers` keeps them.

A Hugging Face folder of a `*ForSequenceClassification` model with one label, such as the
Skywork-Reward models: a decoder without LM head and the tensor `score.weight` [1, D]. The reward of
an answer is that head's product with the final hidden state of the conversation's last token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.models import safetensors_file, tokenizer, weights
from persyn_jax.models.spec import ModelConfig, locate
from persyn_jax.models.tokenizer import Tokenizer
from persyn_jax.models.weights import Model
from persyn_jax.records import Message

_HEAD = "score.weight"


@dataclass(frozen=True)
class RewardModel:
    """A loaded reward model."""

    backbone: Model
    """Embeddings count as tied: there is no LM head."""
    head_D: np.ndarray
    """float32."""


def load_reward_model(model: ModelConfig) -> RewardModel:
    """Loads it. Raises ConfigError as `weights.load`, and unless it is one with a single label."""
    path = locate(model)
    if path is None or not path.is_dir():
        raise ConfigError(
            f"reward model {model.weights!r}: must be a Hugging Face folder or hub id"
        )
    config = replace(weights.load_config(model), tied_embeddings=True)
    stored = safetensors_file.open_folder(path)
    if (head := stored.tensors.get(_HEAD)) is None:
        raise ConfigError(f"{path}: has no tensor {_HEAD!r}, so it is no reward model")
    if head.shape[0] != 1:
        raise ConfigError(f"{path}: has {head.shape[0]} labels, a reward model has 1")
    tok = weights.load_tokenizer(model)
    weights.check_vocabulary(path, config, tok)
    params = weights.folder_params(path, config, without=[_HEAD])
    return RewardModel(
        backbone=Model(config, params, tok), head_D=stored.read(_HEAD, (1, config.d_model))[0]
    )


def conversation_ids(tok: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The conversation, answer included, through the chat template: what a reward model reads.

    Raises ConfigError as `tokenizer.prompt_ids`.
    """
    return tokenizer.prompt_ids(tok, messages, _render_whole)


def _render_whole(tok: Tokenizer, messages: Sequence[Message]) -> str:
    return tok.apply_chat_template(list(messages), add_generation_prompt=False, tokenize=False)


def rewards(state_ND: np.ndarray, head_D: np.ndarray) -> np.ndarray:
    """float32 [N], higher is better and without bounds, of the last tokens' final hidden states."""
    return state_ND @ head_D
