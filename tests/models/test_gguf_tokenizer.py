"""Tokenizers from a GGUF file's vocabulary, against rules written down once more and by hand."""

import itertools
import re

import numpy_llama
import pytest
import tiny_gguf
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.config import ConfigError
from persyn_jax.models import gguf, tokenizer

PARAMS = numpy_llama.random_params(tiny_gguf.CONFIG, seed=0)
# GPT-2's names of the bytes that are not printable, as far as these tests need them.
NAMED = str.maketrans({" ": "\u0120", "\n": "\u010a", "\t": "\u0109", "\r": "\u010d"})


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(template=None, **changes to the metadata) -> tokenizer"""
    folder = tmp_path_factory.mktemp("vocabulary")

    def build(template=None, **changed):
        path = tiny_gguf.write(folder / "tiny.gguf", PARAMS, **changed)
        return tokenizer.from_gguf(gguf.read(path), template)

    return build


def byte_level(rule: str, words: list[str]):
    """The metadata of a vocabulary of ASCII characters and of `words`, each built left to right."""
    letters = [chr(code).translate(NAMED) for code in (9, 10, 13, *range(32, 127))]
    tokens, merges = ["<|end|>", *letters], []
    for word in (word.translate(NAMED) for word in words):
        for cut in range(1, len(word)):
            if word[: cut + 1] not in tokens:
                tokens.append(word[: cut + 1])
                merges.append(f"{word[:cut]} {word[cut]}")
    types = [3] + [1] * (len(tokens) - 1)
    return {
        "tokenizer__ggml__pre": rule,
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__token_type": types,
        "tokenizer__ggml__merges": merges,
        "tokenizer__ggml__eos_token_id": 0,
        "tokenizer__ggml__bos_token_id": 0,
    }


def pieces(tok, text: str) -> list[str]:
    back = {new: chr(old) for old, new in NAMED.items()}
    ids = tok(text, add_special_tokens=False)["input_ids"]
    return ["".join(back.get(c, c) for c in piece) for piece in tok.convert_ids_to_tokens(ids)]


def test_builds_the_tokenizer(build):
    tok = build()
    ids = {token: index for index, token in enumerate(tiny_gguf.TOKENS)}
    assert tok("abcd")["input_ids"] == [ids["abc"], ids["d"]]
    assert tok("ab12")["input_ids"] == [ids["ab"], ids["1"], ids["2"]]
    prompt = tokenizer.prompt_ids(tok, [{"role": "user", "content": "abe"}])
    assert prompt == [ids["<|im_start|>"], ids["ab"], ids["e"]]
    assert (tok.eos_token_id, tok.pad_token_id) == (2, 0)


# Every word below is a token, so a piece is a whole pre-token, or the characters of what is none.
WORDS = [" can", "'t", "'T", " 12", "123", "12", " a", " ", "  ", "   ", "!\n\n", " \n", "(x", "!!"]


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        ("gpt-2", " can't 12", [" can", "'t", " 12"]),
        ("gpt-2", "'T", ["'", "T"]),  # lower case only
        ("gpt-2", "   a", ["  ", " a"]),
        ("smollm", " 12", [" ", "1", "2"]),
        ("smollm", "123", ["1", "2", "3"]),
        ("qwen2", " 12", [" ", "1", "2"]),
        ("qwen2", " can'T", [" can", "'T"]),
        ("qwen2", "(x", ["(x"]),  # one sign belongs to the letters behind it
        ("qwen2", "!!\n\n", ["!", "!\n\n"]),
        ("qwen2", "   a", ["  ", " a"]),
        ("llama-bpe", " 1231", [" ", "123", "1"]),
        ("llama-bpe", "(x'T", ["(x", "'T"]),
        ("llama-bpe", "!\n\n", ["!\n\n"]),
        ("gpt-2", "!!\n\n", ["!!", "\n", "\n"]),
    ],
)
def test_words_are_cut_by_the_models_own_rule(build, rule, text, expected):
    tok = build(**byte_level(rule, WORDS))
    assert pieces(tok, text) == expected
    assert tok.decode(tok(text, add_special_tokens=False)["input_ids"]) == text


def test_llama_3_takes_a_whole_word_where_merges_would_not_lead_to_it(build):
    changed = byte_level("llama-bpe", ["cab"])
    changed["tokenizer__ggml__merges"] = ["a b", "c a", "ca b"]  # a+b first, and then no c+ab
    changed["tokenizer__ggml__tokens"] += ["ab"]
    changed["tokenizer__ggml__token_type"] += [1]
    assert pieces(build(**changed), "cab") == ["cab"]
    assert pieces(build(**changed | {"tokenizer__ggml__pre": "qwen2"}), "cab") == ["c", "ab"]


def test_qwen_reads_composed_characters(build):
    tok = build(**byte_level("qwen2", ["ab"]))
    assert tok("e\u0301")["input_ids"] == tok("\u00e9")["input_ids"]
    other = build(**byte_level("gpt-2", ["ab"]))
    assert other("e\u0301")["input_ids"] != other("\u00e9")["input_ids"]


def test_user_defined_tokens_are_text_and_unused_ones_are_nothing(build):
    changed = byte_level("qwen2", ["ab"])
    changed["tokenizer__ggml__tokens"] += ["<tool>", "[PAD7]"]
    changed["tokenizer__ggml__token_type"] += [4, 5]
    tok = build(**changed)
    tool = len(changed["tokenizer__ggml__tokens"]) - 2
    assert tok("<tool>")["input_ids"] == [tool]
    assert tok.decode([tool, 0], skip_special_tokens=True) == "<tool>"
    assert tok("<|end|>")["input_ids"] == [0]
    assert len(tok("[PAD7]")["input_ids"]) == 6
    assert len(tok) == tool + 1


IDS = {piece: index for index, piece in enumerate(tiny_gguf.PIECES)}
SCORES = dict(
    zip(tiny_gguf.PIECES, tiny_gguf.SENTENCE_PIECE["tokenizer__ggml__scores"], strict=True)
)


def sentence_piece(text: str) -> list[int]:
    """SentencePiece's own algorithm: the best pair of neighbours, until there is none."""
    ids = []
    for part in re.split("(\n\n|<eos>|<bos>|<pad>)", text):
        if part in IDS and len(part) > 1 and part[0] in "\n<":
            ids.append(IDS[part])
            continue
        symbols = list(part.replace(" ", "\u2581"))
        while True:
            neighbours = enumerate(itertools.pairwise(symbols))
            pairs = [(SCORES.get(a + b, -1e9), -i) for i, (a, b) in neighbours]
            if not pairs or max(pairs)[0] == -1e9:
                break
            at = -max(pairs)[1]
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
        for symbol in symbols:
            known = [IDS[symbol]] if symbol in IDS else None
            ids += known or [IDS[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return ids


sentences = st.text(st.sampled_from("abc12 \n\u00e9\U0001f680"), max_size=20)


@given(st.lists(sentences | st.sampled_from(["<eos>", "\n\n"]), max_size=4).map("".join))
def test_sentence_piece_merges_by_score(build, text):
    tok = build(**tiny_gguf.SENTENCE_PIECE)
    ids = tok(text)["input_ids"]
    assert ids == [IDS["<bos>"], *sentence_piece(text)]
    assert tok.decode(ids) == "<bos>" + text


def test_a_prompt_has_one_bos_which_the_template_writes(build):
    tok = build(**tiny_gguf.SENTENCE_PIECE)
    ids = tokenizer.prompt_ids(tok, [{"role": "user", "content": "ab"}])
    assert ids == [IDS["<bos>"], IDS["ab"]]
    assert tokenizer.response_ids(tok, "ab", ended=True) == [IDS["ab"], IDS["<eos>"]]
    silent = build(**tiny_gguf.SENTENCE_PIECE, tokenizer__ggml__add_bos_token=False)
    assert silent("ab")["input_ids"] == [IDS["ab"]]


def test_a_space_is_put_before_text_and_taken_off_again(build):
    changed = tiny_gguf.SENTENCE_PIECE | {"tokenizer__ggml__add_space_prefix": True}
    tok = build(**changed)
    assert tok("ab", add_special_tokens=False)["input_ids"] == [IDS["\u2581ab"]]
    assert tok.decode([IDS["\u2581ab"], IDS["\u2581a"]]) == "ab a"


def test_phi_3s_special_tokens_take_the_newline_behind_them(tmp_path):
    config = tiny_gguf.CONFIGS["phi3"]
    path = tiny_gguf.write(
        tmp_path / "tiny.gguf",
        tiny_gguf.random_params(config, 0),
        config=config,
        **tiny_gguf.SENTENCE_PIECE,
    )
    tok = tokenizer.from_gguf(gguf.read(path))
    ids = tok("<eos>\nab", add_special_tokens=False)["input_ids"]
    assert ids == [IDS["<eos>"], IDS["ab"]]


def test_a_template_of_ones_own_takes_the_place_of_the_models(build):
    messages = [{"role": "user", "content": "ab"}]
    tok = build("{% for m in messages %}{{ m.role[0] }}{% endfor %}", tokenizer__chat_template=None)
    assert tokenizer.render_chat(tok, messages) == "u"
    tok = build("mine")
    assert tokenizer.render_chat(tok, messages) == "mine"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer__ggml__model": "bert"}, "tokenizer 'bert'; supported from GGUF: 'gpt2', 'll"),
        ({"tokenizer__ggml__pre": "default"}, "pre-tokenizer 'default'; supported from GGUF: 'gp"),
        ({"tokenizer__ggml__tokens": tiny_gguf.TOKENS[:-1]}, "12 tokens"),
        ({"tokenizer__ggml__tokens": [*tiny_gguf.TOKENS[:-1], "ab"]}, "12 different"),
        ({"tokenizer__ggml__tokens": 5}, "'tokenizer.ggml.tokens' has the wrong type"),
        ({"tokenizer__ggml__merges": ["a x"]}, "merge 'a x'"),
        ({"tokenizer__ggml__merges": ["ab"]}, "merge 'ab'"),
        ({"tokenizer__ggml__eos_token_id": 13}, "'tokenizer.ggml.eos_token_id' is 13"),
        ({"tokenizer__ggml__eos_token_id": None}, "eos_token_id' is missing"),
        ({"tokenizer__ggml__add_bos_token": 1}, "add_bos_token' is 1, must be a boolean"),
        ({"tokenizer__ggml__add_bos_token": True}, "adds BOS, and .*bos_token_id' is missing"),
        ({"tokenizer__chat_template": None}, "needs a chat template, .*name a file .*`chat_templ"),
        (tiny_gguf.SENTENCE_PIECE | {"tokenizer__ggml__scores": [1.0]}, "scores' has 1 numbers"),
        (
            tiny_gguf.SENTENCE_PIECE
            | {"tokenizer__ggml__tokens": [p.replace("<0x0A>", "x") for p in tiny_gguf.PIECES]},
            "no token '<0x0A>'",
        ),
        (
            tiny_gguf.SENTENCE_PIECE
            | {"tokenizer__ggml__tokens": [*tiny_gguf.PIECES[:-1], "a" * 300]},
            "has 300 characters, must be at most 256",
        ),
    ],
)
def test_names_what_is_wrong(build, changed, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(**changed)
    assert "tiny.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)
