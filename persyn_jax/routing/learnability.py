"""Learnability: how well an answer suits a student, from what the student says of its tokens.

The raw columns of an answer (`TokenScores`) are measured and stored once. Every metric is a pure
function of them, so another choice among metrics of the same columns costs no forward pass:

    metric               columns                      better   forward passes for its columns
    mean_log_likelihood  log_likelihood               higher   one over prompt and answer
    grape                log_likelihood               higher   the same one
    rsr                  log_likelihood, rank         lower    the same one
    ifd                  log_likelihood, unconditional  lower  one more, over the answer alone
    local_naturalness    local, step                  higher   one a step, after prompt and window

`higher_is_better` turns the sign where lower is better, as rewards take higher for better.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RANK_LIMIT = 100
"""r_max of the rank-surprisal ratio (arXiv 2601.14249)."""
LEAST_LOSS = 1e-6
"""Nats a token: a loss that is divided by counts as at least this, so a student that is certain of
every token gives a large finite ratio."""

MetricName = Literal["mean_log_likelihood", "grape", "rsr", "ifd", "local_naturalness"]


@dataclass(frozen=True)
class TokenScores:
    """What the student says of the T tokens of one answer, EOS included if it was generated.

    Arrays of shape [T], T at least 1. A column that was not computed is None.
    Raises ValueError: no token, columns of different lengths, a log-probability above 0 or not
    finite, a rank below 1.
    """

    log_likelihood_T: np.ndarray | None = None
    """log p(y_t | x, y_<t), in nats."""
    rank_T: np.ndarray | None = None
    """int: 1 + the number of tokens that are likelier than y_t there."""
    unconditional_T: np.ndarray | None = None
    """log p(y_t | y_<t), without the prompt x."""
    local_T: np.ndarray | None = None
    """log p(y_t | x, a few steps before y_t's own, and what stands before y_t in its own)."""
    step_T: np.ndarray | None = None
    """int: the step (sentence, line) that the token belongs to, from 0 without gaps."""

    def __post_init__(self):
        given = {name: np.asarray(v) for name, v in vars(self).items() if v is not None}
        shapes = {values_T.shape for values_T in given.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1 or not next(iter(shapes))[0]:
            found = {name: values_T.shape for name, values_T in given.items()}
            raise ValueError(f"token scores need columns of one length, at least 1; got {found}")
        for name in ("log_likelihood_T", "unconditional_T", "local_T"):
            if name in given and not (np.isfinite(given[name]) & (given[name] <= 0)).all():
                raise ValueError(f"{name}: log-probabilities must be finite and at most 0")
        if "rank_T" in given and (given["rank_T"] < 1).any():
            raise ValueError("rank_T: the likeliest token has rank 1, and none a lower one")
        if "step_T" in given:
            steps_T = given["step_T"]
            if steps_T[0] != 0 or not np.isin(np.diff(steps_T), (0, 1)).all():
                raise ValueError("step_T: steps are numbered from 0, in order and without gaps")


def mean_log_likelihood(log_likelihood_T: ArrayLike) -> float:
    """PerSyn eq. 1: r_l(y) = 1/|y| sum_t log p(y_t | x, y_<t), in nats. Higher is better."""
    return float(np.asarray(log_likelihood_T, dtype=np.float64).mean())


def grape(log_likelihood_T: ArrayLike) -> float:
    """GRAPE (arXiv 2502.04194): the length-normalised probability p(y | x)^(1/|y|), in (0, 1].

    It is exp of `mean_log_likelihood`: the same order of answers, other distances between them.
    (Others who compare with GRAPE take the logarithm, and then it is `mean_log_likelihood`.)
    Higher is better.
    """
    return float(np.exp(mean_log_likelihood(log_likelihood_T)))


def rsr(log_likelihood_T: ArrayLike, rank_T: ArrayLike, rank_limit: int = RANK_LIMIT) -> float:
    """Rank-surprisal ratio (arXiv 2601.14249, eq. 1, 2, 7). Lower is better.

    RSR(y) = sum_t min(Rank(y_t), r_max) / sum_t Surprisal(y_t), with
    Surprisal(y_t) = -log p(y_t | x, y_<t) and Rank(y_t) = 1 + |{v: p(v) > p(y_t)}|.
    Low where tokens are informative (surprising) yet not far from what the student would say.
    """
    surprisal_T = -np.asarray(log_likelihood_T, dtype=np.float64)
    ranks = np.minimum(rank_T, rank_limit).sum(dtype=np.float64)
    return float(ranks / max(surprisal_T.sum(), LEAST_LOSS * surprisal_T.size))


def ifd(log_likelihood_T: ArrayLike, unconditional_T: ArrayLike) -> float:
    """Instruction-following difficulty (arXiv 2308.12032; a baseline of arXiv 2411.07133).

    IFD(y) = L(y | x) / L(y), the mean loss with the prompt over the mean loss without it. At 1 or
    above the prompt does not help. Lower is better here: it is easier to learn. (Its authors keep
    the highest below 1 when they choose among prompts, as the most instructive.)
    """
    without_prompt = max(-mean_log_likelihood(unconditional_T), LEAST_LOSS)
    return -mean_log_likelihood(log_likelihood_T) / without_prompt


def local_naturalness(local_T: ArrayLike, step_T: ArrayLike) -> float:
    """Local naturalness, or LALP (arXiv 2510.03988). Higher is better.

    LN(y) = 1/S sum_s 1/|s| sum_{t in s} log p(y_t | x, w_s, y_<t in s), w_s being the few steps
    before step s: every step counts alike, however long. With one step it is
    `mean_log_likelihood`.
    """
    tokens_S = np.bincount(step_T)
    sums_S = np.bincount(step_T, weights=np.asarray(local_T, dtype=np.float64))
    return float((sums_S / tokens_S).mean())


class Metric(NamedTuple):
    """A metric, the fields of `TokenScores` that it takes in this order, and its direction."""

    function: Callable[..., float]
    columns: tuple[str, ...]
    sign: Literal[1, -1]
    """1 where higher is better, -1 where lower is."""


METRICS: dict[MetricName, Metric] = {
    "mean_log_likelihood": Metric(mean_log_likelihood, ("log_likelihood_T",), 1),
    "grape": Metric(grape, ("log_likelihood_T",), 1),
    "rsr": Metric(rsr, ("log_likelihood_T", "rank_T"), -1),
    "ifd": Metric(ifd, ("log_likelihood_T", "unconditional_T"), -1),
    "local_naturalness": Metric(local_naturalness, ("local_T", "step_T"), 1),
}


def metrics(scores: TokenScores) -> dict[MetricName, float]:
    """Every metric whose columns were all measured, each in its paper's own direction."""
    found: dict[MetricName, float] = {}
    for name, metric in METRICS.items():
        columns = [getattr(scores, column) for column in metric.columns]
        if all(values_T is not None for values_T in columns):
            found[name] = metric.function(*columns)
    return found


def higher_is_better(name: MetricName, value: float) -> float:
    """The metric's `value`, its sign turned where lower is better: an answer's learnability."""
    return METRICS[name].sign * value
