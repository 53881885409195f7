"""The router study: what more calibration prompts, another loss, another teacher or a backbone that
learns would change, and how the router serves another student.

It reads what the stages calibrate and score left in the run folder; nobody is asked. Every router
is trained as the stage train_router trains one, on a frozen backbone unless backbones are compared,
and judged on the same held-out prompts.

Heavy imports stay inside the functions.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from persyn_jax import store
from persyn_jax.config import ConfigError, config_class
from persyn_jax.intervals import paired_difference_ci95
from persyn_jax.pipeline.config import BackboneTraining, RunConfig
from persyn_jax.pipeline.progress import progress, say
from persyn_jax.pipeline.run import open_finished
from persyn_jax.pipeline.run_files import PROMPTS, REWARDS
from persyn_jax.pipeline.stage_work import router_training, train_any_router
from persyn_jax.pipeline.stages import STAGES
from persyn_jax.records import Prompt, Reward
from persyn_jax.routing.preferences import (
    PairWeights,
    Preferences,
    make_preferences,
    make_preferences_with_ties,
)
from persyn_jax.routing.router_study import (
    AddedTeacher,
    Fit,
    LearningPoint,
    Predict,
    Reliability,
    add_teachers,
    learning_curve,
    mean_regret,
    regrets,
    reliability,
)
from persyn_jax.routing.strategies import Calibration, best_constant, route_by_router
from persyn_jax.routing.verdict import hit_at_k

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from persyn_jax.models.weights import Model
    from persyn_jax.pipeline.train_router import RouterTraining

RESULT = "router_study.json"
_READS = ("calibrate", "score")
_FEWEST = 5  # prompts; the next number is always twice as many
_LOSSES: dict[str, Callable[[np.ndarray], Preferences]] = {
    "ties_dropped": make_preferences,
    "ties_half": make_preferences_with_ties,
    "by_difference": partial(make_preferences, pair_weights="difference"),
}
_OWN_LOSS: dict[PairWeights, str] = {"equal": "ties_dropped", "difference": "by_difference"}


@config_class
class RouterStudySection:
    """What is tried."""

    prompts: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Numbers of calibration prompts on the learning curve; none given: 5, 10, 20, ... and all that
    the router learns from."""
    draws: Annotated[int, Field(ge=1)] = 3
    """Sets of so many prompts, whose routers' numbers are averaged."""
    anchors: list[Annotated[int, Field(ge=2)]] = Field(default_factory=list)
    """Numbers of prompts that an added teacher has answered; none given: as `prompts`."""
    bins: Annotated[int, Field(ge=1)] = 10
    """Of the reliability table."""
    backbones: list[BackboneTraining] = Field(default_factory=list)
    """What learns of the backbone (`router.train`): routers to compare, each with the first; none
    given: none. `lora` and `full` read the prompts in each step, which takes long."""
    other_run: Path | None = None
    """The folder of another student's run, with the same calibration prompts and teachers: this
    run's router is judged by that student's rewards, too."""


@config_class
class RouterStudyConfig(RunConfig):
    """A run's config, and what is studied of its router."""

    router_study: RouterStudySection = RouterStudySection()


def study_run(config: RouterStudyConfig) -> dict[str, Any]:
    """`study_router` of a run folder in which the stages calibrate and score are finished; as
    `backbones` what `compare_backbones` finds, and as `transfer` what `judge_transfer` does, if the
    section names any. The values are written there, too, as router_study.json.

    Raises ConfigError as those, and when a stage is not finished or is with another config.
    """
    from persyn_jax.models.weights import load
    from persyn_jax.pipeline.tokens import prompt_tokens
    from persyn_jax.sampling.scoring import pooled_states

    section = config.router_study
    others = None if section.other_run is None else _rewards_of(section.other_run)
    with open_finished(config, [stage for stage in STAGES if stage.name in _READS]) as run:
        mesh = run.mesh()  # starts the platform
        prompts = [p for p in run.read(PROMPTS, Prompt) if p.split == "calibration"]
        backbone = load(config.router_backbone, config.run.seed)
        tokens = prompt_tokens(backbone.tokenizer, prompts)
        state_ND = pooled_states(backbone, tokens, mesh)
        rewards = run.read(REWARDS, Reward)
        training = router_training(config)
        found = study_router(prompts, rewards, state_ND, training, section, mesh)
        if section.backbones:
            found["backbones"] = compare_backbones(config, prompts, rewards, backbone, tokens, mesh)
        if others is not None:
            found["transfer"] = judge_transfer(prompts, rewards, others, state_ND, training, mesh)
        store.write_json(run.folder / RESULT, found)
    return found


def study_router(
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    state_ND: np.ndarray,
    training: "RouterTraining",
    section: RouterStudySection,
    mesh: "Mesh",
) -> dict[str, Any]:
    """The study, as values that JSON takes.

    prompts: the calibration prompts. state_ND: the backbone's pooled state of each, float32.

    The keys are stable; regret is the mean of the oracle's total minus the routes', over held-out
    prompts:

        seen, held_out     numbers of calibration prompts to learn from and to judge by
        regret             best_constant, random (expected): to compare the others with
        learning_curve     a list of {prompts, pairs, hit_at_1, hit_at_3, regret, log_loss}, means
                           over the draws; the last with all prompts unless the config says others
        reliability        of the router that has seen all prompts: expected_error, log_loss, and
                           bins, a list of {confidence, right, pairs} without the empty ones
        tied_share         share of the seen comparisons of two teachers that are ties
        losses             ties_dropped, ties_half (half a win, half a loss) and by_difference
                           (`pair_weights: difference`): {hit_at_1, hit_at_3, regret, log_loss,
                           expected_error}; the run's own is ties_dropped, or by_difference if its
                           config says so
        ties_half_minus_dropped, by_difference_minus_dropped
                           {mean, ci95: [low, high]} of the regret, paired by prompt
        added_teachers     retrained_on_all (regret of the router that has seen all answers);
                           mean, a list of {anchors, without, bilinear, retrained}, regrets as in
                           `routing.router_study.AddedTeacher`, over the teachers; and teachers,
                           the same list with {teacher, ...} for each of them

    Raises ConfigError: no held-out prompts or none to learn from, fewer of them than the section
    names, rewards that lack some teachers. RuntimeError: too few preference pairs.
    """
    from persyn_jax.pipeline.train_router import make_lessons

    teachers = list(dict.fromkeys(reward.teacher for reward in rewards))
    lessons = make_lessons(prompts, rewards, teachers, training)
    if np.isnan(lessons.total_NM).any():
        raise ConfigError("the router study needs the rewards of all teachers to every prompt")
    seen, held_out = (
        Calibration(lessons.total_NM[part_N], lessons.source_N[part_N].tolist(), state_ND[part_N])
        for part_N in (lessons.seen_N, lessons.held_out_N)
    )
    sizes = _sizes("prompts", section.prompts, len(seen.total_NM))
    anchors = _sizes("anchors", section.anchors, len(seen.total_NM))
    routers = section.draws * len(sizes) + len(_LOSSES) + len(teachers) * (1 + len(anchors))
    with progress("router study: routers", routers) as advance:
        fit = _make_fit(len(teachers), training, mesh, advance)
        curves = [
            learning_curve(fit, seen, held_out, sizes, training.seed, draw, training.pair_weights)
            for draw in range(section.draws)
        ]
        coefficients = {
            name: fit(seen.feature_ND, pairs(seen.total_NM))(held_out.feature_ND)
            for name, pairs in _LOSSES.items()
        }
        added = add_teachers(fit, seen, held_out, anchors, training.seed, training.pair_weights)

    total_NM = held_out.total_NM
    routes = {name: route_by_router(c_NM) for name, c_NM in coefficients.items()}
    constant_N = np.full(len(total_NM), best_constant(seen.total_NM))
    regret = {name: regrets(total_NM, teacher_N) for name, teacher_N in routes.items()}
    own_loss = _OWN_LOSS[training.pair_weights]
    return {
        "seen": len(seen.total_NM),
        "held_out": len(total_NM),
        "regret": {
            "best_constant": mean_regret(total_NM, constant_N),
            "random": float((total_NM.max(axis=1) - total_NM.mean(axis=1)).mean()),
        },
        "learning_curve": [_mean_point(points) for points in zip(*curves, strict=True)],
        "reliability": _reliability_values(
            reliability(coefficients[own_loss], total_NM, section.bins)
        ),
        "tied_share": tied_share(seen.total_NM),
        "losses": {name: _judged(total_NM, c_NM) for name, c_NM in coefficients.items()},
        "ties_half_minus_dropped": _difference(regret["ties_half"], regret["ties_dropped"]),
        "by_difference_minus_dropped": _difference(regret["by_difference"], regret["ties_dropped"]),
        "added_teachers": {
            "retrained_on_all": float(regret[own_loss].mean()),
            "mean": [_mean_added(added, count) for count in anchors],
            "teachers": [one._asdict() | {"teacher": teachers[one.teacher]} for one in added],
        },
    }


