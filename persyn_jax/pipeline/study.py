"""The study of strategies: who should be asked, by what the students become.

All strategies share prompts, calibration answers and rewards; each trains students of its own, on
equally many rows. In `runs/STUDY` there is one run folder for what is shared, `base`, and one for
each student, `STRATEGY-SEED`. Whatever is finished is not done again.

Variants of PerSyn, with other rewards or another router, are further strategies under the names
that the config gives them; they cost the tokens of scoring, and the answers that they route.

The swap test asks whether routes are personal: the same cached answers are scored for another
student, in the run folder `other`, and the study's student is trained on the routes that PerSyn
gives that one, as a further strategy named `swapped`.

Heavy imports stay inside the functions.
"""

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

from pydantic import Field

from persyn_jax import store
from persyn_jax.config import config_class, to_values, validate
from persyn_jax.models.spec import ModelConfig
from persyn_jax.pipeline.config import RunConfig
from persyn_jax.pipeline.gain_audit import GainAuditConfig, GainAuditSection, audit_run
from persyn_jax.pipeline.progress import say
from persyn_jax.pipeline.run import Run, Stage, open_run, run_stage
from persyn_jax.pipeline.run_files import ANSWERS, PROMPTS, STATES, STUDENT
from persyn_jax.pipeline.stages import STAGES
from persyn_jax.records import Answer, Prompt
from persyn_jax.routing.strategies import StrategyName

BASE = "base"
OTHER = "other"
SWAPPED = "swapped"
ALL_ANSWERS = "all_answers.parquet"
BEFORE = "before.parquet"
EXAMINATION = "examination.parquet"

_STAGE = {stage.name: stage for stage in STAGES}
_SHARED = ("calibrate", "score", "train_router")
_BY_STRATEGY = ("route", "generate")
_BY_STUDENT = ("score", "train_router", *_BY_STRATEGY)


@config_class
class VariantSection:
    """What differs from the study's own `rewards` and `router`, key by key."""

    rewards: dict[str, Any] = Field(default_factory=dict)
    router: dict[str, Any] = Field(default_factory=dict)


@config_class
class StudySection:
    """What is compared."""

    strategies: list[StrategyName] = Field(
        default_factory=lambda: list(get_args(StrategyName)), min_length=2
    )
    """`router` is PerSyn, to which the others are compared."""
    variants: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], VariantSection] = Field(
        default_factory=dict
    )
    """PerSyn with other rewards or another router, by name: further strategies."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=lambda: [1, 2, 3], min_length=1
    )
    """Of the students' trainings (`training.seed`), the same for each strategy."""
    mean_score: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Expected of the students; the detectable effect depends on it."""
    correlation: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """Expected of two students' scores on the same items."""
    other_student: ModelConfig | None = None
    """Whose routes are compared with the student's, and what the student becomes by them; null: no
    swap test."""
    gain_audit: GainAuditSection | None = None
    """Whether the rewards foresee the gain, by short fine-tunings after the students of the first
    seed; null: not asked."""


@config_class
class StudyConfig(RunConfig):
    """A run's config, and what is compared."""

    study: StudySection

    def __post_init__(self):
        RunConfig.__post_init__(self)
        for key in ("strategies", "seeds"):
            given = getattr(self.study, key)
            if len(set(given)) < len(given):
                raise ValueError(f"study.{key}: one is given twice")
        if "router" not in self.study.strategies:
            raise ValueError("study.strategies: must hold router, to which the others are compared")
        if "family_strong" in self.study.strategies and not self.routing.family:
            raise ValueError(
                "study.strategies: family_strong needs routing.family, the teachers of the "
                "student's own"
            )
        if "car" in self.study.strategies and self.rewards.learnability != "mean_log_likelihood":
            raise ValueError("study.strategies: car needs rewards.learnability mean_log_likelihood")
        if self.training.examples is not None or self.training.seed is not None:
            raise ValueError("training.examples and training.seed: the study sets them itself")
        _check_other_model(self)
        for name in self.study.variants:
            if name in (*get_args(StrategyName), SWAPPED, BASE, OTHER):
                raise ValueError(f"study.variants: {name!r} is the name of something else")
            route_config(self, name)  # is checked, too
        if self.study.gain_audit is not None:
            audit_config(self)  # is checked, too

    @property
    def folder(self) -> Path:
        """The study's: it holds the run folders."""
        return self.run.folder / self.run.name


