"""Whether a training that is stopped at any moment and started again ends bitwise as it would have.

Each run is a process of its own, stopped by SIGTERM or SIGKILL at a random moment of its steps, of
a checkpoint's writing too. Compared are all lines of metrics, the mean model, and the newest
checkpoint: parameters, moments, counts and sum weights of all workers.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from persyn_jax.config import config_class


@config_class
class ResumeConfig:
    """How often what is stopped."""

    points: Annotated[int, Field(ge=1)] = 20
    """Random stops of each kind of training, SIGTERM and SIGKILL by turns."""
    workers: list[int]
    """Numbers of workers to try."""
    asynchronous: list[bool]
    """Whether checkpoints are written in the background."""
    seed: Annotated[int, Field(ge=0)] = 0


class Outcome(NamedTuple):
    """One training that was stopped once and started again."""

    workers: int
    asynchronous: bool
    signal: str
    steps_seen: int
    """That the stopped process had told of."""
    exit_code: int
    """Of the stopped process; 0 if it was done before."""
    resumed_at: int
    """The step that the second process began with."""
    same: bool
    """Whether everything is bitwise as without the stop."""


def check(config: ResumeConfig, child: list[str]) -> Iterator[Outcome]:
    """child: command that runs `train` on the arguments that follow it."""
    rng = random.Random(config.seed)
    with tempfile.TemporaryDirectory() as place:
        for workers in config.workers:
            for asynchronous in config.asynchronous:
                mode = [str(workers), str(int(asynchronous))]
                # Twice: the first fills the cache of compiled programs.
                for name in ("first", "undisturbed"):
                    whole = _run([*child, f"{place}/{name}{'-'.join(mode)}", *mode], place)
                for point in range(config.points):
                    folder = f"{place}/{'-'.join(mode)}-{point}"
                    which = (signal.SIGTERM, signal.SIGKILL)[point % 2]
                    delay = rng.uniform(0, whole.seconds)
                    stopped = _run([*child, folder, *mode], place, which, delay)
                    again = _run([*child, folder, *mode], place)
                    # A killed process may not have told of its last steps; they are told again.
                    told = stopped.rows[: again.first] + again.rows
                    yield Outcome(
                        workers=workers,
                        asynchronous=asynchronous,
                        signal=which.name,
                        steps_seen=len(stopped.rows),
                        exit_code=stopped.exit_code,
                        resumed_at=again.first,
                        same=(told, again.digest) == (whole.rows, whole.digest),
                    )


class _Run(NamedTuple):
    first: int
    rows: list[str]
    digest: str
    exit_code: int
    seconds: float
    """From the first step to the end."""


def _run(
    command: list[str], place: str, which: signal.Signals | None = None, delay: float = 0.0
) -> _Run:
    """Runs a child to its end, or until it is stopped `delay` seconds after its training began."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": f"{place}/cache",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    first, rows, digest, began = 0, [], "", 0.0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | cache
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            kind, _, value = line.rstrip("\n").partition(" ")
            if kind == "start":
                first, began = int(value), time.monotonic()
                if which is not None:
                    time.sleep(delay)
                    process.send_signal(which)
            elif kind == "row":
                rows.append(value)
            elif kind == "digest":
                digest = value
        seconds = time.monotonic() - began
        errors = process.stderr.read() if process.stderr else ""
    if which is None and process.returncode:
        raise RuntimeError(f"a training ended with {process.returncode}: {errors[-500:]}")
    return _Run(first, rows, digest, process.returncode, seconds)


def train(folder: Path, workers: int, asynchronous: bool) -> None:
    """The child: a tiny training that tells on standard output what it does."""
    from persyn_jax import mesh
    from persyn_jax.models import weights
    from persyn_jax.models.rows import Conversation
    from persyn_jax.models.spec import ModelConfig
    from persyn_jax.pipeline.train_student import StudentTraining, train_student
    from persyn_jax.training.config import GossipConfig, TrainConfig

    mesh.start_platform("cpu", workers)
    model = weights.load(ModelConfig(weights="random:tiny"))
    draw = random.Random(0)
    conversations = [
        Conversation(
            tuple(draw.randrange(3, 250) for _ in range(draw.randint(2, 6))),
            tuple(draw.randrange(3, 250) for _ in range(draw.randint(1, 4))),
        )
        for _ in range(12 * workers + 2)
    ]
    training = TrainConfig(
        epochs=2,
        row_tokens=12,
        row_response_tokens=8,
        held_out=2,
        measure_every=3,
        checkpoint_every=2,
        async_checkpoints=asynchronous,
    )

    def tell(kind: str, value: Any) -> None:
        print(kind, value, flush=True)

    trained = train_student(
        lambda: model,
        conversations,
        StudentTraining(training, GossipConfig(workers=workers, exchange_probability=0.5), seed=0),
        mesh.make_mesh(workers),
        folder,
        lambda first, steps: tell("start", first),
        lambda row: tell("row", json.dumps({k: v for k, v in row.items() if k != "measured"})),
        folder / "profile",
    )
    tell("digest", _digest(trained.model.params) + _digest_of_newest(folder))


def _digest_of_newest(folder: Path) -> str:
    """Of the arrays of the newest checkpoint, whoever wrote it."""
    import orbax.checkpoint as ocp

    newest = max(path for path in folder.iterdir() if path.name.isdigit())
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return newest.name + _digest(reader.restore(newest.resolve()))


def _digest(tree: Any) -> str:
    import jax
    import numpy as np

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def child_command() -> list[str]:
    return [sys.executable, "-m", "persyn_jax.pipeline.resume_check"]


if __name__ == "__main__":
    try:
        train(Path(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3])))
    except KeyboardInterrupt:
        sys.exit(130)
