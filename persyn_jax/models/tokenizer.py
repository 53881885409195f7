"""Tokenizers and chat templates: the one place that turns messages into token ids.

A tokenizer is a `transformers` fast tokenizer, loaded from a Hugging Face folder or built from a
GGUF file's vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from persyn_jax.config import ConfigError
from persyn_jax.models.fast_tokenizer import Tokenizer, transformers, wrap
from persyn_jax.models.gguf_tokenizer import from_gguf
from persyn_jax.records import Message

__all__ = ["Tokenizer", "byte_level", "from_gguf", "load_folder", "prompt_ids", "response_ids"]

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


def load_folder(folder: Path, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; code that the folder brings along is never run.

    chat_template: in place of the folder's own.
    Raises ConfigError when there is none, or it has no chat template or EOS token.
    """
    try:
        tokenizer = transformers().AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the Rust part raises the bare class
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{folder}: no usable tokenizer: {reason}") from None
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{folder}: needs a chat template and has none: name a file with one as "
            "`chat_template` of the model"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{folder}: the tokenizer needs an EOS token")
    return tokenizer


def byte_level(chat_template: str | None = None) -> Tokenizer:
    """The 256 bytes and ChatML's specials, for random-weight models: no download, no merges.

    chat_template: in place of ChatML.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in specials])
    return wrap(
        core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template or CHATML,
    )
