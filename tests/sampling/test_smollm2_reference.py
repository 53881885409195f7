"""SmolLM2-135M-Instruct against recorded numbers of two other implementations.

They may be changed only if the weights change: `smollm2_reference.json` names their SHA-256.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from persyn_jax import mesh as meshes
from persyn_jax.models import decoder, rows, spec, tokenizer, weights
from persyn_jax.models.rows import Conversation
from persyn_jax.models.spec import ModelConfig
from persyn_jax.sampling.config import EngineConfig
from persyn_jax.sampling.engine import Engine, Request
from persyn_jax.sampling.scoring import mean_log_likelihoods

REFERENCE = json.loads(Path(__file__).with_name("smollm2_reference.json").read_text("utf-8"))
WEIGHTS = ModelConfig(weights=REFERENCE["weights"], sha256=REFERENCE["sha256"])
PROMPT, GREEDY = tuple(REFERENCE["prompt_ids"]), tuple(REFERENCE["greedy_ids"])
RESPONSE = (*REFERENCE["response_ids"], REFERENCE["eos_id"])
TOLERANCE = 1e-3  # nats, float32

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def smollm2():
    spec.fingerprint(WEIGHTS)  # raises for other weights
    return weights.load(WEIGHTS)


@pytest.fixture(scope="module")
def log_likelihoods(smollm2):
    """Of a response to the prompt, through the training forward (layers stacked, scanned)."""
    compiled = jax.jit(functools.partial(rows.response_log_likelihoods, smollm2.config))
    params = jax.device_put(smollm2.params)

    def measure(*responses: tuple[int, ...]) -> np.ndarray:
        packed = [[Conversation(PROMPT, response)] for response in responses]
        return np.asarray(compiled(params, rows.pack(packed, length=64, responses=20)))

    return measure


def test_tokenizer(smollm2):
    tok = smollm2.tokenizer
    for vector in REFERENCE["tokenizer_vectors"]:
        assert tok(vector["text"])["input_ids"] == vector["ids"]
        assert tok.decode(vector["ids"]) == vector["text"]
    assert tokenizer.prompt_ids(tok, REFERENCE["messages"]) == list(PROMPT)
    assert tok.decode(PROMPT) == REFERENCE["prompt_text"]
    assert tuple(tokenizer.response_ids(tok, REFERENCE["response_text"], True)) == RESPONSE


def test_number_of_parameters(smollm2):
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2.params)) == REFERENCE["parameters"]


def test_training_forward(log_likelihoods):
    greedy, response = log_likelihoods(GREEDY, RESPONSE)
    np.testing.assert_allclose(greedy, REFERENCE["greedy_log_probabilities"], atol=TOLERANCE)
    expected = REFERENCE["response_log_probabilities_with_eos"]
    np.testing.assert_allclose(response[: len(RESPONSE)], expected, atol=TOLERANCE)
    np.testing.assert_allclose(
        response[: len(RESPONSE)].mean(), REFERENCE["mean_with_eos"], atol=1e-4
    )
    without_eos = response[: len(RESPONSE) - 1].mean()
    np.testing.assert_allclose(without_eos, REFERENCE["mean_without_eos"], atol=1e-4)


def test_logits_and_greedy_tokens_of_the_training_forward(smollm2):
    tokens_1T = np.array([PROMPT + GREEDY], np.int32)

    @jax.jit
    def forward(params, tokens_1T):
        positions_1T = np.arange(tokens_1T.shape[1], dtype=np.int32)[None]
        attend = decoder.attend_causally(np.ones(tokens_1T.shape, np.int32))
        hidden_1TD, _ = decoder.hidden_states(
            smollm2.config, params, tokens_1T, positions_1T, attend
        )
        return decoder.logits(smollm2.config, params, hidden_1TD[:, len(PROMPT) - 1 : -1])[0]

    logits_NV = np.asarray(forward(jax.device_put(smollm2.params), tokens_1T))
    assert tuple(logits_NV.argmax(axis=1).tolist()) == GREEDY
    first = REFERENCE["first_step"]
    assert np.argsort(-logits_NV[0])[:5].tolist() == first["token_ids"]
    np.testing.assert_allclose(
        logits_NV[0, first["token_ids"]], first["raw_logits"], atol=TOLERANCE
    )


def test_cached_decode(smollm2):
    shapes = EngineConfig(
        slots=2, cache_length=64, prefill_rows=2, prefill_chunk=16, decode_steps=4, prefix_blocks=4
    )
    engine = Engine(smollm2, shapes)
    request = Request(PROMPT, max_tokens=len(GREEDY))
    for _ in range(2):  # with the prompt read, and with it copied from the prefix pool
        completion = engine.generate([request])[0]
        assert completion.token_ids == GREEDY
        assert completion.text == REFERENCE["greedy_text"]
    assert engine.counters.reused_tokens == 32


def test_mean_log_likelihoods(smollm2):
    conversations = [Conversation(PROMPT, RESPONSE), Conversation(PROMPT, RESPONSE[:-1])]
    means = mean_log_likelihoods(smollm2, conversations, meshes.make_mesh(1))
    expected = [REFERENCE["mean_with_eos"], REFERENCE["mean_without_eos"]]
    np.testing.assert_allclose(means, expected, atol=1e-4)


def test_a_folder_comes_back_bitwise(smollm2, tmp_path):
    weights.save_folder(tmp_path, smollm2)
    again = weights.load(ModelConfig(weights=str(tmp_path)))
    assert again.config == smollm2.config
    jax.tree.map(np.testing.assert_array_equal, again.params, smollm2.params)
    for vector in REFERENCE["tokenizer_vectors"]:
        assert again.tokenizer(vector["text"])["input_ids"] == vector["ids"]
    assert tokenizer.prompt_ids(again.tokenizer, REFERENCE["messages"]) == list(PROMPT)
