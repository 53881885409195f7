"""What the gossip grid trains on: a task knows data, model and score, and nothing of gossip."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from persyn_jax.bench import cnn, images, language, teachers
from persyn_jax.bench.splits import batch_indices, split_examples
from persyn_jax.config import ConfigError

EVALUATED = 2000
"""Test examples (images) of an evaluation, the first ones: the standard error of an accuracy near
0.9 is then 0.007."""
PROBED = 16
"""Of these, the probe batch for the divergence of the workers' outputs."""


class Task(NamedTuple):
    """One learning task, dealt out to W workers."""

    name: str
    """Says which data they are."""
    init: Callable[[jax.Array], Any]
    """key -> params."""
    loss: Callable[[Any, Any], jax.Array]
    """(params, batch of one worker) -> mean loss in nats. The same object whatever the seed."""
    batches: Callable[[int], Any]
    """step -> the batch of all workers, arrays [W, B, ...]."""
    evaluate: Callable[[Any], dict[str, float]]
    """params -> {"loss", "accuracy"} on the test data."""
    logits: Callable[[Any, Any], jax.Array] | None
    """(params, inputs) -> [..., classes]."""
    probe: Any
    """Inputs for `logits`."""


def make_task(
    name: str,
    data: str | None,
    *,
    workers: int,
    batch: int,
    split: str,
    concentration: float,
    seed: int,
) -> Task:
    """`images`: the paper's small CNN on CIFAR-10 or its stand-in. `language`: a small decoder on
    text. `teachers`: the same decoder on the answers of as many synthetic teachers as there are
    workers; they are the classes of a split. The data are dealt out and drawn anew for each seed.

    data: folder (images) or file (language); None takes what is on every machine.
    Raises ConfigError: no such task, no data, data where none is read, a split that is impossible.
    """

    def dealt(train: tuple[np.ndarray, ...], classes_N: np.ndarray) -> Callable[[int], Any]:
        shards = split_examples(classes_N, workers, split, concentration, seed)

        def batches(step: int) -> Any:
            chosen_WB = np.stack(
                [batch_indices(shard, batch, seed, step, w) for w, shard in enumerate(shards)]
            )
            return tuple(array[chosen_WB] for array in train)

        return batches

    if name == "images":
        found = images.find_images(data)
        labels_N = found.train_labels
        return _image_task(found, dealt((found.train_images, labels_N), labels_N))
    if name == "language":
        text = language.find_text(data)
        batches = dealt((text.train_NT,), text.document_N)
        return _language_task(text, batches, language.loss, language.scores, text.test_NT)
    if name == "teachers":
        if data is not None:
            raise ConfigError(f"data {data}: task teachers makes its own")
        text = teachers.make_text(workers)
        batches = dealt((text.train_NT,), text.document_N)
        questions_NT = text.test_NT[:, :-1]  # without the last answer, which the probe asks for
        return _language_task(text, batches, teachers.loss, teachers.scores, questions_NT)
    raise ConfigError(f"task: must be images, language or teachers, got {name!r}")


def _image_task(data: images.Images, batches: Callable[[int], Any]) -> Task:
    test, labels = data.test_images[:EVALUATED], data.test_labels[:EVALUATED]
    channels = data.train_images.shape[-1]

    def evaluate(params: Any) -> dict[str, float]:
        loss, accuracy = _scores(params, test, labels)
        return {"loss": float(loss), "accuracy": float(accuracy)}

    return Task(
        name=data.name,
        init=lambda key: cnn.init(key, channels),
        loss=cnn.loss,
        batches=batches,
        evaluate=evaluate,
        logits=cnn.logits,
        probe=test[:PROBED],
    )


@jax.jit
def _scores(params: Any, images_BHWC: jax.Array, labels_B: jax.Array):
    """Loss and accuracy, a few images at a time."""
    part = math.gcd(len(labels_B), 100)
    parts = images_BHWC.reshape(-1, part, *images_BHWC.shape[1:]), labels_B.reshape(-1, part)

    def score(part):
        found_BK = cnn.logits(params, part[0])
        return cnn.loss(params, part), (found_BK.argmax(axis=1) == part[1]).mean()

    losses, accuracies = jax.lax.map(score, parts)
    return losses.mean(), accuracies.mean()


def _language_task(
    text: language.Text,
    batches: Callable[[int], Any],
    loss: Callable,
    scores: Callable,
    probe_NT: np.ndarray,
) -> Task:
    def evaluate(params: Any) -> dict[str, float]:
        found, accuracy = scores(params, text.test_NT)
        return {"loss": float(found), "accuracy": float(accuracy)}

    return Task(
        name=text.name,
        init=language.init,
        loss=loss,
        batches=batches,
        evaluate=evaluate,
        logits=language.next_byte_logits,
        probe=probe_NT[:PROBED],
    )
