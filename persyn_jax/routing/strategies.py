"""Whom to ask: strategies, each from what is known of the teachers to a score of every teacher for
every prompt, float64[N, M]; the teacher with the highest score answers.

Scores, not teachers, so that limits can move prompts to the next best (see `selection`). Equal
teachers: the first in the config's order.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from persyn_jax.config import ConfigError, config_class
from persyn_jax.records import Reward
from persyn_jax.routing.clusters import CHUNK, cluster_means, nearest, unit_rows
from persyn_jax.routing.learnability import MetricName
from persyn_jax.routing.preferences import reward_matrix
from persyn_jax.streams import numpy_stream

StrategyName = Literal[
    "router",
    "strong",
    "mix",
    "family_strong",
    "car",
    "best_constant",
    "best_per_source",
    "knn",
    "clusters",
    "random",
    "oracle",
]


class Calibration(NamedTuple):
    """Prompts that all M teachers answered, row by row."""

    total_NM: np.ndarray
    """float64: total reward, finite."""
    source_N: Sequence[str]
    """The source of each prompt."""
    feature_ND: np.ndarray
    """float: what prompts are compared by; only the direction of a row counts."""
    quality_NM: np.ndarray | None = None
    """float64: not standardised; NaN where it is not known. `strong`, `mix`, `family_strong` and
    `car` need it."""
    learnability_NM: np.ndarray | None = None
    """float64: mean log-likelihood under the student, in nats; NaN for unusable answers. None where
    another metric was measured. `car` needs it."""


def make_calibration(
    id_N: Sequence[str],
    source_N: Sequence[str],
    rewards: Sequence[Reward],
    teachers: Sequence[str],
    feature_ND: np.ndarray,
    metric: MetricName,
) -> Calibration:
    """What the rewards of the prompts with these ids say. metric: what their learnability is."""
    likelihood_NM = None
    if metric == "mean_log_likelihood":
        usable = [reward for reward in rewards if reward.usable]
        likelihood_NM = reward_matrix(usable, id_N, teachers, "learnability", partial=True)
    return Calibration(
        total_NM=reward_matrix(rewards, id_N, teachers),
        source_N=source_N,
        feature_ND=feature_ND,
        quality_NM=reward_matrix(rewards, id_N, teachers, "quality"),
        learnability_NM=likelihood_NM,
    )


class Asked(NamedTuple):
    """The N prompts to be routed. A strategy says which of these it needs and lacks."""

    source_N: Sequence[str]
    feature_ND: np.ndarray | None = None
    """As in `Calibration`, for `knn` and `clusters`."""
    coefficient_NM: np.ndarray | None = None
    """The router's Bradley-Terry coefficients, for `router`."""
    total_NM: np.ndarray | None = None
    """True totals, for `oracle`: all teachers have to answer first."""


@config_class
class StrategyConfig:
    """What the strategies leave open."""

    neighbours: Annotated[int, Field(ge=1)] = 8
    """Seen prompts that `knn` looks at."""
    clusters: Annotated[int, Field(ge=1)] = 8
    """Groups of seen prompts that `clusters` makes."""
    strong: str | None = None
    """The strongest teacher, for `strong` and `mix`; null: the one of the highest mean quality."""
    mix_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of prompts that `mix` gives to the strong teacher. 1:4 is of arXiv 2502.12143; PerSyn's
    own ratio is not known."""
    family: list[str] = Field(default_factory=list)
    """Teachers of the student's family, for `family_strong`."""
    car_beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the loss in `car`. The paper's value is not known."""


def best_constant(total_NM: np.ndarray) -> int:
    """The teacher with the highest mean total: the best single teacher for everything."""
    return int(total_NM.mean(axis=0).argmax())


def best_per_source(total_NM: np.ndarray, source_N: Sequence[str]) -> dict[str, int]:
    """Source -> the teacher with the highest mean total on its prompts, in order of appearance."""
    means = _means_per_source(total_NM, source_N)
    return {source: int(mean_M.argmax()) for source, mean_M in means.items()}


def _means_per_source(total_NM: np.ndarray, source_N: Sequence[str]) -> dict[str, np.ndarray]:
    sources_N = np.asarray(source_N)
    return {
        source: total_NM[sources_N == source].mean(axis=0) for source in dict.fromkeys(source_N)
    }


