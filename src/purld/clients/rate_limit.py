"""When the next call may leave: requests and tokens per minute, pauses that an endpoint asked for, back-off."""

from __future__ import annotations

import random

FIRST_WAIT = 1.0  # seconds before the first repeat; doubled each time
LONGEST_WAIT = 60.0


class RateLimiter:
    """Spreads calls evenly over time. Times are seconds of one monotonic clock, handed in by the caller."""

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        self._per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._free = 0.0
        self._paused = 0.0  # kept apart, so that tokens given back do not shorten a pause

    def book(self, tokens: int, now: float) -> float:
        """Book the next departure, of a call of at most `tokens`, and return how long to wait for it."""
        departure = max(self._free, self._paused, now)
        self._free = departure + max(self._per_request, tokens * self._per_token)
        return departure - now

    def give_back(self, tokens: int, used: int) -> None:
        """Correct the booking of a call that used fewer tokens than it might have."""
        cut = max(self._per_request, tokens * self._per_token) - max(self._per_request, used * self._per_token)
        self._free -= max(0.0, cut)

    def pause(self, seconds: float, now: float) -> None:
        """Let nothing leave for so long: the endpoint said that it is too much."""
        self._paused = max(self._paused, now + min(seconds, LONGEST_WAIT))


def backoff_seconds(attempt: int, retry_after: float | None) -> float:
    """Seconds before repeat number `attempt` (from 0): jittered, so that callers do not come back in step."""
    if retry_after is not None:
        return min(retry_after, LONGEST_WAIT) + random.uniform(0.0, FIRST_WAIT)
    return random.uniform(0.5, 1.0) * min(FIRST_WAIT * 2.0**attempt, LONGEST_WAIT)
