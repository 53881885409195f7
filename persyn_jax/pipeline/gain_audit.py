"""The gain audit: does the reward foresee what a student gains from a teacher's answers?

For some teachers the student is fine-tuned for a few steps on their answers to a slice of the
calibration prompts. The gain is how much likelier the reference answers of held-out prompts of the
same source become, which is less noisy than accuracy. It reads what the stages calibrate and score
left in the run folder; nobody is asked. Each (teacher, slice) is kept once it is measured, in
gain_audit/ of the run folder.

Heavy imports stay inside the functions.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from persyn_jax import store
from persyn_jax.config import ConfigError, config_class, fingerprint, to_values
from persyn_jax.intervals import mean_ci95
from persyn_jax.models import spec
from persyn_jax.pipeline.config import RunConfig
from persyn_jax.pipeline.progress import say
from persyn_jax.pipeline.run import Run, open_finished, path_fingerprint
from persyn_jax.pipeline.run_files import CALIBRATION_ANSWERS, GAIN_AUDIT, PROMPTS, REWARDS
from persyn_jax.pipeline.stages import STAGES
from persyn_jax.provenance import source_fingerprint
from persyn_jax.records import Answer, Prompt, Reward
from persyn_jax.routing.rewards import ALPHAS, combine
from persyn_jax.routing.router_study import gain_by_alpha, rank_correlation
from persyn_jax.streams import numpy_stream

FOLDER = "gain_audit"
TERMS = ("total", "quality", "learnability")
_READS = ("calibrate", "score")


@config_class
class GainAuditSection:
    """What is fine-tuned on. How says `training`: its optimiser, rows of a batch, room in a row."""

    teachers: list[str] = Field(default_factory=list)
    """Names; none given: all."""
    slices: Annotated[int, Field(ge=1)] = 1
    """Into how many the calibration prompts of each source are cut."""
    rows: Annotated[int, Field(ge=1)] = 16
    """Answers of a fine-tuning, at most: all have equally many, in a slice to the same prompts."""
    steps: Annotated[int, Field(ge=1)] = 8
    """Of a fine-tuning; a batch is training.rows answers."""
    held_out: Annotated[int, Field(ge=1)] = 100
    """Eval prompts of each source, at most, on which the gain is measured."""


@config_class
class GainAuditConfig(RunConfig):
    """A run's config, and what is audited."""

    gain_audit: GainAuditSection = GainAuditSection()

    def __post_init__(self):
        RunConfig.__post_init__(self)
        names = [teacher.name for teacher in self.teachers]
        for name in self.gain_audit.teachers:
            if name not in names:
                raise ValueError(
                    f"gain_audit.teachers: no teacher {name!r}, only {', '.join(names)}"
                )


class Slice(NamedTuple):
    """Calibration prompts of one source, and what the gain from answers to them is measured on."""

    name: str
    prompts: list[Prompt]
    held_out: list[Prompt]
    """Eval prompts of the same source that have a reference answer."""


class Unit(NamedTuple):
    """One fine-tuning: a teacher's answers to the prompts of a slice."""

    teacher: str
    slice: Slice
    answers: list[Answer]
    rewards: list[Reward]


def audit_run(config: GainAuditConfig) -> dict[str, Any]:
    """The audit of a run folder in which the stages calibrate and score are finished; the values
    are written there, too, as gain_audit.json. What was measured before is not measured again.

    The keys are stable:

        inputs             fingerprints of the files of the run folder that it was made from
        rows, steps        answers and steps of each fine-tuning
        units              a list of {teacher, slice, gain, gain_ci95: [low, high], before, after,
                           total, quality, learnability}: the mean gain over the held-out prompts,
                           in nats a token of the reference answers, and their mean log-likelihood
                           before and after; then the means over the answers of the total reward and
                           of its two standardised terms
        correlation        term (total, quality, learnability) -> {spearman, p_value} with the gain
                           over the units, p_value as in `rank_correlation`; null where it is not
                           defined
        correlation_within_slices
                           the same after the mean of its slice is taken from every value: a slice
                           may be easier to learn, whoever answers
        by_alpha           a list of {alpha, spearman, gain} for the total with each of `ALPHAS`:
                           its correlation within slices, and the mean over the slices of the gain
                           from the teacher that it likes best there; the best of eleven looks
                           better than it is
        best_gain, mean_gain
                           the mean over the slices of the gain from the teacher with the largest
                           one, and from one drawn at random

    Raises ConfigError: a stage is not finished, or is with another config; a source without
    held-out prompts with a reference answer; a slice without a prompt that all the teachers have a
    usable answer to; an answer too long for a row.
    """
    with open_finished(config, [stage for stage in STAGES if stage.name in _READS]) as run:
        units = make_units(
            run.read(PROMPTS, Prompt),
            run.read(CALIBRATION_ANSWERS, Answer),
            run.read(REWARDS, Reward),
            config.gain_audit.teachers or [teacher.name for teacher in config.teachers],
            config.gain_audit,
            config.run.seed,
        )
        folder = run.folder / FOLDER
        folder.mkdir(exist_ok=True)
        unit_at = {folder / f"{_made_of(config, unit)}.json": unit for unit in units}
        missing = {path: unit for path, unit in unit_at.items() if not path.exists()}
        say(f"gain audit: {len(missing)} of {len(units)} fine-tunings to do")
        if missing:
            _measure(run, config, missing)
        rows = [_row(unit, store.read_json(path)) for path, unit in unit_at.items()]
        read = (PROMPTS, CALIBRATION_ANSWERS, REWARDS)
        found = {
            "inputs": {name: path_fingerprint(run.folder / name) for name in read},
            "rows": len(units[0].answers),
            "steps": config.gain_audit.steps,
            "units": rows,
            **correlations(rows),
            **sweep_alpha(rows),
        }
        store.write_json(run.folder / GAIN_AUDIT, found)
    return found


