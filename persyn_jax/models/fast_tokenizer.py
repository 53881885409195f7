"""Builds `transformers` fast tokenizers from their parts. That package takes seconds to import."""

import os
from typing import Any

Tokenizer = Any  # transformers.PreTrainedTokenizerFast


def wrap(core: Any, **named: str | None) -> Tokenizer:
    """core: a `tokenizers.Tokenizer`. named: EOS and the like, and the chat template."""
    return transformers().PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **named
    )


def transformers() -> Any:
    """The package, without its advice to install PyTorch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers
