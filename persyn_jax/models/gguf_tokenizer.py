"""Tokenizers from the vocabulary of a GGUF file: byte-level BPE and SentencePiece's BPE.

The rules of each kind are llama.cpp's (src/llama-vocab.cpp), and where it leaves out what the
model's own tokenizer does (Qwen's NFC), the latter's.
"""

from typing import Any, NamedTuple

import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.models.fast_tokenizer import Tokenizer, wrap
from persyn_jax.models.file_checks import shown
from persyn_jax.models.gguf_file import GgufFile

# Values of tokenizer.ggml.token_type.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3_WORDS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")

# SentencePiece's name of the space.
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
# Of Gemma's the longest has 31 characters, and each can be put together in 2 ways on average. A
# damaged vocabulary stops here: its merges would take much more room than the file.
_LONGEST_PIECE, _MOST_MERGES = 256, 8


class _Vocabulary(NamedTuple):
    """Tokens by id. ids: of those that text can become, in the same order."""

    tokens: list[str]
    types: np.ndarray
    ids: dict[str, int]

    def of_type(self, wanted: int) -> list[str]:
        return [self.tokens[i] for i in np.flatnonzero(self.types == wanted)]


def from_gguf(file: GgufFile, chat_template: str | None = None) -> Tokenizer:
    """The file's tokenizer. chat_template: in place of the file's own.

    A token of the type "control" is special; a "user-defined" one is matched as a whole, but is
    text. Raises ConfigError for a kind that is not supported, a damaged one, and when there is no
    chat template.
    """
    vocabulary = _vocabulary(file)
    match model := file.get("tokenizer.ggml.model"):
        case "gpt2":
            core, bos_added = _byte_level(file, vocabulary)
        case "llama":
            core, bos_added = _sentence_piece(file, vocabulary), True
        case _:
            raise ConfigError(
                f"{file.path}: tokenizer {shown(model)}; supported from GGUF: 'gpt2', 'llama'"
            )
    eos = _named(file, vocabulary, "eos_token_id")
    if eos is None:
        raise ConfigError(f"{file.path}: metadata 'tokenizer.ggml.eos_token_id' is missing")
    bos = _named(file, vocabulary, "bos_token_id")
    _add_tokens(file, core, vocabulary)
    if _flag(file, "add_bos_token", bos_added):
        _add_bos(file, core, vocabulary, bos)
    return wrap(
        core,
        eos_token=eos,
        bos_token=bos or eos,
        unk_token=_named(file, vocabulary, "unknown_token_id"),
        pad_token=_named(file, vocabulary, "padding_token_id") or eos,
        chat_template=chat_template or _chat_template(file),
    )


def _vocabulary(file: GgufFile) -> _Vocabulary:
    tokens = _typed(file, "tokenizer.ggml.tokens", list)
    types = _typed(file, "tokenizer.ggml.token_type", np.ndarray)
    if not len(set(tokens)) == len(tokens) == len(types) > 0:
        raise ConfigError(
            f"{file.path}: {len(tokens)} tokens, {len(set(tokens))} different ones, with "
            f"{len(types)} types: damaged?"
        )
    # Unused ones only fill the embedding up; the model's own tokenizer does not have them.
    ids = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != _UNUSED
    }
    return _Vocabulary(tokens, types, ids)


def _typed(file: GgufFile, key: str, wanted: type) -> Any:
    value = file.get(key)
    if not isinstance(value, wanted):
        raise ConfigError(f"{file.path}: metadata {key!r} has the wrong type: damaged?")
    return value


def _named(file: GgufFile, vocabulary: _Vocabulary, name: str) -> str | None:
    """The token whose id the metadata gives under this name; None if it gives none."""
    key = f"tokenizer.ggml.{name}"
    index = file.metadata.get(key)
    if index is None:
        return None
    known = isinstance(index, int) and 0 <= index < len(vocabulary.tokens)
    if not known or vocabulary.types[index] == _UNUSED:
        raise ConfigError(
            f"{file.path}: metadata {key!r} is {shown(index)}, must be a token's id, below "
            f"{len(vocabulary.tokens)}"
        )
    return vocabulary.tokens[index]


def _flag(file: GgufFile, name: str, default: bool) -> bool:
    value = file.metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise ConfigError(
            f"{file.path}: metadata 'tokenizer.ggml.{name}' is {shown(value)}, must be a boolean"
        )
    return value


def _chat_template(file: GgufFile) -> str:
    key = "tokenizer.chat_template"
    if key not in file.metadata:
        raise ConfigError(
            f"{file.path}: needs a chat template, and metadata {key!r} is missing: name a file "
            "with one as `chat_template` of the model"
        )
    return _typed(file, key, str)


