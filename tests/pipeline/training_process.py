"""One process of a student's training by several, for `test_pipeline_processes.py`.

    python training_process.py PORT PROCESSES INDEX FOLDER

writes the rows of metrics that it saw to FOLDER/INDEX.json; checkpoints go to FOLDER/checkpoints.
"""

import json
import sys
from pathlib import Path

import jax

from persyn_jax import mesh as meshes
from persyn_jax.models import weights
from persyn_jax.models.rows import Conversation
from persyn_jax.models.spec import ModelConfig
from persyn_jax.pipeline.train_student import StudentTraining, train_student
from persyn_jax.training.config import GossipConfig, TrainConfig

WORKERS, FSDP = 4, 2
DEVICES = WORKERS * FSDP


def train(folder: Path) -> list[dict]:
    """Four workers of two devices each; rows of metrics without what depends on time."""
    rows: list[dict] = []
    train_student(
        lambda: weights.load(ModelConfig(weights="random:tiny")),
        [Conversation((1, 2, i), (3, i)) for i in range(4, 54)],
        StudentTraining(
            TrainConfig(
                rows=2,
                row_tokens=5,
                row_response_tokens=2,
                held_out=2,
                measure_every=3,
                checkpoint_every=2,
            ),
            GossipConfig(workers=WORKERS, exchange_probability=0.7),
            seed=0,
        ),
        meshes.make_mesh(WORKERS, FSDP),
        folder / "checkpoints",
        lambda first, steps: None,
        rows.append,
        folder / "profile",
    )
    return [{key: value for key, value in row.items() if key != "measured"} for row in rows]


if __name__ == "__main__":
    port, processes, index, place = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(index))
    meshes.start_platform("cpu", DEVICES, int(processes))
    Path(place, f"{index}.json").write_text(json.dumps(train(Path(place))))
