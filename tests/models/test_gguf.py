"""GGUF files: what a converter writes is read back; what is damaged ends in one ConfigError."""

import dataclasses
import functools
import struct

import jax
import numpy as np
import numpy_llama
import pytest
import tiny_gguf
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from persyn_jax.config import ConfigError
from persyn_jax.models import gguf, weights
from persyn_jax.models.decoder import RopeScaling
from persyn_jax.models.spec import ModelConfig

PARAMS = numpy_llama.random_params(tiny_gguf.CONFIG, seed=0)
K_IS_5 = struct.pack("<Q", 1) + b"k" + struct.pack("<IB", 0, 5)


def load(path):
    return weights.load(ModelConfig(weights=str(path)))


@pytest.mark.parametrize("tied", [True, False])
def test_reads_what_a_converter_writes(tmp_path, tied):
    config = dataclasses.replace(tiny_gguf.CONFIG, tied_embeddings=tied)
    params = numpy_llama.random_params(config, seed=1)
    model = load(tiny_gguf.write(tmp_path / "tiny.gguf", params, config=config))
    assert model.config == config
    assert weights.load_config(ModelConfig(weights=str(tmp_path / "tiny.gguf"))) == config
    jax.tree.map(np.testing.assert_array_equal, model.params, params)


def read(path):
    """(config, parameters) without the rest of the model."""
    file = gguf.read(path)
    config = gguf.decoder_config(file)
    file = gguf.parameters_only(file, config)
    like = tiny_gguf.random_params(config, 0)
    used = set()

    def parameter(name, array):
        layers = range(config.layers) if "{}" in name else [None]
        used.update(name.format(i) for i in layers)
        shape = array.shape[1:] if "{}" in name else array.shape
        arrays = [gguf.read_parameter(file, config, name.format(i), shape) for i in layers]
        return np.stack(arrays) if "{}" in name else arrays[0]

    params = jax.tree.map(parameter, gguf.parameter_names(config), like)
    assert used == set(file.tensors)
    return config, params


@pytest.mark.parametrize("family", tiny_gguf.CONFIGS)
def test_reads_every_family(tmp_path, family):
    config = tiny_gguf.CONFIGS[family]
    params = tiny_gguf.random_params(config, seed=1)
    found, read_params = read(tiny_gguf.write(tmp_path / "tiny.gguf", params, config=config))
    assert found == config
    tolerance = 1e-6 if config.norm_offset else 0  # 1 + w loses the last bits of w
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=tolerance), read_params, params
    )


def test_the_parts_of_a_fused_tensor_are_cut_between_blocks(tmp_path):
    config = tiny_gguf.CONFIGS["phi3"]
    params = tiny_gguf.random_params(config, seed=1)
    path = tiny_gguf.write(tmp_path / "tiny.gguf", params, GGMLQuantizationType.Q8_0, config=config)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-2), read(path)[1], params
    )


def llama3_factors(theta, head_dim, factor):
    """As `transformers` computes them for Llama 3.x, whose constants they are."""
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / head_dim)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        middle = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1 if wavelength < 2048 else factor if wavelength > 8192 else middle)
    return np.array(factors, np.float32)


def scaling(tmp_path, tables, family="llama", **changed):
    config = dataclasses.replace(tiny_gguf.CONFIGS[family], rope_theta=500000.0, head_dim=64)
    params = tiny_gguf.random_params(config, seed=1)
    path = tiny_gguf.write(
        tmp_path / "tiny.gguf", params, more_tensors=tables, config=config, **changed
    )
    return read(path)[0].rope_scaling


def test_recognises_llama_3s_rope(tmp_path):
    factors = llama3_factors(500000.0, 64, 32.0)
    assert 1 < factors[16] < 32  # the middle is in it
    assert scaling(tmp_path, {"rope_freqs.weight": factors}) == RopeScaling("llama3", factor=32.0)
    ones = {"rope_freqs.weight": np.ones(32, np.float32)}
    assert scaling(tmp_path, ones) is None