def score_by_source(seen: Calibration, source_N: Sequence[str]) -> np.ndarray:
    """Mean totals on the seen prompts of the same source; of an unseen source, on all of them."""
    means = _means_per_source(seen.total_NM, seen.source_N)
    overall_M = seen.total_NM.mean(axis=0)
    score_NM = np.empty((len(source_N), len(overall_M)))
    for row, source in enumerate(source_N):
        score_NM[row] = means.get(source, overall_M)
    return score_NM


def score_by_neighbours(seen: Calibration, feature_ND: np.ndarray, neighbours: int) -> np.ndarray:
    """Mean totals on the nearest seen prompts (cosine).

    neighbours: how many, at least 1; all, where fewer prompts were seen.
    """
    nearest_Nk = _nearest(feature_ND, unit_rows(seen.feature_ND), neighbours)
    score_NM = np.zeros((len(feature_ND), seen.total_NM.shape[1]))
    for nearest_N in nearest_Nk.T:  # one neighbour at a time: no array of [N, k, M]
        score_NM += seen.total_NM[nearest_N]
    score_NM /= nearest_Nk.shape[1]
    return score_NM


def score_by_clusters(seen: Calibration, feature_ND: np.ndarray, clusters: int) -> np.ndarray:
    """Mean totals on the seen prompts of the nearest cluster (spherical k-means, no training)."""
    centre_KD, mean_KM = cluster_means(unit_rows(seen.feature_ND), seen.total_NM, clusters)
    return mean_KM[_nearest(feature_ND, centre_KD, 1)[:, 0]]


def _nearest(feature_ND: np.ndarray, unit_KD: np.ndarray, count: int) -> np.ndarray:
    """`nearest` of the rows at length 1, which are not all in memory at once."""
    starts = range(0, max(len(feature_ND), 1), CHUNK)
    parts = [nearest(unit_rows(feature_ND[n : n + CHUNK]), unit_KD, count) for n in starts]
    return np.concatenate(parts)


def car(quality_NM: np.ndarray, learnability_NM: np.ndarray, beta: float) -> np.ndarray:
    """CAR(D, theta) = r(D) / (1 + beta * L(D, theta)) of each teacher's answers, float64[M].

    arXiv 2411.07133: r(D) is the mean quality and L(D, theta) the student's mean loss, so minus
    the mean log-likelihood, each of the answers that have one. Raises ConfigError: a teacher
    without any known quality or any usable answer, a mean quality below 0 (more loss would then
    raise it), or 1 + beta * L not above 0, which no likelihood gives.
    """
    quality_M = mean_quality(quality_NM)
    if not np.isfinite(learnability_NM).any(axis=0).all():
        raise ConfigError("CAR needs a usable answer of every teacher")
    denominator_M = 1 - beta * np.nanmean(learnability_NM, axis=0)
    if not (denominator_M > 0).all():
        raise ConfigError("CAR needs mean log-likelihoods, which are at most 0")
    if (quality_M < 0).any():
        raise ConfigError("CAR needs mean qualities that are not below 0, as a verifier's are")
    return quality_M / denominator_M


def mean_quality(quality_NM: np.ndarray) -> np.ndarray:
    """Of each teacher's answers whose quality is known, float64[M]. Raises ConfigError if none."""
    known_NM = ~np.isnan(quality_NM)
    if not known_NM.any(axis=0).all():
        raise ConfigError("no quality is known of some teacher, so none is the strongest")
    return np.where(known_NM, quality_NM, 0).sum(axis=0) / known_NM.sum(axis=0)


def route_by_source(seen: Calibration, source_N: Sequence[str]) -> np.ndarray:
    """Each prompt to the best teacher of its source; of an unseen source, to the best constant."""
    return score_by_source(seen, source_N).argmax(axis=1)


def route_by_neighbours(seen: Calibration, feature_ND: np.ndarray, neighbours: int) -> np.ndarray:
    """Each prompt to the teacher with the highest mean total on its nearest seen prompts."""
    return score_by_neighbours(seen, feature_ND, neighbours).argmax(axis=1)


def route_by_oracle(total_NM: np.ndarray) -> np.ndarray:
    """Each prompt to the teacher with the highest total on it: the ceiling, knowing all answers."""
    return total_NM.argmax(axis=1)


def route_by_router(coefficient_NM: np.ndarray) -> np.ndarray:
    """Each prompt to the teacher with the highest Bradley-Terry coefficient (PerSyn's rule)."""
    return coefficient_NM.argmax(axis=1)


