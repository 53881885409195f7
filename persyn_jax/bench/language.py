"""A small decoder, byte by byte, on text that every machine has: Python's own standard library."""

import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.models import decoder

TOKENS = 64
"""T: bytes of one example."""
DOCUMENTS = 40
"""Modules of the standard library, the largest first."""
MOST_BYTES = 1 << 16
"""Of one document."""
TEST_EVERY = 10
"""Each such example is for the test, at most TEST of them."""
TEST = 256
CONFIG = decoder.DecoderConfig(
    vocab_size=256,
    layers=2,
    d_model=64,
    d_ff=192,
    heads=4,
    kv_heads=2,
    head_dim=16,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tied_embeddings=True,
    max_positions=TOKENS,
)


@dataclass(frozen=True, eq=False)
class Text:
    """Text in pieces of T bytes."""

    name: str
    train_NT: np.ndarray
    """uint8[N, T]."""
    document_N: np.ndarray
    """int64[N]: which document a piece is of."""
    test_NT: np.ndarray


def find_text(path: str | None) -> Text:
    """The file, cut into 40 documents of equal length; for None the standard library's modules.

    Those differ from one Python version to the next, so the name says which it is.
    Raises ConfigError: no such file, too short.
    """
    if path is not None:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"text {path}: {error.strerror}") from None
        documents = [bytes(part) for part in np.array_split(np.frombuffer(content, np.uint8), 40)]
        return _pieces(Path(path).name, documents)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    files = sorted(files, key=lambda file: -file.stat().st_size)[:DOCUMENTS]
    name = f"source of Python {platform.python_version()}'s standard library"
    return _pieces(name, [file.read_bytes()[:MOST_BYTES] for file in sorted(files)])


def init(key: jax.Array) -> Any:
    """Random parameters; layers unrolled."""
    return decoder.unroll(decoder.init(CONFIG, key))


def loss(params: Any, batch: tuple[jax.Array]) -> jax.Array:
    """Mean cross-entropy of the next byte, nats. batch: (uint8[B, T],)."""
    return nats_and_hits(params, batch[0])[0].mean()


def next_byte_logits(params: Any, bytes_BT: jax.Array) -> jax.Array:
    """float32[B, V]: after the last byte of each piece."""
    return _logits(params, bytes_BT)[:, -1]


@jax.jit
def scores(params: Any, bytes_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean loss (nats a byte) and accuracy of the next byte."""
    nats_BT, hits_BT = nats_and_hits(params, bytes_BT)
    return nats_BT.mean(), hits_BT.mean()


def nats_and_hits(params: Any, bytes_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Nats of each next byte [B, T - 1], and whether it was the likeliest."""
    logits_BTV = _logits(params, bytes_BT)[:, :-1]
    next_BT = bytes_BT[:, 1:].astype(jnp.int32)
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    nats_BT = -jnp.take_along_axis(log_p_BTV, next_BT[..., None], axis=-1)[..., 0]
    return nats_BT, logits_BTV.argmax(axis=-1) == next_BT


def _logits(params: Any, bytes_BT: jax.Array) -> jax.Array:
    tokens_BT = bytes_BT.astype(jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    attend = decoder.attend_causally(jnp.ones_like(tokens_BT))
    hidden_BTD, _ = decoder.hidden_states(CONFIG, params, tokens_BT, positions_BT, attend)
    return decoder.logits(CONFIG, params, hidden_BTD)


def _pieces(name: str, documents: list[bytes]) -> Text:
    pieces, numbers = [], []
    for number, document in enumerate(documents):
        count = len(document) // TOKENS
        values = np.frombuffer(document[: count * TOKENS], np.uint8).reshape(count, TOKENS)
        pieces.append(values)
        numbers.append(np.full(count, number))
    piece_NT, number_N = np.concatenate(pieces), np.concatenate(numbers)
    if len(piece_NT) < 100:
        raise ConfigError(f"text {name}: needs at least {100 * TOKENS} bytes")
    is_test_N = np.arange(len(piece_NT)) % TEST_EVERY == 0
    test_NT = piece_NT[is_test_N]
    chosen = np.linspace(0, len(test_NT) - 1, min(TEST, len(test_NT))).astype(int)
    return Text(name, piece_NT[~is_test_N], number_N[~is_test_N], test_NT[chosen])