def compare_backbones(
    config: RouterStudyConfig,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    backbone: "Model",
    tokens: Sequence[tuple[int, ...]],
    mesh: "Mesh",
) -> list[dict[str, Any]]:
    """Routers that differ in what learns of the backbone: same prompts, same steps, same verdict.

    prompts: the calibration prompts, with the rewards of all teachers. tokens: of each prompt,
    through the chat template. For each of `router_study.backbones`, in their order:

        train              as `router.train`
        trained_parameters of the head and of what learns of the backbone
        seconds            to read the prompts, train and judge, compiling included
        hit_at_1, regret   on the held-out prompts, regret as in `study_router`
        minus_first        {mean, ci95: [low, high]} of the regret minus that of the first of them,
                           paired by prompt

    Says first how many prompts each will read. Raises ConfigError as `study_router`, and as
    `adapters.adapter_shapes`; RuntimeError: too few preference pairs.
    """
    import jax

    from persyn_jax.models.router import coefficients
    from persyn_jax.pipeline.train_router import make_lessons

    c, trains = config.router, config.router_study.backbones
    say(
        f"router study: {', '.join(trains)}; where a backbone learns, {config.gossip.workers} "
        f"workers read {c.pairs} prompts in each of {c.steps} steps, else {len(prompts)} in all"
    )
    calibration = prompts, rewards, list(dict.fromkeys(reward.teacher for reward in rewards))
    lessons = make_lessons(*calibration, router_training(config))
    total_NM = lessons.total_NM[lessons.held_out_N]
    found, first_N = [], None
    with progress("router study: backbones", len(trains)) as advance:
        for train in trains:
            own, started = replace(config, router=replace(c, train=train)), time.monotonic()
            router, _ = train_any_router(own, calibration, backbone, tokens, mesh, lambda row: None)
            seconds = time.monotonic() - started
            learned = () if router.backbone is None else router.backbone.params
            state_ND = router.state_ND[lessons.held_out_N]
            coefficient_NM = np.asarray(coefficients(router.head, state_ND))
            regret_N = regrets(total_NM, route_by_router(coefficient_NM))
            first_N = regret_N if first_N is None else first_N
            found.append(
                {
                    "train": train,
                    "trained_parameters": sum(
                        leaf.size for leaf in jax.tree.leaves((router.head, learned))
                    ),
                    "seconds": round(seconds, 1),
                    "hit_at_1": hit_at_k(total_NM, coefficient_NM, 1),
                    "regret": float(regret_N.mean()),
                    "minus_first": _difference(regret_N, first_N),
                }
            )
            advance()
    return found