def test_keeps_other_rope_factors_as_they_are(tmp_path):
    factors = np.linspace(1, 9, 32, dtype=np.float32)
    found = scaling(tmp_path, {"rope_freqs.weight": factors})
    assert found.kind == "longrope"
    np.testing.assert_array_equal(found.short_factors, factors)
    assert (found.short_factors, found.attention_factor) == (found.long_factors, 1.0)


def test_reads_phi_3s_rope(tmp_path):
    short, long = np.linspace(1, 2, 32, dtype=np.float32), np.linspace(1, 50, 32, dtype=np.float32)
    tables = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    keys = {
        "phi3__rope__scaling__original_context_length": 4096,
        "phi3__rope__scaling__attn_factor": 1.25,
    }
    found = scaling(tmp_path, tables, "phi3", **keys)
    assert found == RopeScaling(
        "longrope",
        original_max_positions=4096,
        short_factors=tuple(short.tolist()),
        long_factors=tuple(long.tolist()),
        attention_factor=1.25,
    )


def test_reads_linear_rope(tmp_path):
    keys = {"gemma3__rope__scaling__type": "linear", "gemma3__rope__scaling__factor": 8.0}
    assert scaling(tmp_path, {}, "gemma3", **keys) == RopeScaling("linear", factor=8.0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_dequantises_blocks(tmp_path, kind):
    path = tiny_gguf.write(tmp_path / "tiny.gguf", PARAMS, GGMLQuantizationType[kind])
    error = {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2, "Q5_0": 0.1, "Q5_1": 0.1}.get(kind, 0.2)
    for found, written in zip(
        jax.tree.leaves(load(path).params), jax.tree.leaves(PARAMS), strict=True
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, written, rtol=0, atol=error)


def half(data, place):
    return float(np.frombuffer(data[place : place + 2], np.float16)[0])


def scale_and_minimum(scales, j):
    """The 6-bit numbers of sub-block j, packed in 12 bytes (ggml-quants.c, get_scale_min_k4)."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    low, high = scales[j + 4] & 15, scales[j + 4] >> 4
    return low | scales[j - 4] >> 6 << 4, high | scales[j] >> 6 << 4


def q4_k(block):
    values = []
    for j in range(8):
        scale, minimum = scale_and_minimum(block[4:16], j)
        for byte in block[16 + j // 2 * 32 : 16 + j // 2 * 32 + 32]:
            quant = byte >> 4 if j % 2 else byte & 15
            values.append(half(block, 0) * scale * quant - half(block, 2) * minimum)
    return values


def q5_k(block):
    values = []
    for j in range(8):
        scale, minimum = scale_and_minimum(block[4:16], j)
        for i, byte in enumerate(block[48 + j // 2 * 32 : 48 + j // 2 * 32 + 32]):
            quant = (byte >> 4 if j % 2 else byte & 15) + (16 if block[16 + i] >> j & 1 else 0)
            values.append(half(block, 0) * scale * quant - half(block, 2) * minimum)
    return values


def q6_k(block):
    values = []
    for n in range(256):
        part, row, i = n // 128, n % 128 // 32, n % 32
        low = block[part * 64 + row % 2 * 32 + i] >> row // 2 * 4 & 15
        high = block[128 + part * 32 + i] >> 2 * row & 3
        scale = np.array(block[192 + n // 16], np.uint8).view(np.int8)
        values.append(half(block, 208) * int(scale) * ((low | high << 4) - 32))
    return values


@pytest.mark.parametrize("decode", [q4_k, q5_k, q6_k])
def test_dequantises_super_blocks(tmp_path, decode):
    """Random blocks, against ggml's scalar code."""
    kind = GGMLQuantizationType[decode.__name__.upper()]
    size = GGML_QUANT_SIZES[kind][1]
    blocks = np.random.default_rng(0).integers(0, 256, (3, 2 * size), np.uint8)
    # The halves that scale a block: finite.
    for place in (208,) if decode is q6_k else (0, 2):
        for start in (0, size):
            blocks[:, start + place : start + place + 2] = np.array([0.37], np.float16).view("u1")
    writer = GGUFWriter(tmp_path / "blocks.gguf", "llama")
    writer.add_tensor("x", blocks, raw_dtype=kind)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    found = gguf.read(tmp_path / "blocks.gguf").read("x", (3, 512))
    expected = [decode(row[:size].tobytes()) + decode(row[size:].tobytes()) for row in blocks]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


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
        ({"llama__rope__scaling__type": "yarn"}, "RoPE scaling 'yarn'"),
        ({"llama__rope__scaling__type": "longrope"}, "original_context_length' is missing"),
        ({"llama__rope__dimension_count": 4}, "dimension_count' is 4; .* width of a head, 8"),
        ({"llama__attention__value_length": 4}, "value_length' is 4; .* width of a head, 8"),
        ({"split__count": 3}, "one of 3 parts"),
        ({"general__alignment": 24}, "general.alignment 24"),
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
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "key has 4611686018427387904 bytes"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 0), "key has 0 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * K_IS_5, "metadata 'k' is there twice"),
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
        (struct.pack("<IIQ", 9, 8, 2**63), "array of 9223372036854775808 strings"),
        (struct.pack("<IIQ", 9, 12, 2**61), "needs 18446744073709551616 bytes"),
        (struct.pack("<IIQ", 9, 13, 0), "array of type 13"),
    ],
)
def test_names_a_damaged_value(tmp_path, value, message):
    (tmp_path / "damaged.gguf").write_bytes(with_metadata(value))
    with pytest.raises(ConfigError, match=f"metadata 'k'.*{message}"):
        load(tmp_path / "damaged.gguf")


