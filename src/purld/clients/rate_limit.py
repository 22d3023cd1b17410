"""Decide when the next call may be sent: requests and tokens per minute, requested pauses, and back-off."""

from __future__ import annotations

import random

FIRST_WAIT = 1.0  # seconds before the first repeat; doubled each time
LONGEST_WAIT = 60.0


class RateLimiter:
    """A limiter that spreads calls evenly over time; the caller passes the time in seconds of a monotonic clock."""

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        self._per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_start = 0.0
        self._paused_until = 0.0  # separate from _next_start, so that returned tokens do not shorten a pause

    def reserve_start(self, tokens: int, now: float) -> float:
        """Reserve the next start for a call of at most `tokens`, and return the seconds to wait for it."""
        start = max(self._next_start, self._paused_until, now)
        self._next_start = start + max(self._per_request, tokens * self._per_token)
        return start - now

    def return_tokens(self, tokens: int, used: int) -> None:
        """Correct a reservation of `tokens` after the call, if it used fewer."""
        excess = max(self._per_request, tokens * self._per_token) - max(self._per_request, used * self._per_token)
        self._next_start -= max(0.0, excess)

    def pause(self, seconds: float, now: float) -> None:
        """Start no call for `seconds`, at most LONGEST_WAIT, because the endpoint reported overload."""
        self._paused_until = max(self._paused_until, now + min(seconds, LONGEST_WAIT))


def backoff_seconds(attempt: int, retry_after: float | None) -> float:
    """Return the seconds to wait before retry number `attempt` (from 0), with jitter so that callers spread out.

    It is never less than without `retry_after`: an overloaded server may ask for no wait at all.
    """
    wait = random.uniform(0.5, 1.0) * min(FIRST_WAIT * 2.0**attempt, LONGEST_WAIT)
    if retry_after is None:
        return wait
    return max(wait, min(retry_after, LONGEST_WAIT) + random.uniform(0.0, FIRST_WAIT))