def judge_transfer(
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    others: Sequence[Reward],
    state_ND: np.ndarray,
    training: "RouterTraining",
    mesh: "Mesh",
) -> dict[str, Any]:
    """A router that learned from one student's rewards, judged by another student's.

    prompts, state_ND: as in `study_router`. rewards, others: of the student that the router learned
    from, and of the one that it routes for. On the held-out prompts, by the other student's totals:

        hit_at_1, regret           of this router
        own_hit_at_1, own_regret   of one that learned from the other student's rewards
        minus_own                  {mean, ci95: [low, high]} of the regret minus that of its own,
                                   paired by prompt
        best_constant              regret of the teacher that is best for the other student on the
                                   prompts that were seen
        agreement                  share of the prompts for which both choose the same teacher

    Raises ConfigError: `others` lack a reward of some prompt and teacher, or as `study_router`.
    """
    from persyn_jax.pipeline.train_router import make_lessons

    teachers = list(dict.fromkeys(reward.teacher for reward in rewards))
    these = make_lessons(prompts, rewards, teachers, training)
    try:
        theirs = make_lessons(prompts, others, teachers, training)
    except ValueError as error:
        raise ConfigError(f"router_study.other_run: {error}") from None
    if np.isnan([these.total_NM, theirs.total_NM]).any():
        raise ConfigError("the router study needs the rewards of all teachers to every prompt")
    seen_N, held_out_N, total_NM = theirs.seen_N, theirs.held_out_N, theirs.total_NM
    with progress("router study: students", 2) as advance:
        fit = _make_fit(len(teachers), training, mesh, advance)
        this_NM, own_NM = (
            fit(state_ND[seen_N], lessons.preferences)(state_ND[held_out_N])
            for lessons in (these, theirs)
        )
    this_N, own_N = route_by_router(this_NM), route_by_router(own_NM)
    constant_N = np.full(len(held_out_N), best_constant(total_NM[seen_N]))
    total_NM = total_NM[held_out_N]
    regret_N, own_regret_N = regrets(total_NM, this_N), regrets(total_NM, own_N)
    return {
        "hit_at_1": hit_at_k(total_NM, this_NM, 1),
        "regret": float(regret_N.mean()),
        "own_hit_at_1": hit_at_k(total_NM, own_NM, 1),
        "own_regret": float(own_regret_N.mean()),
        "minus_own": _difference(regret_N, own_regret_N),
        "best_constant": mean_regret(total_NM, constant_N),
        "agreement": float((this_N == own_N).mean()),
    }


def _rewards_of(run_folder: Path) -> list[Reward]:
    if not (run_folder / REWARDS).is_file():
        raise ConfigError(
            f"router_study.other_run {run_folder}: there is no {REWARDS}; its stage score writes it"
        )
    return store.read_records(run_folder / REWARDS, Reward)


def _make_fit(
    teachers: int, training: "RouterTraining", mesh: "Mesh", advance: Callable[[], None]
) -> Fit:
    """The run's own training of a head. advance: called after each."""
    from persyn_jax.models import router
    from persyn_jax.pipeline.train_router import fit_head, make_head_programs

    programs = make_head_programs(training, mesh)

    def fit(feature_ND: np.ndarray, preferences: Preferences) -> Predict:
        pairs, workers = len(preferences.winner_P), training.gossip.workers
        if pairs < workers:
            raise RuntimeError(
                f"{len(feature_ND)} calibration prompts give {pairs} preference pairs for {workers}"
                " workers: study larger numbers of prompts"
            )
        head = fit_head(
            feature_ND, preferences, teachers, training, mesh, lambda row: None, programs
        )
        advance()
        return lambda other_ND: np.asarray(router.coefficients(head, other_ND))

    return fit


def _sizes(key: str, given: Sequence[int], most: int) -> list[int]:
    """`given`, or 5, 10, 20, ... and `most`."""
    if given:
        if max(given) > most:
            raise ConfigError(
                f"router_study.{key} {max(given)}: the router learns from {most} calibration "
                "prompts, the others judge it"
            )
        return sorted(set(given))
    doubled = [_FEWEST << n for n in range(most.bit_length()) if _FEWEST << n < most]
    return [*doubled, most]


def tied_share(total_NM: np.ndarray) -> float:
    """Share of the comparisons of two teachers on one prompt in which their totals are equal."""
    ties_NMM = total_NM[:, :, None] == total_NM[:, None, :]
    prompts, teachers = total_NM.shape
    return float((ties_NMM.sum() - prompts * teachers) / (prompts * teachers * (teachers - 1)))