def _check_other_model(config: StudyConfig) -> None:
    """Teachers that are all the student itself, prompted differently, hardly differ."""
    own = None if config.service is None else config.service.name
    for number, teacher in enumerate(config.teachers):
        if not teacher.base_urls and teacher.model not in (None, own):
            raise ValueError(
                f"teachers.{number}.base_url: is required for teacher {teacher.name!r}: the "
                f"endpoint that serves model {teacher.model!r}, such as http://127.0.0.1:8001/v1"
            )
    alone = config.service is None or config.service.model == config.student
    if alone and not any(teacher.base_urls for teacher in config.teachers):
        raise ValueError("teachers: one must be another model than the student: give its base_url")


class Trial(NamedTuple):
    """A student that is finished."""

    strategy: str
    """One of `compared`."""
    seed: int


class Standing(NamedTuple):
    """How far a study is."""

    examples: int | None
    """Rows that every student trains on; None while that is not known."""
    trials: list[Trial]
    """Finished ones."""


def run_config(config: StudyConfig, name: str, **sections: dict[str, Any]) -> RunConfig:
    """That of the run folder `name`; sections: values that differ from the study's."""
    values = to_values(config)
    del values["study"]
    for section, changes in {
        "run": {"folder": str(config.folder), "name": name},
        **sections,
    }.items():
        values[section] |= changes
    return validate(RunConfig, values, where=name)


def audit_config(config: StudyConfig) -> GainAuditConfig:
    """Of the gain audit, on what the strategies share."""
    values = to_values(run_config(config, BASE))
    values["gain_audit"] = to_values(config.study.gain_audit)
    return validate(GainAuditConfig, values, where="study.gain_audit")


def compared(config: StudyConfig) -> list[str]:
    """All that has students of its own, in the order of work: the strategies, PerSyn's variants,
    PerSyn's routes for the other student."""
    swapped = [] if config.study.other_student is None else [SWAPPED]
    return [*config.study.strategies, *config.study.variants, *swapped]


def route_config(config: StudyConfig, strategy: str) -> RunConfig:
    """Of the routes and answers of a strategy, which do not depend on the training's seed."""
    if strategy == SWAPPED:
        # Only whom the rewards are for differs: the router's backbone stays.
        return run_config(
            config,
            OTHER,
            student=to_values(config.study.other_student),
            router={"backbone": to_values(config.router_backbone)},
        )
    name = trial_name(Trial(strategy, config.study.seeds[0]))
    return run_config(config, name, **_own_sections(config, strategy))


def _own_sections(config: StudyConfig, strategy: str) -> dict[str, dict[str, Any]]:
    """What differs from the study's config for a strategy, but for the swapped one."""
    variant = config.study.variants.get(strategy)
    if variant is None:
        return {"routing": {"strategy": strategy}}
    return to_values(variant) | {"routing": {"strategy": "router"}}


def trial_config(config: StudyConfig, trial: Trial, examples: int) -> RunConfig:
    """Of one student."""
    own = {} if trial.strategy == SWAPPED else _own_sections(config, trial.strategy)
    training = {"examples": examples, "seed": trial.seed}
    return run_config(config, trial_name(trial), **own, training=training)


def trial_name(trial: Trial) -> str:
    """Of its run folder."""
    return f"{trial.strategy}-{trial.seed}"


