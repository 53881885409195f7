"""Synthetic teachers: all answer the same questions, each by its own rule. For the small decoder of
`language`.

A conversation is TURNS turns of a question, a letter, and its answer, another letter. Teacher m's
answer is the letter m + 1 places on. Whose conversation it is stands nowhere; from the second turn
on it can be told from the turns before. A model that knows all M rules but cannot tell the teachers
apart loses log M nats an answer, one that tells them apart log(M) / TURNS.
"""

from typing import Any

import jax
import numpy as np

from persyn_jax.bench import language
from persyn_jax.config import ConfigError
from persyn_jax.streams import numpy_stream

LETTERS = 26
TURNS = 8
TRAIN = 1000
"""Conversations of each teacher."""
TEST = 64
"""Held out, of each teacher."""


def make_text(teachers: int) -> language.Text:
    """Conversations of so many teachers, each on the same questions; the documents are teachers.

    Of the held-out ones every `teachers` in turn are on the same questions.
    Raises ConfigError: more teachers than rules.
    """
    if teachers > LETTERS:
        raise ConfigError(f"task teachers: at most {LETTERS} differ, got {teachers} workers")
    questions_QN = numpy_stream(0, "questions").integers(LETTERS, size=(TRAIN + TEST, TURNS))
    questions_QMN = np.repeat(questions_QN[:, None], teachers, axis=1)
    answers_QMN = (questions_QMN + np.arange(1, teachers + 1)[:, None]) % LETTERS
    turns_QMN2 = np.stack([questions_QMN, answers_QMN], axis=-1) + ord("a")
    texts_QMT = turns_QMN2.reshape(TRAIN + TEST, teachers, 2 * TURNS).astype(np.uint8)
    return language.Text(
        name=f"{teachers} synthetic teachers",
        train_NT=texts_QMT[:TRAIN].reshape(-1, 2 * TURNS),
        document_N=np.tile(np.arange(teachers), TRAIN),
        test_NT=texts_QMT[TRAIN:].reshape(-1, 2 * TURNS),
    )


def loss(params: Any, batch: tuple[jax.Array]) -> jax.Array:
    """Mean cross-entropy of the answers, nats. batch: (uint8[B, T],)."""
    return language.nats_and_hits(params, batch[0])[0][:, ::2].mean()


@jax.jit
def scores(params: Any, bytes_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean loss (nats an answer) and accuracy of the answers."""
    nats_BT, hits_BT = language.nats_and_hits(params, bytes_BT)
    return nats_BT[:, ::2].mean(), hits_BT[:, ::2].mean()
