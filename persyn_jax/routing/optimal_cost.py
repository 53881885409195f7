"""The best routes under a budget over a whole set of prompts, and what any budget would buy.

Each prompt takes one teacher; a route has an expected reward and a cost, in tokens or money. With
fractions of prompts allowed this is a linear programme, and its best value as a function of the
budget is concave and made of straight pieces. `pareto_curve` finds all pieces at once: on each
prompt the teachers on the upper concave hull of (cost, reward), and the steps between them of all
prompts together in order of reward per cost. Where a step ends every prompt has one whole teacher,
and those routes are the best at their cost: each is argmax reward - lambda * cost, lambda being the
slope there.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

_CHUNK = 10_000  # prompts looked at together, so that what is computed on the way stays small
_PROMPT, _TEACHER = np.int32, np.int16  # there are several steps a prompt


class ParetoCurve(NamedTuple):
    """Where the curve begins, and its S steps, each of which moves one prompt to another teacher.

    Rewards and costs are totals over the prompts.
    """

    cheapest_N: np.ndarray
    """int: the cheapest teacher of each prompt, the best of those if several cost the same."""
    prompt_S: np.ndarray
    """int: the prompt that a step moves."""
    teacher_S: np.ndarray
    """int: the teacher that it moves it to."""
    cost_K: np.ndarray
    """float64[S + 1]: of the routes after 0, 1, ... steps; increasing."""
    reward_K: np.ndarray
    """float64[S + 1]; increasing, by less and less per cost."""


def pareto_curve(reward_NM: np.ndarray, cost_NM: np.ndarray) -> ParetoCurve:
    """The whole curve, from the cheapest routes to the best ones.

    reward_NM: expected reward; -inf where a teacher may not be asked.
    cost_NM: finite, at least 0, in any unit.

    Raises ValueError: shapes differ, a NaN, a cost that is negative or infinite, a prompt that no
    teacher may be asked.
    """
    reward_NM, cost_NM = _checked(reward_NM, cost_NM)
    cheapest_N = np.zeros(len(reward_NM), int)
    rounds: list[list[tuple[np.ndarray, ...]]] = [[] for _ in range(reward_NM.shape[1])]
    for start in range(0, len(reward_NM), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        cheapest_N[chunk] = _cheapest(reward_NM[chunk], cost_NM[chunk])
        steps = _steps(reward_NM[chunk], cost_NM[chunk], cheapest_N[chunk])
        for moved, (rows, teacher_N, slope_N) in zip(rounds, steps, strict=False):
            moved.append(((rows + start).astype(_PROMPT), teacher_N.astype(_TEACHER), slope_N))
    return _in_order_of_slope(reward_NM, cost_NM, cheapest_N, list(chain.from_iterable(rounds)))


def _steps(
    reward_NM: np.ndarray, cost_NM: np.ndarray, cheapest_N: np.ndarray
) -> Iterator[tuple[np.ndarray, ...]]:
    """The first step of each prompt that has one, the second, ...: (prompts, teachers, slopes)."""
    rows, here_N = np.arange(len(reward_NM)), cheapest_N
    slope_N = np.full(len(rows), np.inf)
    while rows.size:
        more_cost_NM = cost_NM[rows] - cost_NM[rows, here_N][:, None]
        more_reward_NM = reward_NM[rows] - reward_NM[rows, here_N][:, None]
        slope_NM = np.full(more_cost_NM.shape, -np.inf)
        better_NM = (more_cost_NM > 0) & (more_reward_NM > 0)
        np.divide(more_reward_NM, more_cost_NM, out=slope_NM, where=better_NM)
        # Of equal slopes the longest step: the points between lie on it.
        steepest_NM = slope_NM == slope_NM.max(axis=1, keepdims=True)
        next_N = np.where(steepest_NM, more_cost_NM, -np.inf).argmax(axis=1)
        going_N = better_NM.any(axis=1)
        taken_N = np.minimum(slope_NM[np.arange(len(rows)), next_N], slope_N)  # rounding aside, <
        rows, here_N, slope_N = rows[going_N], next_N[going_N], taken_N[going_N]
        if rows.size:
            yield rows, here_N, slope_N


def _in_order_of_slope(
    reward_NM: np.ndarray, cost_NM: np.ndarray, cheapest_N: np.ndarray, moved: list
) -> ParetoCurve:
    empty = (np.zeros(0, _PROMPT), np.zeros(0, _TEACHER), np.zeros(0))
    prompt_S, teacher_S, slope_S = map(np.concatenate, zip(empty, *moved, strict=True))
    order_S = np.argsort(-slope_S, kind="stable")  # stable: a prompt's own steps stay in order
    prompt_S, teacher_S = prompt_S[order_S], teacher_S[order_S]

    before_S = _teacher_before(prompt_S, teacher_S, cheapest_N)
    rows = np.arange(len(cheapest_N))

    def totals(value_NM: np.ndarray) -> np.ndarray:
        steps_S = value_NM[prompt_S, teacher_S] - value_NM[prompt_S, before_S]
        return value_NM[rows, cheapest_N].sum() + np.concatenate([[0.0], np.cumsum(steps_S)])

    return ParetoCurve(cheapest_N, prompt_S, teacher_S, totals(cost_NM), totals(reward_NM))


def _teacher_before(
    prompt_S: np.ndarray, teacher_S: np.ndarray, cheapest_N: np.ndarray
) -> np.ndarray:
    by_prompt_S = np.argsort(prompt_S, kind="stable")
    sorted_prompt_S, sorted_teacher_S = prompt_S[by_prompt_S], teacher_S[by_prompt_S]
    first_S = np.r_[True, sorted_prompt_S[1:] != sorted_prompt_S[:-1]][: len(prompt_S)]
    previous_S = np.roll(sorted_teacher_S, 1)
    before_S = np.empty_like(teacher_S)
    before_S[by_prompt_S] = np.where(first_S, cheapest_N[sorted_prompt_S], previous_S)
    return before_S


def routes_after(curve: ParetoCurve, steps: int) -> np.ndarray:
    """int[N]: the teacher of each prompt after so many steps of the curve."""
    teacher_N = curve.cheapest_N.copy()
    teacher_N[curve.prompt_S[:steps]] = curve.teacher_S[:steps]  # a later step overwrites
    return teacher_N


def steps_within(curve: ParetoCurve, budget: float) -> int:
    """The most steps of which the routes cost no more than `budget`.

    Raises ValueError where the cheapest routes cost more.
    """
    if curve.cost_K[0] > budget:
        raise ValueError(
            f"a budget of {budget:g} is too small: the cheapest routes cost {curve.cost_K[0]:g}"
        )
    return int(np.searchsorted(curve.cost_K, budget, side="right")) - 1


def most_reward(curve: ParetoCurve, budget: float) -> float:
    """The best total reward under `budget` if a prompt could be shared: the linear programme's.

    No routes that cost at most `budget` have more. Raises ValueError as `steps_within` does.
    """
    steps_within(curve, budget)
    return float(np.interp(budget, curve.cost_K, curve.reward_K))


def optimal_routes(reward_NM: np.ndarray, cost_NM: np.ndarray, budget: float) -> np.ndarray:
    """int[N]: routes that cost at most `budget`, and have nearly the highest expected reward.

    Steps of the curve are taken in order while they fit; one that does not is passed over, with
    the later ones of its prompt, and cheaper ones may follow. So the total reward lies below
    `most_reward` by less than the reward of one step. Raises ValueError as `pareto_curve` and
    `steps_within` do.
    """
    curve = pareto_curve(reward_NM, cost_NM)
    steps = steps_within(curve, budget)
    teacher_N = routes_after(curve, steps)
    spent = _total(cost_NM, teacher_N)
    step_cost_S = np.diff(curve.cost_K)
    stuck: set[int] = set()
    # No step below fits from the place on where even the cheapest remaining one is too dear.
    least_left_S = np.minimum.accumulate(step_cost_S[::-1])[::-1]
    for step in range(steps, len(step_cost_S)):
        if least_left_S[step] > budget - spent:
            break
        prompt = int(curve.prompt_S[step])
        dearer = cost_NM[prompt, curve.teacher_S[step]] - cost_NM[prompt, teacher_N[prompt]]
        if prompt in stuck or spent + dearer > budget:
            stuck.add(prompt)
            continue
        teacher_N[prompt] = curve.teacher_S[step]
        spent += dearer
    return teacher_N


def thin(curve: ParetoCurve, points: int) -> list[dict[str, float]]:
    """At most `points` (at least 2) of the curve's points as {cost, reward}, for a table or a plot:
    about evenly spaced in cost, both ends among them."""
    wanted = np.linspace(curve.cost_K[0], curve.cost_K[-1], points)
    steps_K = np.unique(np.searchsorted(curve.cost_K, wanted, side="right") - 1)
    return [{"cost": float(curve.cost_K[k]), "reward": float(curve.reward_K[k])} for k in steps_K]


def expected_usd(
    prompt_tokens_NM: np.ndarray,
    answer_tokens_NM: np.ndarray,
    usd_per_million_prompt_tokens: Sequence[float | None],
    usd_per_million_answer_tokens: Sequence[float | None],
    teachers: Sequence[str],
) -> np.ndarray:
    """What each answer will cost, float64[N, M] in US dollars.

    prompt_tokens_NM, answer_tokens_NM: expected, of each prompt as each teacher counts it. Prices
    run parallel to `teachers`; raises ValueError where one is not known.
    """
    prices = usd_per_million_prompt_tokens, usd_per_million_answer_tokens
    for teacher, *of_teacher in zip(teachers, *prices, strict=True):
        if None in of_teacher:
            raise ValueError(f"the price of teacher {teacher!r} is not known, so no budget can be")
    prompt_M, answer_M = (np.array(price, np.float64) for price in prices)
    return (prompt_tokens_NM * prompt_M + answer_tokens_NM * answer_M) / 1e6


def _cheapest(reward_NM: np.ndarray, cost_NM: np.ndarray) -> np.ndarray:
    allowed_NM = reward_NM > -np.inf
    cost_NM = np.where(allowed_NM, cost_NM, np.inf)
    least_NM = allowed_NM & (cost_NM == cost_NM.min(axis=1, keepdims=True))
    return np.where(least_NM, reward_NM, -np.inf).argmax(axis=1)


def _total(value_NM: np.ndarray, teacher_N: np.ndarray) -> float:
    return float(value_NM[np.arange(len(teacher_N)), teacher_N].sum())


def _checked(reward_NM: np.ndarray, cost_NM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    reward_NM, cost_NM = np.asarray(reward_NM, np.float64), np.asarray(cost_NM, np.float64)
    if reward_NM.ndim != 2 or reward_NM.shape != cost_NM.shape:
        raise ValueError(
            f"rewards and costs must both be [N, M]; got {reward_NM.shape}, {cost_NM.shape}"
        )
    if not (np.isfinite(cost_NM) & (cost_NM >= 0)).all():
        raise ValueError("costs must be finite and at least 0")
    if not (reward_NM < np.inf).all():
        raise ValueError("expected rewards must be numbers, or -inf where a teacher is left out")
    nobody_N = ~(reward_NM > -np.inf).any(axis=1)
    if nobody_N.any():
        raise ValueError(f"prompt {int(nobody_N.argmax())}: every teacher is left out")
    return reward_NM, cost_NM
