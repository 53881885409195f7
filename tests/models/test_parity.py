"""Every family against `transformers`: what torch said of tiny random models, and their folders.

`parity/record_parity.py` recorded the numbers; see there for how, and for checking in
`transformers` the folders that we write.
"""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from persyn_jax.models import decoder, folder, tokenizer, weights
from persyn_jax.models.weights import Model
from persyn_jax.sampling.config import EngineConfig
from persyn_jax.sampling.engine import Engine, Request

RECORDED = Path(__file__).parent / "parity"
FAMILIES = sorted(path.parent.name for path in RECORDED.glob("*/expected.npz"))
CLOSE = 1e-4
ENTRIES = 16  # of each gradient


@functools.cache
def recorded(name: str) -> tuple[decoder.DecoderConfig, decoder.Params, dict[str, np.ndarray]]:
    config = folder.read_config(RECORDED / name)
    params = weights.folder_params(RECORDED / name, config)
    return config, params, dict(np.load(RECORDED / name / "expected.npz"))


def all_logits(config, params, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    attend = decoder.attend_causally(jnp.ones_like(tokens_BT))
    hidden_BTD, _ = decoder.hidden_states(config, params, tokens_BT, positions_BT, attend)
    return decoder.logits(config, params, hidden_BTD)


def mean_loss(config, params, tokens_BT):
    logits_BTV = all_logits(config, params, tokens_BT)
    log_p_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
    chosen_BT1 = jnp.take_along_axis(log_p_BTV, tokens_BT[:, 1:, None], axis=2)
    return -chosen_BT1.mean(), logits_BTV


@functools.cache
def computed(name: str):
    """((loss, logits), gradients)."""
    config, params, expected = recorded(name)
    run = jax.value_and_grad(functools.partial(mean_loss, config), has_aux=True)
    # Compiling is what takes time here.
    run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    return jax.tree.map(np.asarray, run(params, expected["tokens"]))


def test_every_family_is_recorded():
    assert FAMILIES == [
        "gemma2",
        "gemma3",
        "llama",
        "llama3",
        "phi3",
        "phi3_longrope",
        "qwen2",
        "qwen2_windowed",
        "qwen3",
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_loss_are_those_of_transformers(name):
    expected = recorded(name)[2]
    (loss, logits_BTV), _ = computed(name)
    np.testing.assert_allclose(logits_BTV, expected["logits"], rtol=0, atol=CLOSE)
    np.testing.assert_allclose(loss, expected["loss"], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_the_loss_are_those_of_torch(name):
    config, _, expected = recorded(name)
    found = folder.tensors(config, computed(name)[1])
    assert found.keys() == {e.removeprefix("norm ") for e in expected if e.startswith("norm ")}
    for tensor, gradient in found.items():
        flat = gradient.ravel()
        norm = np.linalg.norm(flat.astype(np.float64))
        np.testing.assert_allclose(norm, expected[f"norm {tensor}"], rtol=CLOSE, err_msg=tensor)
        entries = flat[np.linspace(0, flat.size - 1, ENTRIES).astype(int)]
        np.testing.assert_allclose(
            entries, expected[f"entries {tensor}"], rtol=CLOSE, atol=CLOSE, err_msg=tensor
        )


# Those whose layers differ: a scan chooses inside what unrolled layers have as constants.
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2_windowed"])
def test_unrolled_layers_say_the_same(name):
    config, params, expected = recorded(name)
    run = jax.jit(functools.partial(all_logits, config))
    logits_BTV = run(decoder.unroll(params), expected["tokens"])
    np.testing.assert_allclose(logits_BTV, expected["logits"], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama3", "phi3", "qwen2_windowed", "qwen3"])
def test_the_engine_draws_the_tokens_that_transformers_finds_likeliest(name):
    """Through prefill in chunks and cached decode, some way beyond the windows."""
    config, params, expected = recorded(name)
    tokens, prompt = expected["greedy"].tolist(), 11
    tok = tokenizer.byte_level()
    tok.eos_token = "z"  # beyond the vocabulary
    assert tok.eos_token_id >= config.vocab_size
    engine = Engine(
        Model(config, params, tok),
        EngineConfig(
            slots=2,
            cache_length=24,
            prefill_rows=1,
            prefill_chunk=4,
            decode_steps=3,
            prefix_blocks=2,
            score_rows=0,
        ),
    )
    short, long = engine.generate(
        [
            Request(tokens=tuple(tokens[:first]), max_tokens=len(tokens) - first)
            for first in (4, prompt)
        ]
    )
    assert list(short.token_ids) == tokens[4:]
    assert list(long.token_ids) == tokens[prompt:]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_goes_in_and_out_and_in_bitwise(name, tmp_path):
    config, params, _ = recorded(name)
    folder.write(tmp_path, config, params, tokenizer.byte_level())
    original = load_file(RECORDED / name / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == original.keys()
    for tensor, array in original.items():
        assert array.dtype == written[tensor].dtype
        np.testing.assert_array_equal(array, written[tensor], err_msg=tensor)
    assert folder.read_config(tmp_path) == config
    again = weights.folder_params(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("name", ["gemma3", "phi3"])
def test_shards_with_an_index_are_one_model(name, tmp_path):
    _, params, _ = recorded(name)
    shutil.copy(RECORDED / name / "config.json", tmp_path)
    tensors = load_file(RECORDED / name / "model.safetensors")
    shards = {f"model-0000{i + 1}-of-00003.safetensors": list(tensors)[i::3] for i in range(3)}
    for file, names in shards.items():
        save_file({n: tensors[n] for n in names}, tmp_path / file)
    index = {n: file for file, names in shards.items() for n in names}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    found = weights.folder_params(tmp_path, folder.read_config(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, found, params)
