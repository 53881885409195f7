"""From a run folder to what the report is made of.

Heavy imports stay inside the functions.
"""

from collections.abc import Sequence
from typing import Any

from persyn_jax import store
from persyn_jax.config import ConfigError
from persyn_jax.pipeline.progress import say
from persyn_jax.pipeline.run import Run, path_fingerprint
from persyn_jax.pipeline.run_files import (
    ANSWERS,
    BENCHMARK_SUMMARY,
    CALIBRATION_ANSWERS,
    EXAMPLES,
    GAIN_AUDIT,
    METRICS,
    PROMPTS,
    REWARDS,
    ROUTER,
    ROUTES,
    SCORES,
)
from persyn_jax.records import Answer, Example, Prompt, Reward, Route, Score


def run_records(run: Run, stages: Sequence[str]):
    """Everything that the finished `stages` wrote, as `reporting` takes it."""
    import persyn_jax
    from persyn_jax.config import fingerprint
    from persyn_jax.models.router import load_router
    from persyn_jax.reporting.run_records import RunRecords

    config = run.config
    manifests = {}
    for stage in stages:
        if (manifest := store.read_manifest(run.folder, stage)) is None:
            raise ConfigError(f"{run.folder}: stage {stage} is not finished")
        manifests[stage] = manifest
    benchmarks = left_beside(run, BENCHMARK_SUMMARY)
    return RunRecords(
        run={
            "name": config.run.name,
            "seed": config.run.seed,
            "version": persyn_jax.__version__,
            "config_fingerprint": fingerprint(config),
            "platform": config.run.platform,
            "workers": config.gossip.workers,
            "student_model": config.student.weights,
        },
        teachers={teacher.name: teacher.licence for teacher in config.teachers},
        prompts=run.read(PROMPTS, Prompt),
        calibration_answers=run.read(CALIBRATION_ANSWERS, Answer),
        rewards=run.read(REWARDS, Reward),
        routes=run.read(ROUTES, Route),
        chosen_answers=run.read(ANSWERS, Answer),
        examples=run.read(EXAMPLES, Example),
        scores=run.read(SCORES, Score),
        router=manifests["train_router"].summary["router"],
        training_metrics=[
            row
            for row in store.read_metrics(run.folder / METRICS)
            if row["stage"] == "train_student"
        ],
        gossip={
            "exchange_probability": config.gossip.exchange_probability,
            "compiled_programs": manifests["train_student"].summary["compiled_programs"],
        },
        stages={
            name: {"seconds": round(manifest.seconds, 1), **manifest.summary["measured"]}
            for name, manifest in manifests.items()
        },
        quality=config.quality.kind,
        learnability=config.rewards.learnability,
        alpha=config.rewards.alpha,
        strategies=config.routing,
        state_ND=load_router(run.folder / ROUTER)[2],
        gain_audit=left_beside(run, GAIN_AUDIT),
        benchmarks=None if benchmarks is None else benchmarks["tasks"],
    )


def left_beside(run: Run, name: str) -> dict[str, Any] | None:
    """What a script beside the stages found, without its inputs. None where it was not run, or its
    inputs have changed since: it then tells of another run than the report."""
    if not (run.folder / name).exists():
        return None
    found = store.read_json(run.folder / name)
    for read, fingerprint in found.pop("inputs").items():
        path = run.folder / read
        if not path.exists() or path_fingerprint(path) != fingerprint:
            say(f"  {name}: left out of the report: {read} has changed since it was made")
            return None
    return found
