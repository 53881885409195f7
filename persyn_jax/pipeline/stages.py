"""The stages in order: what each reads from the run folder, what of the config it depends on, and
what it writes back."""

from pathlib import Path
from typing import Any

from persyn_jax import store
from persyn_jax.config import to_values
from persyn_jax.evaluation.sources import FileSource
from persyn_jax.models.spec import ModelConfig
from persyn_jax.pipeline import stage_work
from persyn_jax.pipeline.config import LikelihoodQuality, RewardModelQuality, RunConfig
from persyn_jax.pipeline.report_records import run_records
from persyn_jax.pipeline.run import Run, Stage
from persyn_jax.pipeline.run_files import (
    ANSWERS,
    BENCHMARK_SUMMARY,
    CALIBRATION_ANSWERS,
    EXAMPLES,
    GAIN_AUDIT,
    MEASUREMENTS,
    METRICS,
    PROMPTS,
    REWARDS,
    ROUTER,
    ROUTES,
    SCORES,
    STUDENT,
)


def _report(run: Run, _: Path) -> dict[str, Any]:
    from persyn_jax.reporting.page import render_page
    from persyn_jax.reporting.report import build_report

    records = run_records(run, [stage.name for stage in STAGES[:-1]])
    values = build_report(records)
    store.write_json(run.folder / "report.json", values)
    store.write_text(run.folder / "report.html", render_page(records, values))
    return {}


def _section(*names: str):
    """The parts of the config with these names, and the seed."""

    def section(config: RunConfig) -> dict[str, Any]:
        values = to_values(config)
        return {"run": {"seed": config.run.seed}} | {name: values[name] for name in names}

    return section


def _all_but_benchmarks(config: RunConfig) -> dict[str, Any]:
    return {name: values for name, values in to_values(config).items() if name != "benchmarks"}


def _service_model(config: RunConfig) -> tuple[ModelConfig, ...]:
    return () if config.service is None else (config.service.model,)


def _student_model(config: RunConfig) -> tuple[ModelConfig, ...]:
    return (config.student,)


def _scoring_models(config: RunConfig) -> tuple[ModelConfig, ...]:
    """The student, and whose word the quality is."""
    if isinstance(config.quality, (RewardModelQuality, LikelihoodQuality)):
        return (config.student, config.quality.model)
    return (config.student, *(_service_model(config) if config.own_judge else ()))


def _backbone(config: RunConfig) -> tuple[ModelConfig, ...]:
    return (config.router_backbone,)


def _answer_files(config: RunConfig) -> tuple[Path, ...]:
    return tuple(teacher.answers for teacher in config.teachers if teacher.answers)


def _prompt_and_answer_files(config: RunConfig) -> tuple[Path, ...]:
    prompts = tuple(s.path for s in config.sources.values() if isinstance(s, FileSource))
    return prompts + _answer_files(config)


def _routing_models(config: RunConfig) -> tuple[ModelConfig, ...]:
    """The oracle looks up all answers, and scores them with the student."""
    if config.routing.strategy != "oracle":
        return _backbone(config)
    return (*_backbone(config), *_scoring_models(config), *_service_model(config))


def _routing_files(config: RunConfig) -> tuple[Path, ...]:
    return _answer_files(config) if config.routing.strategy == "oracle" else ()


def _none(_: RunConfig) -> tuple:
    return ()


STAGES: tuple[Stage, ...] = (
    Stage(
        name="calibrate",
        modules=("persyn_jax.pipeline.prompts", "persyn_jax.pipeline.calibrate"),
        reads=(),
        writes=(PROMPTS, CALIBRATION_ANSWERS),
        section=_section("sources", "teachers"),
        models=_service_model,
        files=_prompt_and_answer_files,
        work=stage_work.calibrate,
    ),
    Stage(
        name="score",
        modules=("persyn_jax.pipeline.quality", "persyn_jax.pipeline.score"),
        reads=(PROMPTS, CALIBRATION_ANSWERS),
        writes=(MEASUREMENTS, REWARDS),
        section=_section("quality", "rewards"),
        models=_scoring_models,
        files=_none,
        work=stage_work.score,
    ),
    Stage(
        name="train_router",
        modules=("persyn_jax.sampling.scoring", "persyn_jax.pipeline.train_backbone"),
        reads=(PROMPTS, REWARDS),
        writes=(ROUTER,),
        section=_section("router", "gossip"),
        models=_backbone,
        files=_none,
        work=stage_work.train_router,
    ),
    Stage(
        name="route",
        modules=(
            "persyn_jax.pipeline.states",
            "persyn_jax.pipeline.train_router",
            "persyn_jax.pipeline.route",
            "persyn_jax.pipeline.quality",
            "persyn_jax.pipeline.score",
        ),
        reads=(PROMPTS, CALIBRATION_ANSWERS, REWARDS, ROUTER),
        writes=(ROUTES,),
        section=_section("router", "routing", "teachers", "quality", "rewards"),
        models=_routing_models,
        files=_routing_files,
        work=stage_work.route,
    ),
    Stage(
        name="generate",
        modules=("persyn_jax.pipeline.generate",),
        reads=(PROMPTS, CALIBRATION_ANSWERS, ROUTES),
        writes=(ANSWERS, EXAMPLES),
        section=_section("teachers"),
        models=_service_model,
        files=_answer_files,
        work=stage_work.generate,
    ),
    Stage(
        name="train_student",
        modules=("persyn_jax.pipeline.tokens", "persyn_jax.pipeline.train_student"),
        reads=(PROMPTS, ANSWERS),
        writes=(STUDENT,),
        section=_section("training", "gossip", "mesh"),
        models=_student_model,
        files=_none,
        work=stage_work.train_student,
        elastic=("gossip.workers", "mesh.fsdp", "mesh.tensor"),
    ),
    Stage(
        name="evaluate",
        modules=("persyn_jax.pipeline.evaluate",),
        reads=(PROMPTS, STUDENT),
        writes=(SCORES,),
        section=_section("evaluation"),
        models=_student_model,
        files=_none,
        work=stage_work.evaluate,
    ),
    Stage(
        name="report",
        modules=("persyn_jax.reporting",),
        reads=(
            *(PROMPTS, CALIBRATION_ANSWERS, REWARDS, ROUTER, ROUTES, ANSWERS),
            *(EXAMPLES, METRICS, SCORES),
        ),
        writes=("report.html", "report.json"),
        section=_all_but_benchmarks,
        models=_none,
        files=_none,
        work=_report,
        may_read=(GAIN_AUDIT, BENCHMARK_SUMMARY),
    ),
)
