"""Feeds damaged model files to a loader, guided by coverage, for as long as one lets it.

    uv run --with atheris scripts/fuzz_loaders.py gguf --seconds 3600 --corpus corpus/gguf

Needs atheris (`pip install atheris`), which is no dependency of this project. A file must load or
end in one line of error, within 10 seconds, and without taking much more memory than its size; one
that does not is written beside the corpus as `crash-*` or `timeout-*`, with a traceback, and ends
the run with an exit code that is not 0.
"""

import argparse
import json
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from persyn_jax.pipeline.command import end_with_one_line

# Bytes that a loader may take beyond four times the file's size.
FREE_BYTES = 16_000_000
TARGETS = ("gguf", "tokenizer", "safetensors", "header", "index", "config")
# Words of the formats, which JSON's own parser hides from the search.
WORDS = (
    *("dtype", "shape", "data_offsets", "__metadata__", "weight_map", "F32", "BF16", "1", "NaN"),
    *("[", "]", "{", "}", ",", ":", "null", "true", "1e999", "../", "model-2.safetensors"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Feeds damaged model files to a loader.")
    parser.add_argument("target", choices=TARGETS, help="which loader")
    parser.add_argument("--seconds", type=int, default=120, help="how long (default: 120)")
    parser.add_argument(
        "--corpus",
        type=Path,
        metavar="FOLDER",
        help="files to begin with, and where those that reach new code are kept; default: one "
        "intact file, and nothing is kept",
    )
    arguments = parser.parse_args()
    from persyn_jax.config import ConfigError

    if arguments.corpus is not None and not arguments.corpus.is_dir():
        raise ConfigError(f"--corpus {arguments.corpus}: no such folder")
    try:
        import atheris  # pyrefly: ignore[missing-import]
    except ImportError:
        raise ConfigError("atheris is not installed: pip install atheris") from None
    with atheris.instrument_imports(include=["persyn_jax"]):
        from persyn_jax.models import gguf, safetensors_file, tokenizer, weights  # noqa: F401
    with tempfile.TemporaryDirectory() as folder:
        load, file = _target(arguments.target, Path(folder))
        wrap = _with_length if arguments.target == "header" else bytes
        corpus = arguments.corpus or Path(tempfile.mkdtemp(dir=folder))
        (corpus / "intact").write_bytes(
            _header(file) if wrap is _with_length else file.read_bytes()
        )
        load()  # the intact one must load, and imports what the first example would have to
        tracemalloc.start()
        options = {"max_total_time": arguments.seconds, "timeout": 10, "max_len": 1 << 16}
        words = [f"-{name}={value}" for name, value in options.items()]
        dictionary = Path(folder) / "words.dict"
        dictionary.write_text("".join(f'"{word}"\n' for word in WORDS))
        words.append(f"-dict={dictionary}")
        prefix = [] if arguments.corpus is None else [f"-artifact_prefix={arguments.corpus}/"]
        atheris.Setup(
            [sys.argv[0], *words, *prefix, str(corpus)],
            lambda data: _one(load, file, wrap(data)),
        )
        atheris.Fuzz()  # ends the process


def _one(load: Callable[[], Any], file: Path, data: bytes) -> None:
    from persyn_jax.config import ConfigError

    file.write_bytes(data)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    message = ""
    try:
        load()
    except ConfigError as error:
        message = str(error)
    if (taken := tracemalloc.get_traced_memory()[1] - before) > 4 * len(data) + FREE_BYTES:
        raise AssertionError(f"{taken} bytes taken for a file of {len(data)}")
    if "\n" in message:
        raise AssertionError(f"more than one line: {message!r}")


def _with_length(header: bytes) -> bytes:
    """A safetensors file with this header, and the bytes of one small tensor."""
    return len(header).to_bytes(8, "little") + header + bytes(8)


def _header(file: Path) -> bytes:
    data = file.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def _target(name: str, folder: Path) -> tuple[Callable[[], Any], Path]:
    """(loads what is in `folder`, the file in it to damage: intact now)"""
    from persyn_jax.models import gguf, safetensors_file, tokenizer, weights
    from persyn_jax.models.spec import ModelConfig

    if name in ("gguf", "tokenizer"):
        path = folder / "model.gguf"
        _write_gguf(path)
        if name == "tokenizer":
            return lambda: tokenizer.from_gguf(gguf.read(path))("ab"), path
        return lambda: _read_gguf(path), path
    _write_shards(folder)
    if name == "config":
        model = ModelConfig(weights=str(folder))
        return lambda: weights.load_config(model), folder / "config.json"

    def read_all() -> None:
        stored = safetensors_file.open_folder(folder)
        for tensor, at in stored.tensors.items():
            stored.read(tensor, at.shape)

    index = folder / safetensors_file.INDEX
    return read_all, index if name == "index" else folder / "model-1.safetensors"


def _read_gguf(path: Path) -> None:
    from persyn_jax.models import gguf

    file = gguf.read(path)
    config = gguf.decoder_config(file)
    file = gguf.parameters_only(file, config)
    for name, tensor in file.tensors.items():
        file.read(name, tensor.shape)


def _write_gguf(path: Path) -> None:
    """The least that is a model, of two layers without their matrices, and its vocabulary."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(16)
    writer.add_embedding_length(4)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|end|>", "a", "b", "ab"])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages }}")
    for name, shape in {"token_embd": (4, 4), "blk.0.attn_q": (4, 4), "output_norm": (4,)}.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shards(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    from persyn_jax.models import safetensors_file

    weight_map = {}
    for i in (1, 2):
        save_file({f"{i}": np.ones((2, i), np.float32)}, folder / f"model-{i}.safetensors")
        weight_map[f"{i}"] = f"model-{i}.safetensors"
    (folder / safetensors_file.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "model_type": "llama",
        "vocab_size": 259,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
    }
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    end_with_one_line(main)
