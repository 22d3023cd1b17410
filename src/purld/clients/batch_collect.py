"""Read the files of a batch that has ended into the ledger, line by line.

A line is settled durably before its answer is used, so that a process killed while it reads goes on where it was. A
request without a line is `failed` if the endpoint's counts say that it was not executed. If they say that lines are
missing, or a file breaks off, it is read again, and the batch stays open; only one that is given up leaves requests
`unknown`, and one without counts, or whose files were deleted, or that names none and has counts that do not add up.
A request that was lost once before does not keep a batch open: it becomes `unknown` again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from purld.clients.batch_api import ApiReply, BatchApi
from purld.clients.batch_format import OVERHEAD_BYTES, BatchStatus, read_line, unexecuted
from purld.clients.batch_records import BatchRecord
from purld.clients.completion import parse_json
from purld.clients.faults import CallOutcome
from purld.clients.ledger import CallResult, Ledger
from purld.clients.rate_limit import backoff_seconds
from purld.clients.redaction import KeyRedactor
from purld.clients.transport import Line, body_limit
from purld.config.clients import OpenAIEndpoint
from purld.errors import UserError

OnOutcome = Callable[[str, CallOutcome], None]
"""Receives a request's key and the end of its call, once it is durable."""


@dataclass
class Collected:
    """What a batch brought.

    Attributes:
        requests: the calls that ended now.
        answered: those with an answer that can be used.
        cause: the error of the last call that failed.
        stop: one sentence, if a response said that every further call would fail.
    """

    requests: int = 0
    answered: int = 0
    cause: CallResult | None = None
    stop: str | None = None

    def add(self, outcome: CallOutcome) -> None:
        """Count the end of a call."""
        self.requests += 1
        self.stop = self.stop or outcome.stop
        if outcome.result.state == "answered" and not outcome.suspect:
            self.answered += 1
        else:
            self.cause = outcome.result


@dataclass
class _Reading:
    """What was read of the files of a batch.

    Attributes:
        calls: the calls that no line has been read for, by request key.
        on_outcome: called at the end of each call.
        executed: the keys of the requests that were executed, as lines say.
        collected: what the batch brought.
        gone: the endpoint has deleted a file.
        broken_off: a file ended in the middle of a line.
    """

    calls: dict[str, int]
    on_outcome: OnOutcome
    executed: set[str] = field(default_factory=set)
    collected: Collected = field(default_factory=Collected)
    gone: bool = False
    broken_off: bool = False

    def lacks_lines(self, status: BatchStatus) -> bool:
        """Return whether calls have no line although there must be more lines than were read."""
        more = self.broken_off or (status.completed or 0) > len(self.executed)
        return bool(self.calls) and not self.gone and more

    def end(self, key: str, outcome: CallOutcome, ledger: Ledger) -> None:
        """Settle a call, and tell of its end."""
        ledger.settle(self.calls.pop(key), outcome.result)
        self.collected.add(outcome)
        self.on_outcome(key, outcome)


def _breaks_off(line: Line) -> bool:
    """Return whether a line is the last and only the beginning of an object, which may arrive whole next time."""
    whole = line.ended or line.too_long or parse_json(line.content.decode("utf-8", "replace")) is not None
    return not whole and line.content.lstrip().startswith(b"{")


def _lost(error: str) -> CallOutcome:
    """Return the end of a call that may have been executed, and whose result is not there."""
    return CallOutcome(CallResult("unknown", error=error), suspect=True)


