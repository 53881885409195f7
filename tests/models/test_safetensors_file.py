"""safetensors files: what the package writes is read back; what is wrong is named, in one line."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import save, save_file

from persyn_jax.config import ConfigError
from persyn_jax.models import safetensors_file
from persyn_jax.models.safetensors_file import open_folder

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1.5, -2.0], ml_dtypes.bfloat16)


def file_of(header, data: bytes = bytes(24), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


dtypes = st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16])
shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.tuples(dtypes, shapes)
    ),
    st.integers(0, 99),
)
def test_reads_what_the_package_writes(tmp_path_factory, kinds, seed):
    kinds.pop("__metadata__", None)
    rng = np.random.default_rng(seed)
    written = {
        name: np.asarray(rng.normal(size=shape)).astype(dtype)
        for name, (dtype, shape) in kinds.items()
    }
    folder = tmp_path_factory.mktemp("written")
    (folder / "model.safetensors").write_bytes(save(written, metadata={"format": "pt"}))
    stored = open_folder(folder)
    assert stored.tensors.keys() == written.keys()
    for name, array in written.items():
        own = stored.read(name, array.shape, None)
        assert own.dtype == array.dtype
        np.testing.assert_array_equal(own, array)
        single = stored.read(name, array.shape)
        assert single.dtype == np.float32
        np.testing.assert_array_equal(single, array.astype(np.float32))


def test_reads_one_tensor_at_a_time(tmp_path):
    size = 1_000_000
    save_file({str(i): np.full(size, i, np.float32) for i in range(8)}, tmp_path / "m.safetensors")
    tracemalloc.start()
    stored = open_folder(tmp_path)
    total = sum(float(stored.read(str(i), (size,))[-1]) for i in range(8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 28
    assert peak < 2.2 * 4 * size


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a safetensors file: a header of 0 bytes in a file of 0"),
        (b"\xff" * 99, "a header of 18446744073709551615 bytes in a file of 99"),
        (file_of({}, length=200), "a header of 200 bytes in a file of 34, must be 2 to 26"),
        (file_of(b"[]"), r"header: must be a JSON object, is \[\]"),
        (file_of(b"\xff\xff"), "header: not readable as JSON"),
        (file_of(b'{"a": 1, "a": 2}'), "key 'a' is given twice"),
        (file_of(b'{"a": NaN}'), "NaN is no JSON number"),
        (file_of(b'{"a":' * 100_000), "nested too deeply"),
        (file_of({"__metadata__": {"format": 1}}), "__metadata__ is {'format': 1}, must map"),
        (file_of({"a": 7}), "tensor 'a' is 7, must have dtype, shape and data_offsets"),
        (file_of({"a": entry(extra=1)}), "tensor 'a' is .*, must have dtype, shape and"),
        (file_of({"a": entry(dtype="I64")}), "tensor 'a' is I64; F32, F16 and BF16"),
        (file_of({"a": entry(dtype=["F32"])}), r"tensor 'a' is \['F32'\]; F32, F16 and BF16"),
        (file_of({"a": entry(shape=[2, 3.0])}), r"'a' has shape \[2, 3.0\], must be"),
        (file_of({"a": entry(shape=[True])}), r"'a' has shape \[True\], must be"),
        (file_of({"a": entry(shape=[-2, -3])}), r"'a' has shape \[-2, -3\], must be"),
        (file_of({"a": entry(shape=[1] * 9)}), r"'a' has shape .*, must be at most 8"),
        (file_of({"a": entry(shape=[2**62, 2**62])}), "'a' has 24 bytes, expected 850705917302346"),
        (file_of({"a": entry(shape=[2, 2])}), r"'a' has 24 bytes, expected 16 for F32 \[2, 2\]"),
        (file_of({"a": entry(offsets=[24, 0])}), r"data_offsets \[24, 0\], must be begin and end"),
        (file_of({"a": entry(offsets=[0])}), r"data_offsets \[0\], must be begin and end"),
        (file_of({"a": entry(offsets=[4, 28])}), "'a' begins at byte 77, expected 73"),
        (file_of({"a": entry(), "b": entry()}), "'b' begins at byte .*, expected .*overlap"),
        (file_of({"a": entry()}, bytes(23)), "the tensors end at byte 97, the file at 96"),
        (file_of({"a": entry()}, bytes(25)), "the tensors end at byte 97, the file at 98"),
    ],
)
def test_names_what_is_wrong_with_a_file(tmp_path, data, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        open_folder(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_a_tensor_that_is_missing_or_has_another_shape(tmp_path):
    save_file({"a": A}, tmp_path / "model.safetensors")
    stored = open_folder(tmp_path)
    with pytest.raises(ConfigError, match="tensor 'b' is missing"):
        stored.read("b", (2, 3))
    with pytest.raises(
        ConfigError, match=r"model\.safetensors: .*'a' has shape \(2, 3\), expected"
    ):
        stored.read("a", (3, 2))


def test_a_file_that_shrinks_under_the_reader_is_named(tmp_path):
    save_file({"a": A}, tmp_path / "model.safetensors")
    stored = open_folder(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-5])
    with pytest.raises(ConfigError, match="'a' has 19 of 24 bytes"):
        stored.read("a", (2, 3))


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": A}, tmp_path / "model-1.safetensors")
    save_file({"b": B}, tmp_path / "model-2.safetensors")
    save_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    return tmp_path


def save_index(folder, weight_map):
    text = json.dumps({"metadata": {"total_size": 28}, "weight_map": weight_map})
    (folder / safetensors_file.INDEX).write_text(text)


def test_an_index_says_which_files_count(sharded):
    save_file({"a": B}, sharded / "consolidated.safetensors")
    stored = open_folder(sharded)
    np.testing.assert_array_equal(stored.read("a", (2, 3)), A)
    np.testing.assert_array_equal(stored.read("b", (2,), None), B)
    (sharded / safetensors_file.INDEX).unlink()
    with pytest.raises(ConfigError, match=r"tensor 'a' is in consolidated\.safetensors too"):
        open_folder(sharded)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "model-1.safetensors", "b": "model-1.safetensors"}, "'b' should be in model-1"),
        (
            {"a": "model-1.safetensors"} | {"b": "model-3.safetensors"},
            "names 'model-3.safetensors'",
        ),
        ({"a": "../model-1.safetensors"}, "must be the name of a"),
        ({"a": "/model-1.safetensors"}, "must be the name of a"),
        ({"a": "..\\model-1.safetensors"}, "must be the name of a"),
        ({"a": "a\0.safetensors"}, "must be the name of a"),
        ({"a": "pytorch_model.bin"}, "must be the name of a"),
        ({"a": ["model-1.safetensors"]}, "must be the name of a"),
        ({}, "weight_map is {}, must map tensors to files"),
        (["a"], r"weight_map is \['a'\], must map tensors to files"),
        (None, "weight_map is None, must map tensors to files"),
    ],
)
def test_names_what_is_wrong_with_an_index(sharded, weight_map, message):
    save_index(sharded, weight_map)
    with pytest.raises(ConfigError, match=message) as caught:
        open_folder(sharded)
    assert str(sharded / safetensors_file.INDEX) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors file"):
        open_folder(tmp_path)
