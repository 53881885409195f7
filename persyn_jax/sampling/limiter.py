"""How many requests an endpoint may have at once: more while it answers, fewer when it is too much.

Additive increase, multiplicative decrease, as in TCP. Pure functions of a `Limit`, and of a clock
that the caller reads; times are seconds of that clock.
"""

import math
from dataclasses import dataclass, replace

START = 4
"""Requests at once before anything is known."""
FIRST_REST_SECONDS = 0.5
MOST_REST_SECONDS = 10.0
"""Of an endpoint that names no time. Doubles from the first to this while nothing is answered."""
MOST_RETRY_AFTER_SECONDS = 60.0
"""An endpoint that asks for more is asked again after this all the same."""
_BROKEN_IN_A_ROW = 10  # failures that are nobody's overload, until the endpoint counts as broken
_NEAR_CEILING = 8  # times as many answers are needed to reach the ceiling again


@dataclass(frozen=True)
class Limit:
    """What is known of one endpoint."""

    most: int
    """`allowed` never exceeds this."""
    allowed: int
    """Requests that may be under way at once, at least 1."""
    under_way: int = 0
    ceiling: int | None = None
    """What was allowed when it last was too much; null while it never was."""
    answers: int = 0
    """Since `allowed` last changed."""
    era: int = 0
    """Number of decreases. A request that began in an earlier era says nothing of this one."""
    failures: int = 0
    """In a row, in this era."""
    rests: int = 0
    """In a row, with no answer between them."""
    rest_until: float = -math.inf


def fresh(most: int) -> Limit:
    """The limit of an endpoint that was never asked."""
    return Limit(most=most, allowed=min(START, most))


def has_room(limit: Limit, now: float) -> bool:
    """Whether one more request may begin."""
    return limit.under_way < limit.allowed and now >= limit.rest_until


def begun(limit: Limit) -> Limit:
    """One more request is under way; it belongs to `limit.era`."""
    return replace(limit, under_way=limit.under_way + 1)


def ended(limit: Limit) -> Limit:
    """One request is under way no more, whatever became of it."""
    return replace(limit, under_way=limit.under_way - 1)


def answered(limit: Limit) -> Limit:
    """An answer came: one more is allowed after each window of answers.

    A window is one answer while nothing ever was too much; then as many as are allowed, and eight
    times that where one more would reach the ceiling.
    """
    if limit.ceiling is None:
        window = 1
    elif limit.allowed + 1 == limit.ceiling:
        window = _NEAR_CEILING * limit.allowed
    else:
        window = limit.allowed
    limit = replace(limit, answers=limit.answers + 1, failures=0, rests=0)
    if limit.answers < window or limit.allowed == limit.most:
        return limit
    return replace(limit, allowed=limit.allowed + 1, answers=0)


def failed(
    limit: Limit, era: int, now: float, overload: bool, retry_after: float | None = None
) -> Limit:
    """A request of `era` failed: half as many are allowed, once an era.

    overload: whether it was too much for the endpoint, or the endpoint was not there. Other
    failures count only when there are many in a row; the endpoint is broken then. It rests for
    `retry_after` seconds if it said so, and by itself when it fails with one request at a time.
    """
    if retry_after is not None:
        rest_until = now + min(max(retry_after, 0.0), MOST_RETRY_AFTER_SECONDS)
        limit = replace(limit, rest_until=max(limit.rest_until, rest_until))
    if era != limit.era:
        return limit
    broken = not overload and (limit.rests > 0 or limit.failures + 1 == _BROKEN_IN_A_ROW)
    if not overload and not broken:
        return replace(limit, failures=limit.failures + 1)
    if limit.allowed == 1 or broken:
        rest = min(FIRST_REST_SECONDS * 2.0 ** min(limit.rests, 30), MOST_REST_SECONDS)
        limit = replace(limit, rests=limit.rests + 1, rest_until=max(limit.rest_until, now + rest))
    return replace(
        limit,
        allowed=1 if broken else max(1, limit.allowed // 2),
        ceiling=limit.allowed if limit.allowed > 1 else limit.ceiling or 1,
        answers=0,
        era=limit.era + 1,
        failures=0,
    )