def make_units(
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    rewards: Sequence[Reward],
    teachers: Sequence[str],
    section: GainAuditSection,
    seed: int,
) -> list[Unit]:
    """Slice by slice, each with all the teachers. Raises ConfigError as `audit_run`."""
    answer_of = {(a.prompt_id, a.teacher): a for a in answers if a.usable}
    reward_of = {reward.key: reward for reward in rewards}
    shared = [
        prompt
        for prompt in prompts
        if prompt.split == "calibration"
        and all((prompt.id, teacher) in answer_of for teacher in teachers)
    ]
    slices = list(_slices(prompts, shared, section, seed))
    rows = min(section.rows, *(len(part.prompts) for part in slices))
    units = []
    for part in slices:
        for teacher in teachers:
            chosen = [answer_of[prompt.id, teacher] for prompt in part.prompts[:rows]]
            units.append(Unit(teacher, part, chosen, [reward_of[a.key] for a in chosen]))
    return units


def _slices(
    prompts: Sequence[Prompt], shared: Sequence[Prompt], section: GainAuditSection, seed: int
) -> Iterator[Slice]:
    """`shared`: the prompts that can be in a slice."""
    for source in dict.fromkeys(p.source for p in prompts if p.split == "calibration"):
        own = [prompt for prompt in shared if prompt.source == source]
        if len(own) < section.slices:
            raise ConfigError(
                f"gain_audit.slices {section.slices}: source {source!r} has {len(own)} calibration "
                "prompts to which all the audited teachers have a usable answer"
            )
        apart = [p for p in prompts if (p.source, p.split) == (source, "eval") and p.answer]
        if not apart:
            raise ConfigError(
                f"sources.{source}: has no eval prompts with a reference answer, on which the gain "
                "is measured"
            )
        order = numpy_stream(seed, f"gain slices {source}").permutation(len(own))
        for number, indices in enumerate(np.array_split(order, section.slices)):
            name = source if section.slices == 1 else f"{source} {number}"
            yield Slice(name, [own[index] for index in indices], apart[: section.held_out])


def _measure(run: Run, config: GainAuditConfig, units: Mapping[Path, Unit]) -> None:
    """The gain of each unit, into the file that it belongs to."""
    from persyn_jax import mesh as meshes
    from persyn_jax.models.weights import load
    from persyn_jax.pipeline.gain import fine_tune, make_tuning, reference_log_likelihoods
    from persyn_jax.pipeline.prompts import check_answers
    from persyn_jax.pipeline.tokens import conversations

    seed, training = config.run.seed, config.training
    run.mesh()  # starts the platform
    mesh, student = meshes.make_mesh(1), load(config.student, seed)
    tokens_of = {
        path: conversations(student.tokenizer, unit.slice.prompts, unit.answers)
        for path, unit in units.items()
    }
    for path, unit in units.items():
        check_answers(unit.answers, tokens_of[path], training)
    tuning = make_tuning(student, training, config.gain_audit.steps, seed)
    before_of: dict[str, np.ndarray] = {}
    for path, unit in units.items():
        name, held_out = unit.slice.name, unit.slice.held_out
        if name not in before_of:
            before_of[name] = reference_log_likelihoods(student, held_out, mesh)
        tuned = fine_tune(tuning, tokens_of[path])
        measured = _gain(before_of[name], reference_log_likelihoods(tuned, held_out, mesh))
        store.write_json(path, measured)
        say(f"  {unit.teacher} on {name}: {measured['gain']:+.4f} nats a token")


def _gain(before_N: np.ndarray, after_N: np.ndarray) -> dict[str, Any]:
    gain = mean_ci95(after_N - before_N)
    return {
        "gain": gain.mean,
        "gain_ci95": gain.ci95,
        "before": float(before_N.mean()),
        "after": float(after_N.mean()),
    }


