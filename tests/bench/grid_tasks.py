"""Two tiny tasks for the gossip grid."""

import jax
import jax.numpy as jnp
import numpy as np

from persyn_jax.bench.tasks import Task
from persyn_jax.streams import numpy_stream

FEATURES, CLASSES = 5, 3
_rng = np.random.default_rng(0)
INPUTS = _rng.normal(size=(400, FEATURES)).astype(np.float32)
LABELS = (INPUTS @ _rng.normal(size=(FEATURES, CLASSES)) + _rng.gumbel(size=(400, CLASSES))).argmax(
    axis=1
)


def logits(params, inputs):
    return inputs @ params["weight"] + params["bias"][None]


def softmax_loss(params, batch):
    inputs, labels = batch
    log_p = jax.nn.log_softmax(logits(params, inputs))
    return -jnp.take_along_axis(log_p, labels[:, None], axis=1).mean()


def start(key):
    weight = 0.1 * jax.random.normal(key, (FEATURES, CLASSES))
    return {"weight": weight, "bias": jnp.zeros(CLASSES)}


def drawn(seed, step, workers, batch):
    """int[W, B]: the examples of a step."""
    return numpy_stream(seed, "tiny batches", step).integers(300, size=(workers, batch))


def softmax_regression(name, data, *, workers, batch, split, concentration, seed) -> Task:
    """300 examples, and 100 for the test."""

    def batches(step):
        chosen = drawn(seed, step, workers, batch)
        return INPUTS[chosen], LABELS[chosen]

    return _softmax_regression(batches)


def untouchable(name, data, **how) -> Task:
    """The same, but nobody may train on it."""

    def refuse(step):
        raise AssertionError("this cell was finished")

    return _softmax_regression(refuse)


def _softmax_regression(batches) -> Task:
    def evaluate(params):
        log_p = np.asarray(jax.nn.log_softmax(logits(params, INPUTS[300:])))
        loss = -log_p[np.arange(100), LABELS[300:]].mean()
        return {"loss": loss, "accuracy": (log_p.argmax(axis=1) == LABELS[300:]).mean()}

    return Task("softmax regression", start, softmax_loss, batches, evaluate, logits, INPUTS[:50])


def walk_loss(params, batch):
    return -params["x"]


def walk(goals):
    """x starts at 0 and goes up by the learning rate each step; the test loss is the distance to
    the seed's goal (a dict by seed)."""

    def make_task(name, data, *, workers, batch, split, concentration, seed) -> Task:
        return Task(
            "walk",
            lambda key: {"x": jnp.zeros(())},
            walk_loss,
            lambda step: np.zeros(workers),
            lambda params: {"loss": abs(params["x"] - goals[seed]), "accuracy": 0.0},
            None,
            None,
        )

    return make_task