class Knowledge(NamedTuple):
    """All that a strategy may look at. Every [.., M] has the columns of `teachers`."""

    seen: Calibration
    asked: Asked
    teachers: Sequence[str]
    config: StrategyConfig
    seed: int


def _everywhere(score_M: np.ndarray, known: Knowledge) -> np.ndarray:
    return np.broadcast_to(score_M, (len(known.asked.source_N), len(known.teachers)))


def _router(known: Knowledge) -> np.ndarray:
    return _needed(known.asked.coefficient_NM, "router", "the router's coefficients")


def _oracle(known: Knowledge) -> np.ndarray:
    return _needed(known.asked.total_NM, "oracle", "the answers of all teachers to every prompt")


def _strong(known: Knowledge) -> np.ndarray:
    return _everywhere(_strength(known), known)


def _strength(known: Knowledge) -> np.ndarray:
    """Mean quality, float64[M]; the teacher that the config calls strong comes first."""
    quality_M = mean_quality(_needed(known.seen.quality_NM, "strong", "the quality of answers"))
    if known.config.strong is not None:
        quality_M[_column(known, "strong", known.config.strong)] = quality_M.max() + 1
    return quality_M


def _mix(known: Knowledge) -> np.ndarray:
    """The strong teacher on a drawn `mix_share` of the prompts, each other prompt to one drawn from
    the rest; the counts are exact."""
    prompts, teachers = len(known.asked.source_N), len(known.teachers)
    rng = numpy_stream(known.seed, "strategy mix")
    strong = _strength(known).argmax()
    score_NM = rng.random((prompts, teachers))
    order_N = rng.permutation(prompts)
    with_strong = round(known.config.mix_share * prompts)
    score_NM[order_N[:with_strong], strong] += 1
    score_NM[order_N[with_strong:], strong] -= 1
    return score_NM


def _family_strong(known: Knowledge) -> np.ndarray:
    if not known.config.family:
        raise ConfigError("strategy family_strong: family must name teachers of the student's own")
    family = [_column(known, "family", name) for name in known.config.family]
    quality_NM = _needed(known.seen.quality_NM, "family_strong", "the quality of answers")
    score_M = mean_quality(quality_NM)
    score_M[family] += 1 + score_M.max() - score_M.min()  # all of the family before all others
    return _everywhere(score_M, known)


def _car(known: Knowledge) -> np.ndarray:
    quality_NM = _needed(known.seen.quality_NM, "car", "the quality of answers")
    what = "mean log-likelihoods (rewards.learnability: mean_log_likelihood)"
    learnability_NM = _needed(known.seen.learnability_NM, "car", what)
    return _everywhere(car(quality_NM, learnability_NM, known.config.car_beta), known)


def _best_constant(known: Knowledge) -> np.ndarray:
    return _everywhere(known.seen.total_NM.mean(axis=0), known)


def _best_per_source(known: Knowledge) -> np.ndarray:
    return score_by_source(known.seen, known.asked.source_N)


def _knn(known: Knowledge) -> np.ndarray:
    feature_ND = _needed(known.asked.feature_ND, "knn", "features of the prompts")
    return score_by_neighbours(known.seen, feature_ND, known.config.neighbours)


def _clusters(known: Knowledge) -> np.ndarray:
    feature_ND = _needed(known.asked.feature_ND, "clusters", "features of the prompts")
    return score_by_clusters(known.seen, feature_ND, known.config.clusters)


def _random(known: Knowledge) -> np.ndarray:
    shape = len(known.asked.source_N), len(known.teachers)
    return numpy_stream(known.seed, "strategy random").random(shape)


STRATEGIES: dict[StrategyName, Callable[[Knowledge], np.ndarray]] = {
    "router": _router,
    "strong": _strong,
    "mix": _mix,
    "family_strong": _family_strong,
    "car": _car,
    "best_constant": _best_constant,
    "best_per_source": _best_per_source,
    "knn": _knn,
    "clusters": _clusters,
    "random": _random,
    "oracle": _oracle,
}


def _needed(values: np.ndarray | None, strategy: str, what: str) -> np.ndarray:
    if values is None:
        raise ConfigError(f"strategy {strategy}: needs {what}, which are not there")
    return values


def _column(known: Knowledge, key: str, teacher: str) -> int:
    if teacher not in known.teachers:
        allowed = ", ".join(known.teachers)
        raise ConfigError(f"{key}: no teacher {teacher!r} may be asked, only {allowed}")
    return list(known.teachers).index(teacher)