def _made_of(config: GainAuditConfig, unit: Unit) -> str:
    """The fingerprint of all that decides a unit's gain."""
    return fingerprint(
        [
            spec.fingerprint(config.student),
            config.run.seed,
            config.gain_audit.steps,
            to_values(config.training),
            [answer.key for answer in unit.answers],
            [[prompt.messages, prompt.answer] for prompt in unit.slice.held_out],
            source_fingerprint("persyn_jax.pipeline.gain"),
        ]
    )


def _row(unit: Unit, measured: Mapping[str, Any]) -> dict[str, Any]:
    def mean(field: str) -> float:
        return float(np.mean([getattr(reward, field) for reward in unit.rewards]))

    return {
        "teacher": unit.teacher,
        "slice": unit.slice.name,
        **measured,
        "total": mean("total"),
        "quality": mean("quality_standardised"),
        "learnability": mean("learnability_standardised"),
    }


def correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`correlation` and `correlation_within_slices` of `audit_run`, from its `units`: every teacher
    on every slice."""
    value_TS = _by_teacher_and_slice(rows)
    within_TS = {name: _within_slices(own_TS) for name, own_TS in value_TS.items()}
    return {
        "correlation": _with_gain(value_TS),
        "correlation_within_slices": _with_gain(within_TS),
    }


def sweep_alpha(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`by_alpha`, `best_gain` and `mean_gain` of `audit_run`, from its `units`."""
    value_TS = _by_teacher_and_slice(rows)
    quality_TS, learnability_TS, gain_TS = (
        value_TS[name] for name in ("quality", "learnability", "gain")
    )
    chosen = gain_by_alpha(quality_TS.T, learnability_TS.T, gain_TS.T, ALPHAS).tolist()
    by_alpha = []
    for alpha, gain in zip(ALPHAS, chosen, strict=True):
        total_TS = _within_slices(combine(quality_TS, learnability_TS, alpha))
        found = rank_correlation(total_TS, _within_slices(gain_TS)).spearman
        spearman = None if np.isnan(found) else found
        by_alpha.append({"alpha": alpha, "spearman": spearman, "gain": gain})
    return {
        "by_alpha": by_alpha,
        "best_gain": float(gain_TS.max(axis=0).mean()),
        "mean_gain": float(gain_TS.mean()),
    }


def _by_teacher_and_slice(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """float64[T, S] of each term and of the gain."""
    teachers, slices = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("teacher", "slice")
    )
    value_TS = {name: np.empty((len(teachers), len(slices))) for name in (*TERMS, "gain")}
    for row in rows:
        cell = teachers.index(row["teacher"]), slices.index(row["slice"])
        for name, own_TS in value_TS.items():
            own_TS[cell] = row[name]
    return value_TS


def _within_slices(value_TS: np.ndarray) -> np.ndarray:
    return value_TS - value_TS.mean(axis=0)


def _with_gain(value_TS: Mapping[str, np.ndarray]) -> dict[str, Any]:
    found = {}
    for term in TERMS:
        values = rank_correlation(value_TS[term], value_TS["gain"])._asdict()
        found[term] = {key: None if np.isnan(value) else value for key, value in values.items()}
    return found


def audit_lines(found: Mapping[str, Any]) -> list[str]:
    """The values of `audit_run` as tables in Markdown."""
    lines = [
        f"Each fine-tuning: {found['rows']} answers, {found['steps']} steps. Gain: nats a token of "
        "the reference answers of held-out prompts.",
        "",
        "| slice | teacher | gain | total | quality | learnability |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in found["units"]:
        low, high = row["gain_ci95"]
        terms = " | ".join(f"{row[term]:+.3f}" for term in TERMS)
        lines.append(
            f"| {row['slice']} | {row['teacher']} | {row['gain']:+.4f} [{low:+.4f}, {high:+.4f}] | "
            f"{terms} |"
        )
    lines += [
        "",
        "Spearman's correlation of the reward with the gain; p: how often it is as far from 0 with "
        "the teachers' rewards exchanged at random:",
        "",
        "| reward | over all | within slices |",
        "|---|--:|--:|",
    ]
    for term in TERMS:
        both = [found[key][term] for key in ("correlation", "correlation_within_slices")]
        lines.append(f"| {term} | {' | '.join(map(_shown, both))} |")
    lines += [
        "",
        "With another alpha, the total's correlation within slices, and the gain from the teacher "
        f"that it likes best in each slice (of the best there: {found['best_gain']:+.4f}; of one at"
        f" random: {found['mean_gain']:+.4f}):",
        "",
        "| alpha | correlation | gain |",
        "|--:|--:|--:|",
    ]
    for row in found["by_alpha"]:
        spearman = "-" if row["spearman"] is None else f"{row['spearman']:+.2f}"
        lines.append(f"| {row['alpha']:.1f} | {spearman} | {row['gain']:+.4f} |")
    return lines


def _shown(correlation: Mapping[str, Any]) -> str:
    if correlation["spearman"] is None:
        return "-"
    return f"{correlation['spearman']:+.2f} (p = {correlation['p_value']:.3f})"