def _difference(regret_N: np.ndarray, other_N: np.ndarray) -> dict[str, Any]:
    found = paired_difference_ci95(regret_N, other_N)
    return {"mean": found.mean, "ci95": found.ci95}


def _judged(total_NM: np.ndarray, coefficient_NM: np.ndarray) -> dict[str, float]:
    found = reliability(coefficient_NM, total_NM)
    return {
        "hit_at_1": hit_at_k(total_NM, coefficient_NM, 1),
        "hit_at_3": hit_at_k(total_NM, coefficient_NM, 3),
        "regret": mean_regret(total_NM, route_by_router(coefficient_NM)),
        "log_loss": found.log_loss,
        "expected_error": found.expected_error,
    }


def _mean_point(points: Sequence[LearningPoint]) -> dict[str, float]:
    """prompts is the same of all; pairs need not be."""
    means = LearningPoint(*np.mean(points, axis=0).tolist())._asdict()
    return means | {"prompts": points[0].prompts}


def _mean_added(added: Sequence[AddedTeacher], anchors: int) -> dict[str, float]:
    mean = AddedTeacher(*np.mean([one for one in added if one.anchors == anchors], axis=0).tolist())
    regret = {name: getattr(mean, name) for name in ("without", "bilinear", "retrained")}
    return {"anchors": anchors, **regret}


def _reliability_values(found: Reliability) -> dict[str, Any]:
    bins = zip(found.confidence_K, found.right_K, found.pairs_K, strict=True)
    return {
        "expected_error": found.expected_error,
        "log_loss": found.log_loss,
        "bins": [
            {"confidence": float(confidence), "right": float(right), "pairs": int(pairs)}
            for confidence, right, pairs in bins
            if pairs
        ],
    }


def study_lines(found: dict[str, Any]) -> list[str]:
    """The values of `study_run` as tables in Markdown."""
    regret, added = found["regret"], found["added_teachers"]
    return [
        f"{found['seen']} calibration prompts to learn from, {found['held_out']} to judge by. "
        f"Regret of the best constant teacher {regret['best_constant']:.4f}, of a random one "
        f"{regret['random']:.4f}.",
        "",
        "Learning curve:",
        "",
        *_table(found["learning_curve"]),
        "",
        "Reliability of the coefficients: how sure the router is of a pair, how often it is right; "
        f"expected error {found['reliability']['expected_error']:.4f}:",
        "",
        *_table(found["reliability"]["bins"]),
        "",
        f"Losses ({found['tied_share']:.1%} of the comparisons are ties; regret of ties_half minus "
        f"ties_dropped {_shown_difference(found['ties_half_minus_dropped'])}, of by_difference "
        f"minus ties_dropped {_shown_difference(found['by_difference_minus_dropped'])}):",
        "",
        *_table([{"loss": name} | values for name, values in found["losses"].items()]),
        "",
        "Regret after a teacher is added by its answers to some anchor prompts, mean over the "
        f"teachers; a router trained on all answers has {added['retrained_on_all']:.4f}:",
        "",
        *_table(added["mean"]),
        *_backbone_lines(found.get("backbones", [])),
        *_transfer_lines(found.get("transfer")),
    ]


def _backbone_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    title = f"What learns of the backbone; regret minus that of {found[0]['train']}:"
    rows = [one | {"minus_first": _shown_difference(one["minus_first"])} for one in found]
    return ["", title, "", *_table(rows)]


def _transfer_lines(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    title = "This run's router for the other student; regret minus that of the student's own:"
    return ["", title, "", *_table([found | {"minus_own": _shown_difference(found["minus_own"])}])]


def _shown_difference(difference: dict[str, Any]) -> str:
    low, high = difference["ci95"]
    return f"{difference['mean']:+.4f} [{low:+.4f}, {high:+.4f}]"


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    def shown(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    return [
        f"| {' | '.join(rows[0])} |",
        "|" + "--:|" * len(rows[0]),
        *(f"| {' | '.join(map(shown, row.values()))} |" for row in rows),
    ]