def test_an_unknown_architecture_is_named(tmp_path):
    path = tiny_gguf.write(tmp_path / "tiny.gguf", PARAMS)
    path.write_bytes(
        path.read_bytes().replace(b"llama", b"gpt-j", 1).replace(b"llama", b"gpt-j", 1)
    )
    with pytest.raises(ConfigError, match=r"architecture 'gpt-j'; supported from GGUF: 'llama', "):
        load(path)


def test_a_fused_tensor_of_another_shape_is_named(tmp_path):
    config = tiny_gguf.CONFIGS["phi3"]
    params = tiny_gguf.random_params(config, seed=1)
    path = tiny_gguf.write(
        tmp_path / "tiny.gguf", params, config=config, phi3__attention__head_count_kv=4
    )
    with pytest.raises(ConfigError, match=r"'blk\.0\.attn_qkv\.weight' has shape \(64, 32\)"):
        read(path)


def place_of(data: bytes, name: bytes) -> int:
    """Where the entry of a one-dimensional tensor goes on behind its name."""
    return data.index(name) + len(name)


def changed_entry(tmp_path, change):
    data = bytearray(tiny_gguf.write(tmp_path / "tiny.gguf", PARAMS).read_bytes())
    change(data)
    (tmp_path / "changed.gguf").write_bytes(data)
    return tmp_path / "changed.gguf"


def test_tensors_must_not_overlap(tmp_path):
    def change(data):
        other = data[(at := place_of(data, b"blk.0.attn_norm.weight") + 16) : at + 8]
        at = place_of(data, b"output_norm.weight") + 16
        data[at : at + 8] = other

    with pytest.raises(
        ConfigError, match=r"'output_norm\.weight' and 'blk\.0\.attn_norm\.weight' "
    ):
        load(changed_entry(tmp_path, change))


def test_tensors_must_be_aligned(tmp_path):
    def change(data):
        data[place_of(data, b"output_norm.weight") + 16] += 4

    with pytest.raises(ConfigError, match=r"has offset \d+, must be a multiple of 32"):
        load(changed_entry(tmp_path, change))


def test_a_name_must_not_be_there_twice(tmp_path):
    def tensor(data):
        at = data.index(b"blk.0.attn_norm.weight")
        data[at : at + 22] = b"blk.1.attn_norm.weight"

    with pytest.raises(ConfigError, match=r"tensor 'blk\.1\.attn_norm\.weight' is there twice"):
        load(changed_entry(tmp_path, tensor))