def _byte_level(file: GgufFile, vocabulary: _Vocabulary) -> tuple[Any, bool]:
    """(core, whether BOS is added by default)."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    def split(words: str) -> list[Any]:
        return [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules = {
        "gpt-2": [gpt2],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), gpt2],
        "qwen2": split(_QWEN_WORDS),
        "llama-bpe": split(_LLAMA3_WORDS),
    }
    rule = file.get("tokenizer.ggml.pre")
    if not isinstance(rule, str) or rule not in rules:
        raise ConfigError(
            f"{file.path}: pre-tokenizer {shown(rule)}; supported from GGUF: "
            + ", ".join(map(repr, rules))
        )
    merges = _merges(file, vocabulary.ids)
    # Llama 3 takes a word that is a token as it is, even where the merges do not lead to it.
    llama3 = rule == "llama-bpe"
    core = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=llama3))
    if rule == "qwen2":
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(rules[rule])
    core.decoder = decoders.ByteLevel()
    return core, llama3


def _merges(file: GgufFile, tokens: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in _typed(file, "tokenizer.ggml.merges", list):
        left, _, right = merge.partition(" ")
        if not (left in tokens and right in tokens and left + right in tokens):
            raise ConfigError(f"{file.path}: merge {shown(merge)} is not of known tokens: damaged?")
        merges.append((left, right))
    return merges


def _sentence_piece(file: GgufFile, vocabulary: _Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    if missing := [
        byte for byte in map("<0x{:02X}>".format, range(256)) if byte not in vocabulary.ids
    ]:
        raise ConfigError(
            f"{file.path}: the tokenizer has no token {missing[0]!r}; supported from GGUF: "
            "SentencePiece with all 256 bytes"
        )
    merges = _scored_merges(file, vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, byte_fallback=True))
    spaces = [normalizers.Replace(" ", _SPACE)]
    pieces = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if _flag(file, "add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(_SPACE))  # pyrefly: ignore[bad-argument-type]
        pieces.append(decoders.Strip(" ", 1, 0))  # pyrefly: ignore[bad-argument-type]
    core.normalizer = normalizers.Sequence(spaces)
    core.decoder = decoders.Sequence(pieces)
    return core


def _scored_merges(file: GgufFile, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every pair of pieces that makes up a third, in the order in which SentencePiece merges.

    That is by the score of what the pair becomes, the highest first.
    """
    key = "tokenizer.ggml.scores"
    scores = _typed(file, key, np.ndarray)
    if len(scores) != len(vocabulary.tokens) or not np.isfinite(scores).all():
        raise ConfigError(
            f"{file.path}: metadata {key!r} has {len(scores)} numbers, must be "
            f"{len(vocabulary.tokens)} finite ones"
        )
    normal = np.flatnonzero(vocabulary.types == _NORMAL)
    by_score = normal[np.argsort(-scores[normal].astype(np.float64), kind="stable")].tolist()
    # Values: the vocabulary's own strings, so that a merge costs no copy of its parts.
    piece = {vocabulary.tokens[i]: vocabulary.tokens[i] for i in by_score}
    merges: list[tuple[str, str]] = []
    for whole in piece:
        if len(whole) > _LONGEST_PIECE:
            raise ConfigError(
                f"{file.path}: token {shown(whole)} has {len(whole)} characters, must be at most "
                f"{_LONGEST_PIECE}: damaged?"
            )
        for cut in range(1, len(whole)):
            left, right = piece.get(whole[:cut]), piece.get(whole[cut:])
            if left is not None and right is not None:
                merges.append((left, right))
        if len(merges) > _MOST_MERGES * len(vocabulary.tokens):
            raise ConfigError(
                f"{file.path}: {len(vocabulary.tokens)} tokens can be put together in more than "
                f"{_MOST_MERGES} ways each: damaged?"
            )
    return merges


def _add_tokens(file: GgufFile, core: Any, vocabulary: _Vocabulary) -> None:
    from tokenizers import AddedToken

    # Phi-3's turns end with a special token and a newline that belongs to it. The file does not
    # say so; llama.cpp knows it by the model's name too, with these exceptions.
    newline_taken = file.metadata.get("general.architecture") == "phi3"
    bare = ("<unk>", "<s>", "<|endoftext|>")
    core.add_special_tokens(
        [
            AddedToken(
                token, normalized=False, special=True, rstrip=newline_taken and token not in bare
            )
            for token in vocabulary.of_type(_CONTROL)
        ]
    )
    core.add_tokens(
        [
            AddedToken(token, normalized=False, special=False)
            for token in vocabulary.of_type(_USER_DEFINED)
        ]
    )


def _add_bos(file: GgufFile, core: Any, vocabulary: _Vocabulary, bos: str | None) -> None:
    """Plain text begins with BOS from now on."""
    from tokenizers import processors

    if bos is None:
        raise ConfigError(
            f"{file.path}: the tokenizer adds BOS, and metadata 'tokenizer.ggml.bos_token_id' is "
            "missing"
        )
    name = {"id": "BOS", "ids": [vocabulary.ids[bos]], "tokens": [bos]}
    core.post_processor = processors.TemplateProcessing(
        single=["BOS", "$A"], pair=["BOS", "$A", "BOS:1", "$B:1"], special_tokens=[name]
    )
