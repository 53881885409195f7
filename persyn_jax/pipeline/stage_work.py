"""What each stage does: reads from the run folder, computes with its pure function, writes back.

Heavy imports stay inside the functions: asking for help, or rerunning a finished run, loads no JAX.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persyn_jax import store
from persyn_jax.config import ConfigError, to_values
from persyn_jax.models.spec import ModelConfig
from persyn_jax.pipeline.config import RunConfig
from persyn_jax.pipeline.progress import say
from persyn_jax.pipeline.run import Run
from persyn_jax.pipeline.run_files import (
    ANSWERS,
    CALIBRATION_ANSWERS,
    EXAMPLES,
    MEASUREMENTS,
    METRICS,
    PROMPTS,
    REWARDS,
    ROUTER,
    ROUTES,
    SCORES,
    STATES,
    STUDENT,
)
from persyn_jax.records import Answer, Example, Measurement, Prompt, Reward, Route, Score

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from persyn_jax.models.router import Router
    from persyn_jax.models.weights import Model


def calibrate(run: Run, _: Path) -> dict[str, Any]:
    from persyn_jax.pipeline.calibrate import calibrate
    from persyn_jax.pipeline.prompts import examined, make_prompts

    config = run.config
    prompts = make_prompts(config)
    if run.whole:
        examined(prompts)
    with store.AnswerStore(config.run.answers) as answers:
        found = calibrate(
            prompts, config.teachers, run.own_weights(), answers, config.client, run.own_service
        )
    run.write(PROMPTS, prompts, Prompt)
    run.write(CALIBRATION_ANSWERS, found.answers, Answer)
    summary = found.summary
    return summary | {"measured": summary["measured"] | run.service_counters()}


def score(run: Run, _: Path) -> dict[str, Any]:
    quality, scored = _quality_and_rewards(
        run, run.read(PROMPTS, Prompt), run.read(CALIBRATION_ANSWERS, Answer)
    )
    run.write(MEASUREMENTS, scored.measurements, Measurement)
    run.write(REWARDS, scored.rewards, Reward)
    return {
        "rewards": len(scored.rewards),
        "measured_answers": scored.measured_answers,
        "reused_answers": scored.reused_answers,
        "quality": quality.counts,
        "measured": quality.measured,
    }


def _quality_and_rewards(run: Run, prompts: list[Prompt], answers: list[Answer]):
    """(`quality.Quality`, `score.Scored`) of the answers, as the config says."""
    from persyn_jax.pipeline.answers import Ask, Collected, collect_answers
    from persyn_jax.pipeline.quality import measure
    from persyn_jax.pipeline.score import score, scorer

    config, mesh = run.config, run.mesh()
    with store.AnswerStore(config.run.answers) as kept:

        def ask(asks: list[Ask]) -> Collected:
            return collect_answers(
                asks, run.own_weights(), kept, config.client, run.own_service, "judge"
            )

        quality = measure(prompts, answers, config.quality, kept, mesh, config.run.seed, ask)
        student = scorer(config.student, config.run.seed)
        return quality, score(prompts, answers, quality.values, student, kept, config.rewards, mesh)


def train_router(run: Run, _: Path) -> dict[str, Any]:
    from persyn_jax.models.router import save_router
    from persyn_jax.models.weights import load
    from persyn_jax.pipeline.tokens import prompt_tokens

    config, mesh = run.config, run.mesh()
    prompts = [p for p in run.read(PROMPTS, Prompt) if p.split == "calibration"]
    backbone = load(config.router_backbone, config.run.seed)
    tokens = prompt_tokens(backbone.tokenizer, prompts)
    rewards = run.read(REWARDS, Reward)
    teachers = list(dict.fromkeys(reward.teacher for reward in rewards))
    metrics_file = run.folder / METRICS
    store.truncate_metrics(metrics_file, "train_router", 0)

    def on_metrics(row: dict[str, Any]) -> None:
        store.append_metrics(metrics_file, {"stage": "train_router", **row})

    calibration = prompts, rewards, teachers
    router, metrics = train_any_router(config, calibration, backbone, tokens, mesh, on_metrics)
    save_router(run.folder / ROUTER, router, teachers, config.router_backbone)
    return {"router": metrics}


def train_any_router(
    config: RunConfig,
    calibration: tuple[Sequence[Prompt], Sequence[Reward], Sequence[str]],
    backbone: "Model",
    tokens: Sequence[tuple[int, ...]],
    mesh: "Mesh",
    on_metrics: Callable[[dict[str, Any]], None],
) -> "tuple[Router, dict[str, Any]]":
    """(the router, its metrics), with a backbone that learns what `router.train` says.

    calibration: prompts, rewards, teachers. tokens: of each prompt, through the chat template.
    Raises as `train_router.train_router` and `train_backbone.train_backbone`.
    """
    from persyn_jax.models.router import Router
    from persyn_jax.pipeline.train_backbone import train_backbone
    from persyn_jax.pipeline.train_router import train_router
    from persyn_jax.sampling.scoring import pooled_states

    training = router_training(config)
    if config.router.train != "frozen":
        return train_backbone(*calibration, backbone, tokens, training, mesh, on_metrics)
    state_ND = pooled_states(backbone, tokens, mesh)
    head, metrics = train_router(*calibration, state_ND, training, mesh, on_metrics)
    return Router(head, state_ND), metrics


def router_training(config: RunConfig):
    """`train_router.RouterTraining` as the config says."""
    from persyn_jax.pipeline.train_router import RouterTraining

    c = config.router
    return RouterTraining(
        held_out=c.held_out,
        steps=c.steps,
        pairs=c.pairs,
        optimiser=c.optimiser,
        neighbours=c.neighbours,
        gossip=config.gossip,
        seed=config.run.seed,
        pair_weights=c.pair_weights,
        lora=c.lora if c.train == "lora" else None,
        backbone_optimiser=c.backbone_optimiser,
    )


def route(run: Run, _: Path) -> dict[str, Any]:
    import numpy as np

    from persyn_jax.models import router
    from persyn_jax.pipeline.route import (
        BY_FEATURE,
        expect_cost,
        outline,
        route,
        summary_lines,
    )
    from persyn_jax.pipeline.states import in_blocks, kept_states
    from persyn_jax.pipeline.train_router import split_calibration
    from persyn_jax.routing.preferences import reward_matrix
    from persyn_jax.routing.strategies import Asked, make_calibration

    config, mesh = run.config, run.mesh()
    prompts = outline(_routed_prompts(run))
    head, names, seen_ND = router.load_router(run.folder / ROUTER)
    # No strategy may know more than the router, which was judged by the others.
    sources = prompts.source_N[: prompts.calibration]
    taught_N = split_calibration(sources, config.router.held_out, config.run.seed)[0]
    seen = make_calibration(
        [prompts.id_N[n] for n in taught_N],
        [sources[n] for n in taught_N],
        run.read(REWARDS, Reward),
        names,
        seen_ND[taught_N],
        config.rewards.learnability,
    )
    rest_ND = np.empty((0, seen_ND.shape[1]), np.float32)
    if prompts.calibration < len(prompts.id_N):
        rest_ND = kept_states(
            run.folder / STATES,
            run.folder / ROUTER,
            config.router_backbone,
            config.run.seed,
            lambda: run.iterate(PROMPTS, Prompt, split="train"),
            mesh,
        )
    total_NM = None
    if config.routing.strategy == "oracle":
        rest = list(run.iterate(PROMPTS, Prompt, split="train"))
        rewards = run.read(REWARDS, Reward) + _rewards_of_all(run, rest)
        total_NM = reward_matrix(rewards, prompts.id_N, names)
    by_feature = config.routing.strategy in BY_FEATURE
    coefficient_NM = np.empty((len(prompts.id_N), len(names)), np.float32)
    for rows, state_BD in in_blocks(seen_ND, rest_ND):
        coefficient_NM[rows] = router.coefficients(head, state_BD)
    asked = Asked(
        source_N=prompts.source_N,
        feature_ND=np.concatenate([seen_ND, rest_ND]) if by_feature else None,
        coefficient_NM=coefficient_NM,
        total_NM=total_NM,
    )
    del rest_ND  # what was read of the file lies in memory until then
    teacher_of = {teacher.name: teacher for teacher in config.teachers}
    teachers = [teacher_of[name] for name in names]
    expected = expect_cost(prompts, run.iterate(CALIBRATION_ANSWERS, Answer), teachers)
    found = route(prompts, asked, seen, expected, teachers, config.routing, config.run.seed)
    for line in summary_lines(found.summary):
        say(line)
    run.write(ROUTES, found.routes, Route)
    return found.summary


def _routed_prompts(run: Run) -> Iterator[Prompt]:
    """In the order of the routes, a row group in memory at a time."""
    for split in ("calibration", "train"):
        yield from run.iterate(PROMPTS, Prompt, split=split)


def _rewards_of_all(run: Run, prompts: list[Prompt]) -> list[Reward]:
    """Of all teachers' answers, which only the oracle knows. Raises ConfigError if one is not in
    the answer store."""
    from persyn_jax.pipeline.answers import Ask, stored_answers

    config = run.config
    asks = [Ask(prompt, teacher) for prompt in prompts for teacher in config.teachers]
    with store.AnswerStore(config.run.answers) as answers:
        found = stored_answers(asks, run.own_weights(), answers)
    missing = [ask for ask, answer in zip(asks, found, strict=True) if answer is None]
    if missing:
        raise ConfigError(
            "routing.strategy oracle: needs the answers of all teachers to all prompts, and "
            f"{config.run.answers} lacks {len(missing)} of {len(asks)}, the first that of teacher "
            f"{missing[0].teacher.name!r} to prompt {missing[0].prompt.id!r}"
        )
    answers_there = [answer for answer in found if answer is not None]
    _, scored = _quality_and_rewards(run, prompts, answers_there)
    return scored.rewards


def generate(run: Run, _: Path) -> dict[str, Any]:
    from persyn_jax.pipeline.answers import in_all
    from persyn_jax.pipeline.generate import beside, check_cost, generate, in_chunks, to_examples

    config = run.config
    summaries = []

    def chosen() -> Iterator[Answer]:
        routed = beside(_routed_prompts(run), run.iterate(ROUTES, Route))
        for chunk in in_chunks(routed, config.client):
            found = generate(
                [prompt for prompt, _ in chunk],
                [route for _, route in chunk],
                config.teachers,
                run.own_weights(),
                answers,
                config.client,
                run.own_service,
            )
            summaries.append(found.summary)
            yield from found.answers

    with store.AnswerStore(config.run.answers) as answers:
        run.write(ANSWERS, chosen(), Answer)
    examples = to_examples(_routed_prompts(run), run.iterate(ANSWERS, Answer))
    run.write(EXAMPLES, examples, Example)
    prompts = run.iterate(PROMPTS, Prompt)
    calibration, answered = (run.iterate(name, Answer) for name in (CALIBRATION_ANSWERS, ANSWERS))
    summary = in_all(summaries)
    return summary | {
        "answers_generated": check_cost(prompts, len(config.teachers), calibration, answered),
        "examples": sum(answer.usable for answer in run.iterate(ANSWERS, Answer)),
        "measured": summary["measured"] | run.service_counters(),
    }


def train_student(run: Run, checkpoints: Path) -> dict[str, Any]:
    from persyn_jax.models.adapters import write_adapters
    from persyn_jax.models.weights import load, load_tokenizer, save_folder
    from persyn_jax.pipeline.prompts import check_answers
    from persyn_jax.pipeline.tokens import conversations
    from persyn_jax.pipeline.train_student import StudentTraining, draw_answers, train_student
    from persyn_jax.training.sinks import check_sinks, tracked

    run.stop_service()  # its memory is needed
    config, mesh = run.config, run.training_mesh()
    sinks = config.training.track if run.is_first else ()
    check_sinks(sinks)
    chosen = run.read(ANSWERS, Answer)
    answers = draw_answers(chosen, config.training.examples, config.run.seed)
    tokens = conversations(load_tokenizer(config.student), run.read(PROMPTS, Prompt), answers)
    check_answers(answers, tokens, config.training)
    if run.is_first:
        _remove_others(checkpoints)
    seed = config.run.seed if config.training.seed is None else config.training.seed
    metrics_file = run.folder / METRICS
    with contextlib.ExitStack() as stack:
        tracks = []  # from where the training begins, which it says itself

        def on_start(first: int, steps: int) -> None:
            if run.is_first:
                values = to_values(config)
                tracking = tracked(sinks, config.run.name, run.folder, values, first)
                tracks.append(stack.enter_context(tracking))
                _announce(metrics_file, first, steps)

        def on_metrics(row: dict[str, Any]) -> None:
            if run.is_first:
                _log(metrics_file, row)
                tracks[0](row)

        trained = train_student(
            lambda: load(config.student, config.run.seed),
            tokens,
            StudentTraining(config.training, config.gossip, seed),
            mesh,
            checkpoints,
            on_start,
            on_metrics,
            run.folder / "profile",
        )
    if run.is_first:
        save_folder(run.folder / STUDENT, trained.model)
        if trained.adapters is not None:
            folder, base = run.folder / STUDENT / "adapter", config.student
            shape = trained.model.config
            write_adapters(folder, trained.adapters, shape, base.weights, base.revision)
    drawn = {answer.prompt_id for answer in answers}
    seen = [row for index, row in enumerate(tokens) if index not in trained.held_out]
    return {
        "compiled_programs": trained.compiled_programs,
        "steps": trained.steps,
        "response_tokens": sum(len(row.response) for row in seen),
        "left_out": [a.prompt_id for a in chosen if a.usable and a.prompt_id not in drawn],
        "held_out": [answers[index].prompt_id for index in trained.held_out],
    }


def _remove_others(checkpoints: Path) -> None:
    """Checkpoints of a training with another config, other answers or other code fit no more."""
    for path in sorted(checkpoints.parent.glob("*")):
        if path != checkpoints:
            say(f"  removing checkpoints of another config, other answers or other code: {path}")
            shutil.rmtree(path)


def _announce(metrics_file: Path, first: int, steps: int) -> None:
    store.truncate_metrics(metrics_file, "train_student", first)
    say(f"  training from step {first} to {steps}" if first else f"  training {steps} steps")


def _log(metrics_file: Path, row: dict[str, Any]) -> None:
    store.append_metrics(metrics_file, {"stage": "train_student", **row})
    if "held_out_loss" in row:
        losses = ", ".join(f"{loss:.3f}" for loss in row["held_out_loss"])
        say(f"  step {row['step']}: held-out loss by worker {losses}")


def evaluate(run: Run, _: Path) -> dict[str, Any]:
    from persyn_jax.models.weights import load
    from persyn_jax.pipeline.evaluate import evaluate
    from persyn_jax.pipeline.prompts import examined

    config = run.config
    prompts = run.read(PROMPTS, Prompt)
    examined(prompts)
    run.mesh()  # starts the platform
    trained = ModelConfig(weights=str(run.folder / STUDENT))
    scores = evaluate(
        prompts,
        lambda: load(config.student, config.run.seed),
        lambda: load(trained),
        config.evaluation.max_tokens,
        config.evaluation.engine,
    )
    run.write(SCORES, scores, Score)
    return {"scores": len(scores)}