class BatchCollector:
    """Collects the results of batches.

    Args:
        api: the endpoint's batch API.
        ledger: stores the results.
        endpoint: the endpoint, with the prices of a batch.
        redactor: removes the key from what the endpoint sent.
    """

    def __init__(self, api: BatchApi, ledger: Ledger, endpoint: OpenAIEndpoint, redactor: KeyRedactor) -> None:
        self._api = api
        self._ledger = ledger
        self._endpoint = endpoint
        self._redactor = redactor

    async def collect(
        self, batch: BatchRecord, status: BatchStatus, on_outcome: OnOutcome, give_up: bool = False
    ) -> Collected:
        """Settle every call of a batch that has ended.

        Args:
            batch: the batch.
            status: what the endpoint says of it.
            on_outcome: called at the end of each call.
            give_up: end the calls of which the results are missing, too.

        Raises:
            UserError: results are missing that were not lost before, or a file cannot be read now; the batch stays
                open, and what was read is stored.
        """
        reading = _Reading(self._ledger.open_calls(batch.id), on_outcome)
        for attempt in range(self._endpoint.retries + 1):
            await self._read_files(batch, status, reading)
            # Files that are not named were waited for before.
            if not status.files or not reading.lacks_lines(status) or attempt == self._endpoint.retries:
                break
            await asyncio.sleep(backoff_seconds(attempt, None))
        if reading.lacks_lines(status) and not give_up:
            self._give_up_again(reading)
            if reading.calls:
                raise self._incomplete(batch, status)
        rest = self._rest(batch, status, reading)
        for key in self._ledger.end_batch(batch.id, status.status, rest.result):
            reading.collected.add(rest)
            on_outcome(key, rest)
        return reading.collected

    async def _read_files(self, batch: BatchRecord, status: BatchStatus, reading: _Reading) -> None:
        """Settle the calls that the files of a batch have lines for."""
        reading.broken_off = False
        for file_id in status.files:
            problem = await self._read_file(file_id, reading)
            if problem and problem.status in (404, 410):
                reading.gone = True
            elif problem:
                raise self._unreadable(batch, problem.said)

    def _give_up_again(self, reading: _Reading) -> None:
        """End the calls without a line that were lost before; an endpoint may lose the same ones every time."""
        for key in list(reading.calls):
            if self._ledger.was_lost(key):
                reading.end(key, _lost("no_line"), self._ledger)

    def _incomplete(self, batch: BatchRecord, status: BatchStatus) -> UserError:
        if status.files:
            otherwise = "; a later one with --resend-unknown gives up what is missing and asks again"
            return self._unreadable(batch, "lines are missing", otherwise)
        return UserError(
            f"{self._endpoint.base_url}: {batch.name} has ended with {status.completed or 0:,} executed requests and "
            "names no file of their results; the same command looks again, a later one with --resend-unknown gives "
            "them up and asks again."
        )

    def _unreadable(self, batch: BatchRecord, said: str, otherwise: str = "") -> UserError:
        return UserError(
            f"{self._endpoint.base_url}: the results of {batch.name} cannot be read ({said}); "
            f"they stay there, and the same command collects them{otherwise}."
        )

    async def _read_file(self, file_id: str, reading: _Reading) -> ApiReply | None:
        """Settle the calls that a file has lines for; return why it could not be read to its end, or None."""
        problem: ApiReply | None = None
        for attempt in range(self._endpoint.retries + 1):
            problem = None
            async for item in self._api.lines(file_id):
                if isinstance(item, ApiReply):
                    problem = item
                elif _breaks_off(item):
                    reading.broken_off = True
                else:
                    self._settle_line(item, reading)
            if problem is None or not problem.passing:
                break
            await asyncio.sleep(backoff_seconds(attempt, problem.retry_after))
        return problem

    def _settle_line(self, line: Line, reading: _Reading) -> None:
        limit = body_limit(self._endpoint) + OVERHEAD_BYTES
        read = read_line(line.content, line.too_long, limit, self._endpoint, time.time(), self._redactor)
        if read is None:
            return
        if read.executed:
            reading.executed.add(read.key)
        if read.key in reading.calls:  # or else settled before, by an earlier attempt or process
            reading.end(read.key, read.outcome, self._ledger)

    def _rest(self, batch: BatchRecord, status: BatchStatus, reading: _Reading) -> CallOutcome:
        """Return the end of the calls for which no line was found."""
        if status.status == "failed" and not status.files:
            said = f"batch_failed: {status.errors}" if status.errors else "batch_failed"
            return CallOutcome(CallResult("failed", error=said, billable=False, left=False), suspect=True)
        if reading.gone:
            return _lost("output_gone")
        told = status.completed is not None if status.files else status.executed_nothing(batch.calls)
        if told and not reading.lacks_lines(status):
            left_out = {"expired": "batch_expired", "cancelled": "batch_cancelled"}
            return unexecuted(left_out.get(status.status, "no_line"))
        return _lost("no_line")
