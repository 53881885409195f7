"""Weights in and out: Hugging Face folders, random weights, and what is wrong with a folder."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import numpy_llama
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from persyn_jax.config import ConfigError
from persyn_jax.models import tokenizer, weights
from persyn_jax.models.spec import ModelConfig
from persyn_jax.models.weights import Model

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why 42?"}]


def make_model(tied: bool = True) -> Model:
    config = dataclasses.replace(numpy_llama.small_config(tied), vocab_size=259)
    return Model(config, numpy_llama.random_params(config, seed=0), tokenizer.byte_level())


def load(folder):
    return weights.load(ModelConfig(weights=str(folder)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    weights.save_folder(folder, make_model())
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_comes_back_bitwise(tmp_path, tied):
    model = make_model(tied)
    weights.save_folder(tmp_path, model)
    again = load(tmp_path)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert tokenizer.prompt_ids(again.tokenizer, MESSAGES) == tokenizer.prompt_ids(
        model.tokenizer, MESSAGES
    )
    assert weights.load_config(ModelConfig(weights=str(tmp_path))) == model.config


def test_transformers_opens_the_folder(saved):
    config = AutoConfig.from_pretrained(saved)
    assert (config.model_type, config.architectures) == ("llama", ["LlamaForCausalLM"])
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (2, 24, 8)
    assert (config.num_attention_heads, config.num_key_value_heads) == (6, 2)
    assert config.rope_parameters["rope_theta"] == 50.0
    assert config.tie_word_embeddings is True
    model = make_model()
    tok = AutoTokenizer.from_pretrained(saved)
    assert (tok.eos_token_id, tok.pad_token_id) == (
        model.tokenizer.eos_token_id,
        model.tokenizer.pad_token_id,
    )
    text = tok.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy 42?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tok(text)["input_ids"] == tokenizer.prompt_ids(model.tokenizer, MESSAGES)
    # The name that transformers 4, and whoever builds on it, knows.
    named = json.loads((saved / "tokenizer_config.json").read_text())
    assert named["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_folder_holds_the_tensors_that_llama_has(saved):
    tensors = load_file(saved / "model.safetensors")
    layer = {
        "input_layernorm": (24,),
        "post_attention_layernorm": (24,),
        "self_attn.q_proj": (48, 24),
        "self_attn.k_proj": (16, 24),
        "self_attn.v_proj": (16, 24),
        "self_attn.o_proj": (24, 48),
        "mlp.gate_proj": (40, 24),
        "mlp.up_proj": (40, 24),
        "mlp.down_proj": (24, 40),
    }
    expected = {f"model.layers.{i}.{n}.weight": shape for i in (0, 1) for n, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": (259, 24), "model.norm.weight": (24,)}
    assert {name: array.shape for name, array in tensors.items()} == expected


def change_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def change_config(**changed):
    def damage(folder):
        values = json.loads((folder / "config.json").read_text()) | changed
        kept = {key: value for key, value in values.items() if value != "remove"}
        (folder / "config.json").write_text(json.dumps(kept))

    return damage


def write(name, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])


def eight_bit_floats(folder):
    header = {NORM: {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    data = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(4))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), r"config\.json: not readable"),
        (write("config.json", b"{"), r"config\.json: not readable as JSON"),
        (write("config.json", b"\xff"), r"config\.json: not readable"),
        (write("config.json", b"[" * 100_000), r"config\.json: not readable"),
        (write("config.json", b"[]"), r"config\.json: must be a JSON object, is \[\]"),
        (change_config(model_type="gpt2"), r"config\.json: model_type 'gpt2'"),
        (change_config(hidden_size="remove"), r"config\.json: hidden_size is None"),
        (change_config(hidden_size=24.5), r"config\.json: hidden_size is 24\.5"),
        (change_config(num_hidden_layers=True), r"num_hidden_layers is True"),
        (change_config(num_attention_heads=0), r"num_attention_heads is 0"),
        (change_config(num_key_value_heads=4), r"6 query heads must be a multiple of 4"),
        (change_config(hidden_act="gelu"), r"hidden_act is 'gelu', must be 'silu'"),
        (change_config(rope_parameters={"rope_type": "llama3"}), r"RoPE low_freq_factor is None"),
        (change_config(rope_scaling={"type": "yarn"}), r"RoPE scaling 'yarn'"),
        (change_config(rope_parameters=7), r"rope_parameters is 7, must be a JSON object"),
        (change_config(rope_parameters=None, rope_theta=10**400), r"rope_theta is 1"),
        (change_config(vocab_size=300), r"'model\.embed_tokens\.weight' has shape \(259, 24\)"),
        (change_config(intermediate_size=41), r"'model\.layers\.0\.mlp\.down_proj\.weight'"),
        (change_config(num_hidden_layers=1), r"'model\.layers\.1\..*' has no place"),
        (change_config(tie_word_embeddings=False), r"'lm_head\.weight' is missing"),
        (remove("model.safetensors"), r"holds no \*\.safetensors"),
        (write("model.safetensors", b""), r"model\.safetensors: not a safetensors file"),
        (write("model.safetensors", b"\xff" * 99), r"model\.safetensors: not a safetensors file"),
        (cut_weights, r"model\.safetensors: not a safetensors file"),
        (change_tensors(lambda t: t.pop(NORM)), r"tensor 'model\.norm\.weight' is missing"),
        (
            change_tensors(lambda t: t.update({NORM: t[NORM][:-1]})),
            r"'model\.norm\.weight' has shape \(23,\), expected \(24,\)",
        ),
        (
            change_tensors(lambda t: t.update({NORM: t[NORM].astype(np.int8)})),
            r"model\.safetensors: tensor 'model\.norm\.weight' is I8; F32, F16 and BF16",
        ),
        (
            change_tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[NORM]})),
            r"'model\.layers\.0\.self_attn\.q_proj\.bias' has no place",
        ),
        (eight_bit_floats, r"model\.safetensors: tensor 'model\.norm\.weight' is F8_E4M3"),
        (remove("tokenizer.json"), r"no usable tokenizer"),
        (write("tokenizer.json", b'{"version": "1.0"}'), r"no usable tokenizer"),
        (write("tokenizer_config.json", b"{"), r"no usable tokenizer"),
        (remove("chat_template.jinja"), r"needs a chat template"),
    ],
)
def test_names_what_is_wrong_with_a_folder(folder, damage, message):
    damage(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(folder):
    change_config(vocab_size=258)(folder)
    change_tensors(
        lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:258]})
    )(folder)
    with pytest.raises(ConfigError, match=r"token id 258 .* vocabulary of 258"):
        load(folder)


def test_reads_shards_half_precision_and_harmless_extras(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    dtypes = [np.float16, ml_dtypes.bfloat16]
    stored = {n: a.astype(dtypes[i % 2]) for i, (n, a) in enumerate(sorted(tensors.items()))}
    names = sorted(stored)
    first, second = (
        {n: stored[n] for n in names[:9]},
        {n: stored[n] for n in names[9:]}
        | {
            "lm_head.weight": stored["model.embed_tokens.weight"],
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        },
    )
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(second, folder / "model-00002-of-00002.safetensors")
    model = load(folder)
    expected = stored["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(model.params["embed"]["embedding"], expected)
    np.testing.assert_array_equal(
        model.params["layers"]["q"]["kernel"][1],
        stored["model.layers.1.self_attn.q_proj.weight"].astype(np.float32),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {np.dtype(np.float32)}


def test_random_weights_depend_on_the_seed_alone():
    spec = ModelConfig(weights="random:tiny")
    first, again, other = (weights.load(spec, seed) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert (first.params["embed"]["embedding"] != other.params["embed"]["embedding"]).any()
    assert weights.load_config(spec) == first.config
    assert len(weights.load_tokenizer(spec)) == first.config.vocab_size


@pytest.mark.parametrize("source", ["random:tiny", "folder"])
def test_a_chat_template_of_the_config_is_taken(source, saved, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("{% for message in messages %}<{{ message['content'] }}>{% endfor %}")
    place = str(saved) if source == "folder" else source
    config = ModelConfig(weights=place, chat_template=own)
    for tok in (weights.load(config).tokenizer, weights.load_tokenizer(config)):
        assert tokenizer.render_chat(tok, MESSAGES) == "<Be brief.><Why 42?>"
    missing = ModelConfig(weights=place, chat_template=tmp_path / "nowhere.jinja")
    with pytest.raises(ConfigError, match=r"chat_template .*nowhere\.jinja: No such file"):
        weights.load(missing)
