"""Tokenizers and chat templates: the one place that turns messages into token ids.

A tokenizer is a `transformers` fast tokenizer, loaded from a Hugging Face folder or built from a GGUF file's vocabulary.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persyn_jax.config import ConfigError
from persyn_jax.models.gguf import GgufFile
from persyn_jax.records import Message

Tokenizer = Any  # transformers.PreTrainedTokenizerFast; transformers takes seconds to import, so not at module level

# token_type values of GGUF that mark special tokens: control and user-defined.
_SPECIAL_TYPES = (3, 4)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The conversation through the chat template, up to where the assistant begins to speak.

    Raises ConfigError when the template refuses the messages (for example a role it does not know).
    """
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template refuses the messages: {error}") from None


def response_ids(tokenizer: Tokenizer, text: str, ended: bool) -> list[int]:
    """An answer's token ids; with EOS where the teacher `ended` it. Special tokens in `text` stay plain text."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if ended else ids


def _transformers():
    """The package, without its advice to install PyTorch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def load_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. Raises ConfigError when it has none or no chat template or EOS."""
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: no usable tokenizer: {str(error).splitlines()[0]}") from None
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise ConfigError(f"{folder}: the tokenizer needs a chat template and an EOS token")
    return tokenizer


def from_gguf(file: GgufFile) -> Tokenizer:
    """Builds the byte-level BPE tokenizer of a GGUF file (pre-tokenizer `smollm`: digits apart, then GPT-2's rule)."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as CoreTokenizer

    def get(key: str) -> Any:
        if (full := f"tokenizer.{key}") not in file.metadata:
            raise ConfigError(f"{file.path}: metadata {full!r} is missing")
        return file.metadata[full]

    if (get("ggml.model"), get("ggml.pre")) != ("gpt2", "smollm"):
        raise ConfigError(
            f"{file.path}: tokenizer {get('ggml.model')!r}/{get('ggml.pre')!r}; supported from GGUF: 'gpt2'/'smollm'"
        )
    tokens = get("ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in get("ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = CoreTokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    kinds = get("ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind in _SPECIAL_TYPES]
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=tokens[get("ggml.eos_token_id")],
        pad_token=tokens[file.metadata.get("tokenizer.ggml.padding_token_id", get("ggml.eos_token_id"))],
        chat_template=get("chat_template"),
        clean_up_tokenization_spaces=False,
    )


def byte_level() -> Tokenizer:
    """A tokenizer of the 256 bytes and the ChatML specials, for random-weight models: no download, no merges."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as CoreTokenizer

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    core = CoreTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
