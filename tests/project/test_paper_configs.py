"""The configs of the paper's two settings: they load, they count right, and they differ in nothing
but the student."""

from pathlib import Path

import pytest

from persyn_jax.config import load, to_values
from persyn_jax.models.tokenizer import byte_level
from persyn_jax.pipeline.config import RunConfig
from persyn_jax.training.config import TrainConfig

CONFIGS = Path(__file__).parents[2] / "configs"
STUDENTS = {
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "gemma-2-2b": "google/gemma-2-2b",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
}
# Prompts, teachers, calibration prompts.
SETTINGS = {"instruct": (50_000, 19, 2_500), "math": (10_000, 15, 2_500)}


def config_of(setting: str, student: str) -> RunConfig:
    return load(RunConfig, CONFIGS / f"paper_{setting}_{student}.yaml")


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_has_the_papers_numbers(setting, student):
    config = config_of(setting, student)
    prompts, teachers, calibration = SETTINGS[setting]
    (source,) = config.sources.values()
    assert source.counts.calibration + source.counts.train == prompts
    assert source.counts.calibration == calibration
    assert len(config.teachers) == teachers
    assert config.rewards.alpha == 0.4
    assert (config.quality.kind, source.verifier) == {
        "instruct": ("reward_model", "exact_match"),
        "math": ("verifier", "math"),
    }[setting]
    assert config.student.weights == STUDENTS[student]
    assert config.router_backbone.weights == "Qwen/Qwen2.5-1.5B"
    assert config.run.name == f"paper_{setting}_{student}"
    router = config.router
    pairs = round((1 - router.held_out) * calibration) * teachers * (teachers - 1) // 2
    assert router.steps == -(-pairs // router.pairs), "one epoch of all pairs"


def test_the_batch_and_the_warm_up_are_those_of_the_nearest_recipe():
    """2411.07133, table 5: 32 a batch, 2 epochs, 100 steps of warm-up."""
    for setting, (prompts, _, _) in SETTINGS.items():
        config = config_of(setting, "qwen2.5-0.5b")
        training: TrainConfig = config.training
        batch = training.rows * training.accumulate * config.gossip.workers
        assert batch == 32
        steps = training.epochs * prompts / batch
        assert training.optimiser.warmup_fraction * steps == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_students_of_a_setting_share_everything_else(setting):
    values = [to_values(config_of(setting, student)) for student in STUDENTS]
    for value in values:
        del value["student"], value["run"]["name"]
    assert all(value == values[0] for value in values)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("paper_*.yaml")), ids=lambda path: path.stem)
def test_what_the_sources_do_not_settle_is_marked(path):
    text = path.read_text()
    assert text.count("not settled:") >= 10
    assert f"--config configs/{path.name}" in text


def test_the_chat_templates_of_students_that_have_none():
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "2 + 2?"},
    ]

    def rendered(name: str) -> str:
        tokenizer = byte_level((CONFIGS / "templates" / name).read_text())
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text.removeprefix(tokenizer.bos_token or "")

    assert rendered("gemma.jinja") == (
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\n2 + 2?<end_of_turn>\n<start_of_turn>model\n"
    )
    head = "<|start_header_id|>{}<|end_header_id|>\n\n{}"
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "2 + 2?")]
    assert rendered("llama3.jinja") == "".join(
        head.format(*turn) + "<|eot_id|>" for turn in turns
    ) + head.format("assistant", "")