def run_study(
    config: StudyConfig, overwrite: bool = False, may_go_on: Callable[[], bool] = lambda: True
) -> Standing:
    """Works until everything is finished, or until `may_go_on` says no between two units of work:
    what is shared, a strategy's routes and answers, a student (after those of the first seed the
    gain audit).

    Raises ConfigError as `run_stage` does: a unit is finished with another config or other code;
    and where another process works on the same study.
    """
    store.prepare(config.folder, holds=())
    with store.hold(config.folder):
        return _work(config, overwrite, may_go_on)


def _work(config: StudyConfig, overwrite: bool, may_go_on: Callable[[], bool]) -> Standing:
    if not may_go_on():
        return Standing(None, [])
    _share(config, overwrite)
    for strategy in compared(config):
        if not may_go_on():
            return Standing(None, [])
        _ask(config, strategy, overwrite)
    examples = equal_examples(config)
    trials: list[Trial] = []
    for trial in all_trials(config):  # seed by seed: a study that is stopped can be looked at
        if not may_go_on():
            break
        _train(config, trial, examples, trials, overwrite)
        trials.append(trial)
        first_seed = len(trials) == len(compared(config))
        if first_seed and config.study.gain_audit is not None and may_go_on():
            audit_run(audit_config(config))
            _forget_programs()
    return Standing(examples, trials)


def all_trials(config: StudyConfig) -> Iterator[Trial]:
    """Every student of the study, in the order of work."""
    for seed in config.study.seeds:
        for strategy in compared(config):
            yield Trial(strategy, seed)


def equal_examples(config: StudyConfig) -> int:
    """The smallest number of usable answers that a strategy has."""
    usable = {}
    for strategy in compared(config):
        answers = store.read_records(route_config(config, strategy).run_folder / ANSWERS, Answer)
        usable[strategy] = sum(answer.usable for answer in answers)
    least = min(usable, key=lambda strategy: usable[strategy])
    counts = ", ".join(f"{strategy} {count}" for strategy, count in usable.items())
    say(f"usable answers: {counts}; every student trains on {usable[least]}")
    return usable[least]


def _share(config: StudyConfig, overwrite: bool) -> None:
    stages = [_STAGE[name] for name in _SHARED]
    if "oracle" in config.study.strategies:
        stages.append(_ASK_ALL)
    stages += [_STAGE["route"], _EXAMINE_BEFORE]
    with open_run(run_config(config, BASE), overwrite, whole=True) as run:
        for stage in stages:
            run_stage(stage, run)
    _forget_programs()


def _ask(config: StudyConfig, strategy: str, overwrite: bool) -> None:
    own = route_config(config, strategy)
    own_rewards = strategy == SWAPPED or strategy in config.study.variants
    adopted, stages = (("calibrate",), _BY_STUDENT) if own_rewards else (_SHARED, _BY_STRATEGY)
    with open_run(own, overwrite) as run:
        _adopt(config, BASE, own, adopted)
        states = config.folder / BASE / STATES
        if strategy != SWAPPED and states.exists() and not (own.run_folder / STATES).exists():
            store.write_bytes(own.run_folder / STATES, states.read_bytes())
        for name in stages:
            run_stage(_STAGE[name], run)
    if own_rewards:
        _forget_programs()


def _train(
    config: StudyConfig, trial: Trial, examples: int, trained: list[Trial], overwrite: bool
) -> None:
    own = trial_config(config, trial, examples)
    with open_run(own, overwrite) as run:
        routed = route_config(config, trial.strategy)
        if routed.run_folder != own.run_folder:
            _adopt(config, routed.run.name, own, (*_SHARED, *_BY_STRATEGY))
        say(f"{own.run.name}:")
        finished = store.read_manifest(own.run_folder, _TRIAL.name) is not None
        if not finished and (twin := _twin(config, trial, trained)) is not None:
            say(f"  the answers are those of {twin}, and so is the student")
            _adopt(config, twin, own, (_TRIAL.name,))
        run_stage(_TRIAL, run)
    _forget_programs()


