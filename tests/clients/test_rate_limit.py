"""Start times and waits, with an explicit clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purld.clients.faults import parse_retry_after
from purld.clients.rate_limit import FIRST_WAIT, LONGEST_WAIT, RateLimiter, backoff_seconds


def test_requests_leave_evenly():
    limiter = RateLimiter(requests_per_minute=30, tokens_per_minute=None)
    assert [limiter.reserve_start(1000, now=0.0) for _ in range(3)] == [0.0, 2.0, 4.0]
    assert limiter.reserve_start(1000, now=100.0) == 0.0, "idle time is not saved up for a burst"


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1)), min_size=2, max_size=30))
def test_no_more_tokens_are_used_than_the_rate_allows(calls):
    limiter, now, departed = RateLimiter(None, 6000), 0.0, []
    for tokens, share in calls:
        now += limiter.reserve_start(tokens, now)
        departed.append((now, used := int(tokens * share)))
        limiter.return_tokens(tokens, used)
    sent_before_last = sum(used for _, used in departed[:-1])
    assert departed[-1][0] >= sent_before_last / 100 - 1e-6


def test_without_limits_nothing_waits_until_a_pause():
    limiter = RateLimiter(None, None)
    assert limiter.reserve_start(10**9, now=5.0) == limiter.reserve_start(10**9, now=5.0) == 0.0
    limiter.pause(3.0, now=5.0)
    assert limiter.reserve_start(1, now=6.0) == 2.0
    limiter.pause(10**6, now=10.0)
    assert limiter.reserve_start(1, now=10.0) == LONGEST_WAIT


def test_tokens_given_back_do_not_shorten_a_pause():
    limiter = RateLimiter(None, 600)
    limiter.reserve_start(300, now=0.0)
    limiter.pause(20.0, now=1.0)
    limiter.return_tokens(300, used=0)
    assert limiter.reserve_start(1, now=1.0) == 20.0


@pytest.mark.parametrize("attempt", [0, 1, 5, 50])
def test_back_off_doubles_within_bounds_and_is_jittered(attempt):
    full = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
    waits = [backoff_seconds(attempt, None) for _ in range(200)]
    assert full / 2 <= min(waits) < max(waits) <= full
    assert len(set(waits)) > 100
    assert max(7, full / 2) <= backoff_seconds(attempt, 7.0) <= max(7 + FIRST_WAIT, full)
    assert backoff_seconds(attempt, 0.0) >= full / 2, "a server that asks for no wait is not asked in a flood"
    assert LONGEST_WAIT <= backoff_seconds(attempt, 1e9) <= LONGEST_WAIT + FIRST_WAIT


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("-3", None),
        ("soon", None),
        ("", None),
        ("9" * 400, float("inf")),
    ],
)
def test_retry_after(text, seconds):
    assert parse_retry_after({"retry-after": text}, now=10.0) == seconds


@pytest.mark.parametrize("now", [0.0, 100.0, 1e9])
def test_a_date_to_wait_for_is_reckoned_by_the_servers_own_clock(now):
    headers = {"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT", "date": "Thu, 01 Jan 1970 00:01:30 GMT"}
    assert parse_retry_after(headers, now) == 10.0
    assert parse_retry_after({**headers, "retry-after": "3"}, now) == 3.0
    assert parse_retry_after({**headers, "date": "today"}, now) == max(0.0, 100.0 - now)
