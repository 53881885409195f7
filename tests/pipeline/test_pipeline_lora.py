"""The student's training by LoRA: what workers exchange, what is saved, and what comes out."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from pipeline_runs import small_config
from test_pipeline_train_student import make_answer, make_prompt

from persyn_jax.mesh import make_mesh
from persyn_jax.models import adapters, weights
from persyn_jax.models.rows import Conversation
from persyn_jax.models.spec import ModelConfig
from persyn_jax.pipeline import stages
from persyn_jax.pipeline.run import Run
from persyn_jax.pipeline.train_student import StudentTraining, train_student
from persyn_jax.records import Answer, Prompt
from persyn_jax.training.config import GossipConfig, LoraConfig, OptimiserConfig, TrainConfig

TINY = ModelConfig(weights="random:tiny")
CONVERSATIONS = [Conversation((1, 2, i), (3, i)) for i in range(4, 25)]
LORA = LoraConfig(rank=2, alpha=4, targets=("q", "v", "down"))
SIZE = adapters.adapter_shapes(weights.RANDOM_TINY, 2, LORA.targets)
ADAPTER_BYTES = 4 * sum(leaf.size for leaf in jax.tree.leaves(SIZE))


class StoppedError(Exception):
    pass


def train(folder, last: int | None = None):
    """(what was trained, rows of metrics) of two workers; stopped after step `last`."""
    training = TrainConfig(
        epochs=2,
        row_tokens=8,
        row_response_tokens=4,
        held_out=1,
        lora=LORA,
        optimiser=OptimiserConfig(learning_rate=3e-2),
        measure_every=4,
        checkpoint_every=3,
    )
    rows = []

    def on_metrics(row):
        rows.append({key: value for key, value in row.items() if key != "measured"})
        if row["step"] == last:
            raise StoppedError

    trained = train_student(
        lambda: weights.load(TINY),
        CONVERSATIONS,
        StudentTraining(training, GossipConfig(workers=2, exchange_probability=0.5), seed=0),
        make_mesh(2),
        folder / "checkpoints",
        lambda first, steps: None,
        on_metrics,
        folder,
    )
    return trained, rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return *train(folder), folder


def test_workers_exchange_adapters_alone(whole):
    _, rows, _ = whole
    busy = [row for row in rows if row["pushes"]]
    assert 2 < len(busy) < len(rows)
    for row in busy:
        assert row["useful_bytes"] == row["pushes"] * ADAPTER_BYTES
        assert row["wire_bytes"] == 2 * ADAPTER_BYTES
    assert all(sum(row["sum_weight"]) == 1 for row in rows)


def test_the_student_is_its_base_with_the_adapters_merged(whole):
    trained, rows, _ = whole
    base = weights.load(TINY)
    assert trained.compiled_programs == 1
    assert trained.adapters.alpha == 4
    expected = adapters.merge(base.params, trained.adapters)
    jax.tree.map(np.testing.assert_array_equal, trained.model.params, expected)
    for part, pair in trained.adapters.params["layers"].items():
        assert part in LORA.targets
        assert pair["lora_b"].any()
    assert trained.model.config == base.config
    measured = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert max(measured[-1]) < min(measured[0]) - 0.1


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_checkpoints_hold_adapters_alone(whole):
    """Parameters and AdamW's two moments, of both workers."""
    *_, folder = whole
    newest = max(path for path in (folder / "checkpoints").iterdir() if path.is_dir())
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.restore(newest.resolve())
    leaves = [leaf for leaf in jax.tree.leaves(saved) if np.ndim(leaf) > 1]
    assert sum(leaf.nbytes for leaf in leaves) == 2 * 3 * ADAPTER_BYTES


def test_a_stopped_training_goes_on_bitwise(whole, tmp_path):
    expected, rows, _ = whole
    with pytest.raises(StoppedError):
        train(tmp_path, last=7)
    found, rest = train(tmp_path)
    assert rest == rows[6:]
    jax.tree.map(np.testing.assert_array_equal, found.model.params, expected.model.params)


def test_the_stage_writes_a_model_and_its_adapter(tmp_path):
    """A Hugging Face folder with the adapters merged, and in it PEFT's of the adapters alone."""
    config = small_config(
        f"run.folder={tmp_path}",
        "training={row_tokens: 128, row_response_tokens: 8, held_out: 1,"
        " lora: {rank: 2, alpha: 4, targets: [v]}}",
    )
    run, folder = Run(config), config.run_folder
    folder.mkdir(parents=True)
    prompts = [make_prompt(f"p{n}", "hi") for n in range(5)]
    run.write(stages.PROMPTS, prompts, Prompt)
    run.write(stages.ANSWERS, [make_answer(prompt.id, "ho") for prompt in prompts], Answer)
    (work,) = (stage.work for stage in stages.STAGES if stage.name == "train_student")
    work(run, folder / "checkpoints" / "of this")
    model = weights.load(ModelConfig(weights=str(folder / "student")))
    learned = adapters.read_adapters(folder / "student" / "adapter", model.config)
    assert learned.params["layers"]["v"]["lora_b"].any()
    expected = adapters.merge(weights.load(TINY).params, learned)
    jax.tree.map(np.testing.assert_array_equal, model.params, expected)
