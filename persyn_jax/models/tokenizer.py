"""Tokenizers and chat templates: the one place that turns messages into token ids.

A tokenizer is a `transformers` fast tokenizer, loaded from a Hugging Face folder or built from a
GGUF file's vocabulary.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.models.gguf import GgufFile
from persyn_jax.records import Message

Tokenizer = Any  # transformers.PreTrainedTokenizerFast; that package takes seconds to import

# token_type values of GGUF that mark special tokens: control and user-defined.
_SPECIAL_TYPES = (3, 4)

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def render_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """The text of the conversation, in this process and however long it takes."""
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)


def prompt_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    render: Callable[[Tokenizer, Sequence[Message]], str] = render_chat,
) -> list[int]:
    """The conversation through the chat template, up to where the assistant begins to speak.

    render: the template's part. The default is for a run's own models and prompts; the sampling
    service renders in a process whose time and memory are bounded (`sampling.templates`): the same
    text, at the cost of a message to that process and back.
    Raises ConfigError when the template refuses the messages (for example a role it does not know)
    or their text is not valid Unicode.
    """
    import jinja2

    try:
        for message in messages:
            message["content"].encode()  # the tokenizer itself would not say what is wrong
        # No special tokens: the template has written them all, BOS included.
        return tokenizer(render(tokenizer, messages), add_special_tokens=False)["input_ids"]
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template refuses the messages: {error}") from None
    except UnicodeEncodeError as error:
        raise ConfigError(f"the messages are not valid Unicode: {error.reason}") from None


def response_ids(tokenizer: Tokenizer, text: str, ended: bool) -> list[int]:
    """An answer's token ids, with EOS where the teacher `ended` it.

    Special tokens that are spelled out in `text` stay plain text.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if ended else ids


def load_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; code that the folder brings along is never run.

    Raises ConfigError when there is none, or it has no chat template or EOS token.
    """
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the Rust part raises the bare class
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{folder}: no usable tokenizer: {reason}") from None
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise ConfigError(f"{folder}: the tokenizer needs a chat template and an EOS token")
    return tokenizer


def from_gguf(file: GgufFile) -> Tokenizer:
    """Builds a GGUF file's byte-level BPE tokenizer, pre-tokenizer `smollm`.

    That is digits one by one, then GPT-2's rule. Raises ConfigError for another tokenizer and for a
    damaged one.
    """
    kind = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ConfigError(
            f"{file.path}: tokenizer {kind[0]!r}/{kind[1]!r}; supported from GGUF: 'gpt2'/'smollm'"
        )
    tokens = _typed(file, "tokenizer.ggml.tokens", list)
    types = _typed(file, "tokenizer.ggml.token_type", np.ndarray)
    if not len(set(tokens)) == len(tokens) == len(types):
        raise ConfigError(
            f"{file.path}: {len(tokens)} tokens, {len(set(tokens))} different ones, with "
            f"{len(types)} types: damaged?"
        )

    def token(key: str, default: str | None = None) -> str | None:
        index = file.metadata.get(key)
        if index is None and default is not None:
            return default
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise ConfigError(f"{file.path}: metadata {key!r} is {index!r}, must be a token's id")
        return tokens[index]

    eos = token("tokenizer.ggml.eos_token_id")
    return _byte_level_bpe(
        tokens,
        _merges(file, set(tokens)),
        [token for token, kind in zip(tokens, types, strict=True) if kind in _SPECIAL_TYPES],
        digits_apart=True,
        eos_token=eos,
        bos_token=token("tokenizer.ggml.bos_token_id", default=eos),
        pad_token=token("tokenizer.ggml.padding_token_id", default=eos),
        chat_template=_typed(file, "tokenizer.chat_template", str),
    )


def _typed(file: GgufFile, key: str, wanted: type) -> Any:
    value = file.get(key)
    if not isinstance(value, wanted):
        raise ConfigError(f"{file.path}: metadata {key!r} has the wrong type: damaged?")
    return value


def _merges(file: GgufFile, tokens: set[str]) -> list[tuple[str, str]]:
    merges = []
    for merge in _typed(file, "tokenizer.ggml.merges", list):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= tokens:
            raise ConfigError(f"{file.path}: merge {merge!r} is not of known tokens: damaged?")
        merges.append((left, right))
    return merges


def byte_level() -> Tokenizer:
    """The 256 bytes and ChatML's specials, for random-weight models: no download, no merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _byte_level_bpe(
        [*specials, *sorted(ByteLevel.alphabet())],
        [],
        specials,
        digits_apart=False,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def _byte_level_bpe(
    tokens: Sequence[str],
    merges: list[tuple[str, str]],
    specials: Iterable[str],
    digits_apart: bool,
    **named: str | None,
) -> Tokenizer:
    """A tokenizer in which a token's id is its place in `tokens`. named: EOS and the like."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2]) if digits_apart else gpt2
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in specials])
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **named
    )


def _transformers() -> Any:
    """The package, without its advice to install PyTorch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers
