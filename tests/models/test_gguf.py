"""GGUF files: what a converter writes is read back; what is damaged ends in one ConfigError."""

import dataclasses
import struct
import tracemalloc

import jax
import numpy as np
import numpy_llama
import pytest
import tiny_gguf
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from persyn_jax.config import ConfigError
from persyn_jax.models import gguf, tokenizer, weights
from persyn_jax.models.spec import ModelConfig

PARAMS = numpy_llama.random_params(tiny_gguf.CONFIG, seed=0)


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> bytes:
    return tiny_gguf.write(tmp_path_factory.mktemp("intact") / "tiny.gguf", PARAMS).read_bytes()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A path that each example overwrites."""
    return tmp_path_factory.mktemp("damaged") / "damaged.gguf"


def load(path):
    return weights.load(ModelConfig(weights=str(path)))


@pytest.mark.parametrize("tied", [True, False])
def test_reads_what_a_converter_writes(tmp_path, tied):
    config = dataclasses.replace(tiny_gguf.CONFIG, tied_embeddings=tied)
    params = numpy_llama.random_params(config, seed=1)
    model = load(tiny_gguf.write(tmp_path / "tiny.gguf", params))
    assert model.config == config
    assert weights.load_config(ModelConfig(weights=str(tmp_path / "tiny.gguf"))) == config
    jax.tree.map(np.testing.assert_array_equal, model.params, params)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q4_0"])
def test_dequantises_blocks(tmp_path, kind):
    path = tiny_gguf.write(tmp_path / "tiny.gguf", PARAMS, GGMLQuantizationType[kind])
    error = {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2}.get(kind, 0.2)
    for found, written in zip(
        jax.tree.leaves(load(path).params), jax.tree.leaves(PARAMS), strict=True
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, written, rtol=0, atol=error)


def test_builds_the_tokenizer(tmp_path):
    tok = load(tiny_gguf.write(tmp_path / "tiny.gguf", PARAMS)).tokenizer
    ids = {token: index for index, token in enumerate(tiny_gguf.TOKENS)}
    assert tok("abcd")["input_ids"] == [ids["abc"], ids["d"]]
    assert tok("ab12")["input_ids"] == [ids["ab"], ids["1"], ids["2"]]
    prompt = tokenizer.prompt_ids(tok, [{"role": "user", "content": "abe"}])
    assert prompt == [ids["<|im_start|>"], ids["ab"], ids["e"]]
    assert (tok.eos_token_id, tok.pad_token_id) == (2, 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"llama__block_count": None}, "'llama.block_count' is missing"),
        ({"llama__block_count": 3}, "'blk.2.attn_norm.weight' is missing"),
        ({"llama__block_count": 1}, "'blk.1.attn_k.weight' has no place"),
        ({"llama__block_count": 0}, "'llama.block_count' is 0"),
        ({"llama__block_count": "two"}, "'llama.block_count' is 'two'"),
        ({"llama__feed_forward_length": 65}, r"'blk.0.ffn_down.weight' has shape \(32, 64\)"),
        ({"llama__attention__head_count": 0}, "head_count' is 0"),
        ({"llama__attention__head_count": 3}, "3 query heads must be a multiple of 2"),
        ({"llama__attention__head_count_kv": [2, 2]}, "head_count_kv"),
        ({"llama__rope__freq_base": -1.0}, "freq_base' is -1"),
        ({"llama__rope__freq_base": float("nan")}, "freq_base' is nan"),
        ({"llama__rope__scaling__type": "yarn"}, "RoPE scaling"),
        ({"llama__rope__dimension_count": 4}, "RoPE over 4 of 8 dimensions"),
        ({"general__alignment": 24}, "general.alignment 24"),
        ({"tokenizer__ggml__pre": "qwen2"}, "'gpt2'/'qwen2'"),
        ({"tokenizer__ggml__tokens": tiny_gguf.TOKENS[:-1]}, "12 tokens"),
        ({"tokenizer__ggml__tokens": [*tiny_gguf.TOKENS[:-1], "ab"]}, "12 different"),
        ({"tokenizer__ggml__tokens": 5}, "'tokenizer.ggml.tokens' has the wrong type"),
        ({"tokenizer__ggml__merges": ["a x"]}, "merge 'a x'"),
        ({"tokenizer__ggml__merges": ["ab"]}, "merge 'ab'"),
        ({"tokenizer__ggml__eos_token_id": 13}, "'tokenizer.ggml.eos_token_id' is 13"),
        ({"tokenizer__ggml__eos_token_id": None}, "eos_token_id' is None"),
        ({"tokenizer__chat_template": None}, "chat_template' is missing"),
    ],
)
def test_names_what_is_wrong(tmp_path, changed, message):
    path = tiny_gguf.write(tmp_path / "tiny.gguf", PARAMS, **changed)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_of_another_architecture_is_refused(tmp_path):
    bias = {"blk.0.attn_q.bias": np.zeros(32, np.float32)}
    path = tiny_gguf.write(tmp_path / "tiny.gguf", PARAMS, more_tensors=bias)
    with pytest.raises(ConfigError, match=r"'blk\.0\.attn_q\.bias' has no place"):
        load(path)


def test_scaled_rope_is_refused(tmp_path):
    factors = {"rope_freqs.weight": np.ones(4, np.float32)}
    path = tiny_gguf.write(tmp_path / "tiny.gguf", PARAMS, more_tensors=factors)
    with pytest.raises(ConfigError, match="RoPE scaling"):
        load(path)


def test_blocks_that_cannot_be_read_are_named(tmp_path):
    path = tiny_gguf.write(tmp_path / "tiny.gguf", PARAMS)
    name = b"output_norm.weight"
    data = bytearray(path.read_bytes())
    kind = data.index(name) + len(name) + 4 + 8  # behind the number of dimensions and the one of it
    data[kind : kind + 4] = struct.pack("<I", GGMLQuantizationType.I32)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"'output_norm\.weight' has type I32"):
        load(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a GGUF file"),
        (b"GGUF", "not a GGUF file"),
        (b"safetensors, and no GGUF file", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "tensors and 0 metadata entries"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "metadata entries: damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "needs 4611686018427387904 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "'general.architecture' is missing"),
    ],
)
def test_names_a_damaged_header(tmp_path, data, message):
    (tmp_path / "damaged.gguf").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "damaged.gguf")


def with_metadata(value: bytes) -> bytes:
    """A file whose only metadata entry `k` has this type and value."""
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (struct.pack("<I", 13), "unknown value type 13"),
        (struct.pack("<IIQ", 9, 9, 2**63), "array of type 9"),  # nested: no depth to exhaust
        (struct.pack("<IIQ", 9, 8, 2**63), "needs 8 bytes and 0 are left"),
        (struct.pack("<IIQ", 9, 12, 2**61), "needs 18446744073709551616 bytes"),
        (struct.pack("<IIQ", 9, 13, 0), "array of type 13"),
    ],
)
def test_names_a_damaged_value(tmp_path, value, message):
    (tmp_path / "damaged.gguf").write_bytes(with_metadata(value))
    with pytest.raises(ConfigError, match=f"metadata 'k'.*{message}"):
        load(tmp_path / "damaged.gguf")


def loads(load, path, data: bytes) -> bool:
    """Whether the file loads or is refused; anything else fails. Memory stays in bounds."""
    path.write_bytes(data)
    message = None
    tracemalloc.start()
    try:
        load(path)
    except ConfigError as error:
        message = str(error)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Python keeps a string of a few bytes in many more.
    assert peak < 10 * len(data) + 4_000_000
    assert message is None or (str(path) in message and "\n" not in message)
    return message is None


def headers_only(path):
    file = gguf.read(path)
    gguf.decoder_config(file)


def all_but_parameters(path):
    file = gguf.read(path)
    gguf.decoder_config(file)
    tokenizer.from_gguf(file)


def header_length(intact: bytes) -> int:
    return intact.index(b"output_norm.weight") + 200


def test_every_truncation_of_the_header_is_refused(intact, damaged):
    for length in range(0, header_length(intact), 7):
        assert not loads(headers_only, damaged, intact[:length])
    assert not loads(headers_only, damaged, intact[:-1])
    assert loads(headers_only, damaged, intact)


@given(data=st.data())
@settings(max_examples=300)
def test_overwritten_bytes_load_or_are_refused(intact, damaged, data):
    mutated = bytearray(intact)
    places = st.integers(4, header_length(intact))
    values = st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80", b"\t\0" * 3, b"\xff" * 8])
    for place, value in data.draw(st.lists(st.tuples(places, values | st.binary(min_size=1)))):
        mutated[place : place + len(value)] = value
    loads(all_but_parameters, damaged, bytes(mutated[: len(intact)]))


@given(data=st.data())
@settings(max_examples=40)
def test_swapped_numbers_load_or_are_refused(intact, damaged, data):
    """Every count, length, type and offset of the header in turn, whole model loaded."""
    mutated = bytearray(intact)
    place = data.draw(st.integers(8, header_length(intact)))
    number = data.draw(st.sampled_from([0, 1, 2, 3, 9, 31, 33, 2**16, 2**31 - 1, 2**32 - 1]))
    mutated[place : place + 4] = struct.pack("<I", number)
    loads(load, damaged, bytes(mutated))
