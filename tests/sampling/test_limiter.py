"""The limit of an endpoint, on a clock of the test's own."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.sampling import limiter
from persyn_jax.sampling.limiter import Limit, answered, begun, ended, failed, fresh, has_room


def after_answers(limit: Limit, count: int) -> Limit:
    for _ in range(count):
        limit = ended(answered(begun(limit)))
    return limit


def after_overload(limit: Limit, now: float = 0.0, **how) -> Limit:
    return ended(failed(begun(limit), limit.era, now, overload=True, **how))


def test_starts_with_a_few_and_reaches_the_most_quickly_while_nothing_is_too_much():
    limit = fresh(32)
    assert limit.allowed == 4
    assert after_answers(limit, 28).allowed == 32
    assert after_answers(limit, 1000).allowed == 32
    assert fresh(2).allowed == 2


def test_halves_once_for_all_the_requests_that_were_under_way_together():
    limit = after_answers(fresh(32), 28)
    era = limit.era
    for _ in range(32):
        limit = begun(limit)
    for _ in range(32):
        limit = ended(failed(limit, era, 0.0, overload=True))
    assert (limit.allowed, limit.under_way) == (16, 0)
    assert after_overload(limit).allowed == 8


def test_after_an_overload_each_window_of_answers_allows_one_more():
    limit = after_overload(after_overload(after_answers(fresh(32), 28)))
    assert (limit.allowed, limit.ceiling) == (8, 16)
    for allowed in range(8, 14):
        assert after_answers(limit, allowed - 1).allowed == allowed
        limit = after_answers(limit, allowed)
        assert limit.allowed == allowed + 1


def test_the_ceiling_is_approached_slowly_and_passed_if_it_holds():
    limit = after_answers(after_overload(after_answers(fresh(8), 4)), 4 + 5 + 6)
    assert (limit.allowed, limit.ceiling) == (7, 8)
    assert after_answers(limit, 7 * 8 - 1).allowed == 7
    assert after_answers(limit, 7 * 8).allowed == 8


def test_an_endpoint_that_fails_one_at_a_time_rests_for_longer_and_longer():
    limit, now, rests = fresh(1), 100.0, []
    for _ in range(8):
        limit = after_overload(limit, now)
        assert not has_room(limit, limit.rest_until - 1e-6)
        assert has_room(limit, limit.rest_until)
        rests.append(limit.rest_until - now)
        now = limit.rest_until
    assert rests == pytest.approx([0.5, 1, 2, 4, 8, 10, 10, 10])
    limit = after_overload(after_answers(limit, 1), now)
    assert limit.rest_until - now == 0.5


@pytest.mark.parametrize(("asked", "waited"), [(7.0, 7.0), (0.0, 0.0), (1e9, 60.0), (math.inf, 60)])
def test_retry_after_is_honoured_up_to_a_minute(asked, waited):
    limit = after_overload(fresh(8), now=100.0, retry_after=asked)
    assert limit.rest_until == 100.0 + waited
    stale = failed(limit, limit.era - 1, 101.0, overload=True, retry_after=asked)
    assert stale.rest_until == 101.0 + waited
    assert stale.allowed == limit.allowed


def test_replies_that_are_no_good_lower_nothing_unless_there_are_many_in_a_row():
    limit = fresh(8)
    for _ in range(9):
        limit = failed(limit, limit.era, 0.0, overload=False)
    assert (limit.allowed, limit.rest_until) == (4, -math.inf)
    assert answered(limit).failures == 0
    broken = failed(limit, limit.era, 0.0, overload=False)
    assert (broken.allowed, broken.rest_until) == (1, 0.5)
    assert failed(broken, broken.era, 1.0, overload=False).rest_until == 2.0


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "answer", "overload", "broken"]),
        st.floats(0, 100),
        st.none() | st.floats(0, 1e6),
    ),
    max_size=100,
)


@given(most=st.integers(1, 16), events=EVENTS)
def test_whatever_happens_it_stays_within_its_bounds_and_recovers(most, events):
    limit, now, eras = fresh(most), 0.0, []
    for event, seconds, retry_after in events:
        now += seconds
        if event == "begin":
            if has_room(limit, now):
                limit = begun(limit)
                eras.append(limit.era)
        elif eras and event == "answer":
            eras.pop()
            limit = ended(answered(limit))
        elif eras:
            before = limit.allowed
            limit = ended(failed(limit, eras.pop(), now, event == "overload", retry_after))
            assert limit.allowed <= before
            assert limit.rest_until <= now + limiter.MOST_RETRY_AFTER_SECONDS
        assert 1 <= limit.allowed <= most
        assert 0 <= limit.under_way == len(eras) <= most
    for _ in eras:
        limit = ended(limit)
    assert has_room(limit, now + limiter.MOST_RETRY_AFTER_SECONDS)
    assert after_answers(limit, 16 * 16 + 8 * 16).allowed == most
