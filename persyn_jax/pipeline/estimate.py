"""What a run will cost, before it starts: answers, tokens and memory. Runs no model."""

from collections.abc import Sequence
from dataclasses import dataclass

from persyn_jax import mesh as meshes
from persyn_jax.config import ConfigError
from persyn_jax.evaluation.rows import SPLITS
from persyn_jax.evaluation.verifiers import one_answer
from persyn_jax.models import tokenizer, weights
from persyn_jax.pipeline.config import RunConfig
from persyn_jax.pipeline.prompts import examined
from persyn_jax.records import Prompt
from persyn_jax.sampling.config import TeacherConfig, teacher_messages
from persyn_jax.training.memory import estimate_training_memory

_PROCESS_GB = 0.9  # Python, JAX, its compiled programs and the libraries around them


@dataclass(frozen=True)
class Estimate:
    """Counts are exact, but answers are taken to be as long as the reference answers."""

    prompts: dict[str, int]
    """By split."""
    answers_generated: int
    """The most; prompts routed to a teacher with a file of answers need none."""
    answers_generate_then_select: int
    tokens: dict[str, int]
    """By stage: tokens that a model reads and writes."""
    service_memory_gb: float
    """Peak of the sampling service; 0 without one of the run's own."""
    training_memory_gb: float
    """Peak of the run's own process, reached in training."""


def estimate(config: RunConfig, prompts: Sequence[Prompt]) -> Estimate:
    """The estimate of a whole run, made on the CPU: no other platform is looked for."""
    meshes.start_platform("cpu", 1)  # tracing the training's loss asks which one there is
    counts: dict[str, int] = {
        split: sum(prompt.split == split for prompt in prompts) for split in SPLITS
    }
    asked = counts["calibration"] + counts["train"]
    teachers = len(_asked_teachers(config))
    return Estimate(
        prompts=counts,
        answers_generated=counts["calibration"] * teachers + (counts["train"] if teachers else 0),
        answers_generate_then_select=asked * teachers,
        tokens=_tokens(config, prompts),
        service_memory_gb=_service_memory(config),
        training_memory_gb=_training_memory(config),
    )


def _asked_teachers(config: RunConfig) -> list[TeacherConfig]:
    """Those who are asked: a file of answers costs nothing."""
    return [teacher for teacher in config.teachers if teacher.answers is None]


def _tokens(config: RunConfig, prompts: Sequence[Prompt]) -> dict[str, int]:
    student = weights.load_tokenizer(config.student)
    service = weights.load_tokenizer(config.service.model) if config.service else student
    asked_teachers = _asked_teachers(config)
    asked, alone, answer = {}, {}, {}
    for prompt in prompts:
        known = None if prompt.answer is None else one_answer(prompt.verifier, prompt.answer)
        reference = tokenizer.response_ids(student, known or "", ended=True)
        alone[prompt.id] = len(tokenizer.prompt_ids(student, prompt.messages))
        answer[prompt.id] = 1 + len(reference)
        asked[prompt.id] = [_asked(service, teacher, prompt) for teacher in asked_teachers]
    of = {split: [p.id for p in prompts if p.split == split] for split in SPLITS}
    teachers, epochs = len(config.teachers), config.training.epochs
    row = {prompt.id: alone[prompt.id] + answer[prompt.id] for prompt in prompts}
    return {
        "calibrate": sum(sum(asked[i]) + len(asked[i]) * answer[i] for i in of["calibration"]),
        "score": sum(teachers * row[i] for i in of["calibration"]),
        "train_router": sum(alone[i] for i in of["calibration"]),
        "route": sum(alone[i] for i in of["train"]),
        "generate": sum(
            (sum(asked[i]) + len(asked[i]) * answer[i]) // teachers for i in of["train"]
        ),
        "train_student": epochs * sum(row[i] for i in of["calibration"] + of["train"]),
        "evaluate": sum(2 * row[i] for i in of["eval"]),
    }


def _asked(tok: tokenizer.Tokenizer, teacher: TeacherConfig, prompt: Prompt) -> int:
    return len(tokenizer.prompt_ids(tok, teacher_messages(teacher, prompt.messages)))


def _parameters_gb(config) -> float:
    """float32 parameters of a decoder, in GB."""
    c = weights.load_config(config)
    layer = c.d_model * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.d_model * c.d_ff
    embeddings = c.vocab_size * c.d_model * (1 if c.tied_embeddings else 2)
    return 4 * (c.layers * layer + embeddings) / 1e9


def _cache_gb(config, engine) -> float:
    c = weights.load_config(config)
    tokens = engine.slots * engine.cache_length + engine.prefix_blocks * engine.prefill_chunk
    return 4 * 2 * c.layers * c.kv_heads * c.head_dim * tokens / 1e9


def _service_memory(config: RunConfig) -> float:
    if config.service is None:
        return 0.0
    model = config.service.model
    # Twice the parameters while they are turned from their stacked form into the engine's.
    return _PROCESS_GB + 2 * _parameters_gb(model) + _cache_gb(model, config.service.engine)


def _training_memory(config: RunConfig) -> float:
    model = weights.load_config(config.student)
    worker = estimate_training_memory(model, config.training, config.run.platform)
    # A checkpoint takes half the state again, and the process still holds what a step worked in.
    peak = worker.total + worker.state / 2
    return _PROCESS_GB + config.gossip.workers * peak / 1e9


def estimate_lines(config: RunConfig, prompts: Sequence[Prompt]) -> list[str]:
    """The estimate as a person reads it."""
    e = estimate(config, prompts)
    counts = ", ".join(f"{count} {split}" for split, count in e.prompts.items())
    try:
        examined(prompts)
        end = "the report"
    except ConfigError as error:
        end = f"train_student, the evaluation will refuse: {error}"
    return [
        f"run folder           {config.run_folder}",
        f"prompts              {counts}",
        f"teachers             {', '.join(teacher.name for teacher in config.teachers)}",
        f"stages               up to {end}",
        f"answers to generate  {e.answers_generated} (every teacher on every prompt: "
        f"{e.answers_generate_then_select})",
        *(f"tokens {stage:<14}{tokens:>7,}" for stage, tokens in e.tokens.items()),
        f"tokens in all        {sum(e.tokens.values()):>7,}",
        f"memory               {e.service_memory_gb:.1f} GB sampling service, "
        f"{e.training_memory_gb:.1f} GB training (not at the same time)",
    ]
