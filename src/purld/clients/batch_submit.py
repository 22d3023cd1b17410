"""Create a batch at an endpoint exactly once, also across kills, timeouts and errors.

The order is: upload the file, record in the ledger that the batch is about to be created, create it, record its id. A
refusal is certain; after anything else the endpoint's list of batches is asked. Only if it certainly has none is the
creation tried again; if it cannot tell, the calls become `unknown`, as lost single calls do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

from purld.clients.batch_api import ApiReply, BatchApi
from purld.clients.batch_format import BatchStatus, read_batch, read_id
from purld.clients.batch_records import BatchRecord
from purld.clients.ledger import CallResult, Ledger, ReservedBatch
from purld.clients.rate_limit import backoff_seconds
from purld.clients.redaction import KeyRedactor
from purld.config.clients import OpenAIEndpoint

LOOKS = (1.0, 3.0, 10.0)  # seconds before each look for a batch whose creation was lost


@dataclass(frozen=True)
class Submission:
    """What became of a batch.

    Attributes:
        fate: it is at the endpoint, its calls are `unknown`, it was refused, or it is too large; a batch that was
            refused or is too large has not run.
        keys: the keys of the requests whose calls have ended.
        stop: one sentence for a batch that was refused.
    """

    fate: Literal["submitted", "unknown", "refused", "too large"]
    keys: list[str] = field(default_factory=list)
    stop: str = ""


class BatchSubmitter:
    """Creates batches at an endpoint.

    Args:
        api: the endpoint's batch API.
        ledger: records every step.
        endpoint: the endpoint.
        redactor: removes the key from what is recorded.
    """

    def __init__(self, api: BatchApi, ledger: Ledger, endpoint: OpenAIEndpoint, redactor: KeyRedactor) -> None:
        self._api = api
        self._ledger = ledger
        self._endpoint = endpoint
        self._redactor = redactor
        self.creating = False  # a batch may be created at this moment, so an interruption should wait

    async def submit(self, reserved: ReservedBatch, content: bytes) -> Submission:
        """Upload the input file of a prepared batch, and create the batch."""
        assert reserved.batch is not None
        try:
            uploaded = await self._repeat(lambda: self._api.upload(content, reserved.token))
        except BaseException:
            self._end_unrun(reserved.batch, "not_submitted")
            raise
        file_id = read_id((uploaded.data or {}).get("id"))
        if file_id is not None and self._redactor.redact_answer(file_id) == file_id:  # it is stored, and may be shown
            self._ledger.mark_batch_sent(reserved.batch, file_id)
            [batch] = [record for record in self._ledger.open_batches() if record.id == reserved.batch]
            return await self._create(batch)
        if uploaded.too_large and len(reserved.calls) > 1:
            return Submission("too large", self._end_unrun(reserved.batch, f"batch_failed: {uploaded.said}"))
        keys = self._end_unrun(reserved.batch, "not_submitted")
        said = uploaded.said or "it was given no id"
        return Submission("refused", keys, uploaded.stop or self._sentence("did not take the file of a batch", said))

    async def find_lost(self, batch: BatchRecord) -> Submission:
        """Find out what became of a batch that a kill left without an id; one that was not created is `refused`."""
        return await self._look_for(batch) or Submission("refused", self._end_unrun(batch.id, "not_submitted"))

    async def _create(self, batch: BatchRecord) -> Submission:
        assert batch.file_id is not None
        reply, with_metadata = ApiReply(), True
        for attempt in range(self._endpoint.retries + 1):
            self.creating = True
            try:
                reply = await self._api.create(batch.file_id, batch.token, with_metadata)
                if created := read_batch(reply.data, self._redactor):
                    return self._found(batch, created)
            finally:
                self.creating = False
            if with_metadata and reply.status in (400, 422) and "metadata" in reply.said.lower():
                with_metadata = False
                continue
            if not reply.refused and (found := await self._look_for(batch)):
                return found
            if reply.stop or (reply.refused and not reply.passing):
                break
            await asyncio.sleep(backoff_seconds(attempt, reply.retry_after))
        keys = self._end_unrun(batch.id, f"batch_failed: {reply.said}")
        return Submission("refused", keys, reply.stop or self._sentence("refused a batch", reply.said))

    async def _look_for(self, batch: BatchRecord) -> Submission | None:
        """Look for a batch at the endpoint; None only if it certainly has none."""
        assert batch.file_id is not None
        answer = "unknown"
        for wait in LOOKS:
            await asyncio.sleep(wait)
            found = await self._api.find(batch.file_id, batch.token, batch.submitted_at or time.time())
            if found.batch is not None:
                return self._found(batch, found.batch)
            answer = found.answer
        if answer == "absent":
            return None
        lost = CallResult("unknown", error="interrupted")
        return Submission("unknown", self._ledger.end_batch(batch.id, "lost", lost))

    def _found(self, batch: BatchRecord, status: BatchStatus) -> Submission:
        self._ledger.note_batch(batch.id, status.id, status.status)
        return Submission("submitted")

    def _end_unrun(self, batch: int, error: str) -> list[str]:
        """Record that a batch was never run, so that its calls count towards no cap; return their keys."""
        result = CallResult("failed", error=self._redactor.redact(error), billable=False, left=False)
        return self._ledger.end_batch(batch, "not run", result)

    def _sentence(self, what: str, said: str) -> str:
        return f"{self._endpoint.base_url}: {what} ({said}); nothing of it was billed."

    async def _repeat(self, call: Callable[[], Awaitable[ApiReply]]) -> ApiReply:
        """Make a call that is never billed until it succeeds, fails for good, or the retries are used up."""
        reply = await call()
        for attempt in range(self._endpoint.retries):
            if reply.data is not None or not reply.passing:
                break
            await asyncio.sleep(backoff_seconds(attempt, reply.retry_after))
            reply = await call()
        return reply
