"""Damaged model files: whatever is in them, they load or end in one line, at once and in bounds.

`scripts/fuzz_loaders.py` looks for more, for as long as one lets it.
"""

import contextlib
import json
import tracemalloc
from datetime import timedelta

import numpy as np
import numpy_llama
import pytest
import tiny_gguf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from persyn_jax.config import ConfigError
from persyn_jax.models import gguf, safetensors_file, tokenizer, weights
from persyn_jax.models.spec import ModelConfig

# Also the small file's share of what Python needs to begin with.
FREE_BYTES = 16_000_000
SOON = timedelta(seconds=10)
NUMBERS = [0, 1, 2, 3, 9, 31, 33, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]


changes = st.lists(
    st.tuples(
        st.sampled_from(["bit", "bytes", "number", "insert", "remove", "cut"]),
        st.integers(0, 2**16 - 1),
        st.binary(min_size=1, max_size=40),
        st.sampled_from(NUMBERS),
    ),
    min_size=1,
    max_size=4,
)


def damage(intact: bytes, length: int, changes) -> bytes:
    """`intact` after a few changes to its first `length` bytes."""
    data = bytearray(intact)
    for kind, place, new, number in changes:
        place %= min(length, len(data))
        match kind:
            case "bit":
                data[place] ^= 1 << number % 8
            case "bytes":
                data[place : place + len(new)] = new
            case "number":
                size = 4 if len(new) % 2 else 8
                data[place : place + size] = (number % 256**size).to_bytes(size, "little")
            case "insert":
                data[place:place] = new
            case "remove":
                del data[max(place, 1) : place + len(new)]
            case "cut":
                del data[max(place, 1) :]
    return bytes(data)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([*NUMBERS, -1, -(2**70), 10**400, 0.5, 1e308, float("inf"), float("nan")])
    | st.text(max_size=5)
    | st.sampled_from(["../model.safetensors", "/etc/passwd", "a\0.safetensors", "F32", "F64"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


@st.composite
def changed_json(draw, intact) -> bytes:
    """JSON text with some values replaced or removed, and perhaps some bytes damaged."""
    values = json.loads(json.dumps(intact))
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in places(values) if path]
        if not paths:
            break
        *path, last = draw(st.sampled_from(paths))
        inside = values
        for key in path:
            inside = inside[key]
        if isinstance(inside, dict) and draw(st.booleans()):
            del inside[last]
        elif isinstance(inside, dict | list):
            inside[last] = draw(json_values)
    data = json.dumps(values).encode()
    return damage(data, len(data), draw(changes)) if draw(st.booleans()) else data


def end(load, data_size: int) -> str | None:
    """Runs `load`: None, or the message it is refused with. Memory stays in bounds."""
    message = None
    tracemalloc.start()
    try:
        load()
    except ConfigError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * data_size + FREE_BYTES
    assert message is None or "\n" not in message
    assert len(message or "") < 2000
    return message


class Intact(bytes):
    """A file's bytes, which a report need not show."""

    def __repr__(self) -> str:
        return "intact"


@pytest.fixture(scope="module", params=["llama", "gemma3", "phi3"])
def intact_gguf(request, tmp_path_factory) -> bytes:
    config = tiny_gguf.CONFIGS[request.param]
    params = tiny_gguf.random_params(config, seed=0)
    path = tmp_path_factory.mktemp("intact") / "tiny.gguf"
    return Intact(tiny_gguf.write(path, params, config=config).read_bytes())


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file that each example overwrites, in a folder of its own."""
    return tmp_path_factory.mktemp("damaged") / "model.gguf"


def header_length(data: bytes) -> int:
    return data.index(b"output_norm.weight") + 200


def read_header(path):
    file = gguf.read(path)
    return file, gguf.decoder_config(file)


def read_parameters(path):
    file, config = read_header(path)
    file = gguf.parameters_only(file, config)
    for name, tensor in file.tensors.items():
        gguf.read_parameter(file, config, name, tensor.shape)


def test_every_truncation_of_a_gguf_header_is_refused(intact_gguf, path):
    for length in [*range(0, header_length(intact_gguf), 7), len(intact_gguf) - 1]:
        path.write_bytes(intact_gguf[:length])
        assert str(path) in (end(lambda: read_header(path), length) or "")
    path.write_bytes(intact_gguf)
    assert end(lambda: read_parameters(path), len(intact_gguf)) is None


@given(changes=changes)
@settings(max_examples=300, deadline=SOON)
def test_damaged_gguf_files_load_or_are_refused(intact_gguf, path, changes):
    damaged = damage(intact_gguf, header_length(intact_gguf), changes)
    path.write_bytes(damaged)
    end(lambda: read_parameters(path), len(damaged))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def intact_vocabulary(request, tmp_path_factory) -> bytes:
    changed = {} if request.param == "gpt2" else tiny_gguf.SENTENCE_PIECE
    params = numpy_llama.random_params(tiny_gguf.CONFIG, seed=0)
    path = tmp_path_factory.mktemp("intact") / "tiny.gguf"
    data = Intact(tiny_gguf.write(path, params, **changed).read_bytes())
    with contextlib.suppress(ConfigError):  # its tokens are more than the embedding's
        weights.load(ModelConfig(weights=str(path)))  # imports and traces what the first one must
    return data


@given(changes=changes)
@settings(max_examples=100, deadline=SOON)
def test_damaged_vocabularies_make_a_tokenizer_or_are_refused(intact_vocabulary, path, changes):
    damaged = damage(intact_vocabulary, header_length(intact_vocabulary), changes)
    path.write_bytes(damaged)

    def build():
        tokenizer.from_gguf(gguf.read(path))("ab 12")

    end(build, len(damaged))


@given(changes=changes)
@settings(max_examples=30)
def test_damaged_gguf_models_load_or_are_refused(intact_vocabulary, path, changes):
    damaged = damage(intact_vocabulary, header_length(intact_vocabulary), changes)
    path.write_bytes(damaged)
    end(lambda: weights.load(ModelConfig(weights=str(path))), len(damaged))


TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones(4, np.float16),
    "c": np.zeros((0, 3), np.float32),
    "d": np.full((), 3, np.float32),
}
INTACT = save(TENSORS, metadata={"format": "pt"})
HEADER_BYTES = int.from_bytes(INTACT[:8], "little")
HEADER = json.loads(INTACT[8 : 8 + HEADER_BYTES])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("folder")


def read_folder(folder):
    stored = safetensors_file.open_folder(folder)
    return {name: stored.read(name, tensor.shape) for name, tensor in stored.tensors.items()}


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + INTACT[8 + HEADER_BYTES :]


def read_damaged(folder, damaged: bytes) -> str | None:
    (folder / "model.safetensors").write_bytes(damaged)
    return end(lambda: read_folder(folder), len(damaged))


def test_every_truncation_of_a_safetensors_file_is_refused(folder):
    for length in range(len(INTACT)):
        assert str(folder) in (read_damaged(folder, INTACT[:length]) or "")
    assert read_damaged(folder, INTACT) is None


@given(changes)
@settings(max_examples=300, deadline=SOON)
def test_damaged_safetensors_files_load_or_are_refused(folder, changes):
    read_damaged(folder, damage(INTACT, 8 + HEADER_BYTES, changes))


@given(changed_json(HEADER))
@example(b'{"a":' * 100_000)
@example(b"[" * 100_000)
@example(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}')
@settings(max_examples=300, deadline=SOON)
def test_changed_safetensors_headers_load_or_are_refused(folder, header):
    read_damaged(folder, with_header(header))


MAP = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    for file in set(MAP.values()):
        tensors = {name: TENSORS[name] for name in MAP if MAP[name] == file}
        (folder / file).write_bytes(save(tensors))
    return folder


@given(changed_json({"metadata": {"total_size": 32}, "weight_map": MAP}))
@example(b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
@example(b'{"weight_map": ' * 100_000)
@settings(max_examples=200, deadline=SOON)
def test_changed_indexes_load_or_are_refused(sharded, index):
    (sharded / safetensors_file.INDEX).write_bytes(index)
    found = {}
    refused = end(lambda: found.update(read_folder(sharded)), len(index) + 1000)
    assert refused is not None or found.keys() <= MAP.keys()


CONFIG = {
    "model_type": "llama",
    "vocab_size": 259,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
}


@given(changed_json(CONFIG))
@example(b'{"model_type": ' * 100_000)
@settings(max_examples=300, deadline=SOON)
def test_changed_configs_load_or_are_refused(folder, config):
    (folder / "config.json").write_bytes(config)
    end(lambda: weights.load_config(ModelConfig(weights=str(folder))), len(config))