def _twin(config: StudyConfig, trial: Trial, trained: list[Trial]) -> str | None:
    """The run folder of a student with the same seed and bitwise the same answers, which is the
    same student: strategies often agree, such as Strong with the best constant teacher."""

    def answers(name: str) -> str:
        return store.sha256_of(config.folder / name / ANSWERS)

    own = answers(trial_name(trial))
    names = [trial_name(other) for other in trained if other.seed == trial.seed]
    return next((name for name in names if answers(name) == own), None)


def _adopt(config: StudyConfig, name: str, own: RunConfig, stages: tuple[str, ...]) -> None:
    for stage in stages:
        store.adopt(config.folder / name, own.run_folder, stage)


def _forget_programs() -> None:
    """Every training compiles programs of its own; many would fill the memory."""
    import jax

    jax.clear_caches()
    gc.collect()


def _ask_all(run: Run, _: Path) -> dict[str, Any]:
    """All teachers answer the train prompts too: what only the oracle knows."""
    from persyn_jax.pipeline.answers import Ask, collect_answers

    config = run.config
    rest = [prompt for prompt in run.read(PROMPTS, Prompt) if prompt.split == "train"]
    asks = [Ask(prompt, teacher) for prompt in rest for teacher in config.teachers]
    with store.AnswerStore(config.run.answers) as answers:
        found = collect_answers(
            asks, run.own_weights(), answers, config.client, run.own_service, "ask all"
        )
    run.write(ALL_ANSWERS, found.answers, Answer)
    return found.summary


def _examine_before(run: Run, _: Path) -> dict[str, Any]:
    run.stop_service()  # its memory is needed
    return _examine(run, run.config.student, BEFORE)


def _trial(run: Run, checkpoints: Path) -> dict[str, Any]:
    summary = _STAGE["train_student"].work(run, checkpoints)
    examined = _examine(run, ModelConfig(weights=str(run.folder / STUDENT)), EXAMINATION)
    shutil.rmtree(run.folder / STUDENT)  # as large as the model, and there are many
    return summary | examined


def _examine(run: Run, model: ModelConfig, name: str) -> dict[str, Any]:
    from persyn_jax.models.weights import load
    from persyn_jax.pipeline.examine import Examination, examine

    config = run.config
    student = load(model, config.run.seed)
    prompts, evaluation = run.read(PROMPTS, Prompt), config.evaluation
    found = examine(prompts, student, evaluation.max_tokens, evaluation.engine, run.mesh())
    run.write(name, found, Examination)
    mean = sum(examination.score for examination in found) / len(found)
    say(f"  mean score {mean:.4f} on {len(found)} eval prompts")
    return {"examined": len(found), "mean_score": mean}


def _sections(*stages: str) -> Callable[[RunConfig], dict[str, Any]]:
    def section(config: RunConfig) -> dict[str, Any]:
        parts = [_STAGE[stage].section(config) for stage in stages]
        return {key: value for part in parts for key, value in part.items()}

    return section


_ASK_ALL = Stage(
    name="ask_all",
    modules=("persyn_jax.pipeline.answers",),
    reads=(PROMPTS,),
    writes=(ALL_ANSWERS,),
    section=_sections("generate"),
    models=_STAGE["generate"].models,
    files=_STAGE["generate"].files,
    work=_ask_all,
)
_EXAMINE_BEFORE = Stage(
    name="examine_before",
    modules=("persyn_jax.pipeline.examine",),
    reads=(PROMPTS,),
    writes=(BEFORE,),
    section=_sections("evaluate"),
    models=_STAGE["evaluate"].models,
    files=_STAGE["evaluate"].files,
    work=_examine_before,
)
# One stage, because the student itself is not kept.
_TRIAL = Stage(
    name="trial",
    modules=(*_STAGE["train_student"].modules, "persyn_jax.pipeline.examine"),
    reads=(PROMPTS, ANSWERS),
    writes=(EXAMINATION,),
    section=_sections("train_student", "evaluate"),
    models=_STAGE["train_student"].models,
    files=_STAGE["train_student"].files,
    work=_trial,
    elastic=_STAGE["train_student"].elastic,
)
