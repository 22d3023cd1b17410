"""A client that asks through an endpoint's batch API: at half the price, with answers within a day.

A batch is recorded in the ledger before it is created at the endpoint, with the worst case of all its calls booked, and
its id right after. So a process that is killed at any moment finds its batch again and collects it. `batch_submit`
creates batches, `batch_collect` reads their results, by the same code as those of single calls.

What failed without being billed is asked again in the next batch. With `batch: false`, batches that were submitted
before are collected, and the rest is asked one call at a time.
"""

from __future__ import annotations

import asyncio
import random
import time
import warnings
from collections import Counter, deque
from collections.abc import Sequence
from typing import cast

from purld.clients.base import OnReply, Reply, ReplyCollector, capped_reply, reply_from_result, settled_reply
from purld.clients.batch_api import BatchApi, OnWait
from purld.clients.batch_collect import BatchCollector, Collected
from purld.clients.batch_format import ENDED, MAX_FILE_BYTES, MAX_REQUESTS, BatchStatus, input_line, read_batch
from purld.clients.batch_records import BatchRecord
from purld.clients.batch_submit import BatchSubmitter, Submission
from purld.clients.endpoint import EndpointClient
from purld.clients.faults import CallOutcome
from purld.clients.ledger import BUDGETS, CallResult, Caps, Ledger, Role, WorstCase
from purld.clients.redaction import KeyRedactor
from purld.clients.requests import build_requests, read_api_key, token_cost, with_batch_prices, worst_case_tokens
from purld.clients.transport import open_http
from purld.config.clients import OpenAIEndpoint
from purld.errors import PlainWarning, UserError
from purld.event_loops import run_async
from purld.records import Prompt
from purld.signals import DeferredSignals, deferred_signals

FIRST_POLL, LONGEST_POLL, POLL_GROWTH = 2.0, 60.0, 1.3  # seconds between looks at batches
MAX_FAILED_POLLS = 15  # in a row, with growing waits: about ten minutes
EMPTY_POLLS = 3  # looks at a batch that has ended and names no file yet
SOON, AGAIN = 90.0, 300.0  # seconds after a change, or after the last time, in which a state is shown again
GRACE_SECONDS = 20.0  # how long a signal to stop waits while a batch is being created
NONE_ANSWERED = 10  # requests from which on a batch without any answer ends the run


class BatchClient:
    """A client that asks through the batch API; see `purld.clients.base.Client`.

    Args:
        endpoint: the endpoint; with `batch: false`, only batches that were submitted before are collected.
        ledger: books the calls and records the batches.
        role: the role that asks.
        resend_unknown: ask again where an answer may have been billed but never arrived.
        on_wait: called when the state of a batch changes.

    Raises:
        UserError: the API key is missing, or a batch waits at another address.
    """

    def __init__(
        self,
        endpoint: OpenAIEndpoint,
        ledger: Ledger,
        role: Role,
        resend_unknown: bool = False,
        on_wait: OnWait | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.ledger = ledger
        self.role: Role = role
        self.resend_unknown = resend_unknown
        self.on_wait = on_wait
        self.key = read_api_key(endpoint)
        self._check_addresses()

    @property
    def setting(self) -> str:
        """Return the key of the configuration that asks for batches."""
        return "evaluate.judge.batch" if self.role == "judge" else "teacher.batch"

    def ask(self, prompts: Sequence[Prompt], on_reply: OnReply | None = None) -> list[Reply]:
        """Return the replies in the order of `prompts`; see `Client.ask`.

        At SIGINT (Ctrl-C), SIGTERM and SIGHUP, batches are left to the endpoint, and a warning says how to go on. Then
        the signal takes its usual effect.
        """
        if self.endpoint.batch:
            return self._work_on(prompts, on_reply, wait=True).in_order()
        self._work_on(prompts, None, wait=True)
        return EndpointClient(self.endpoint, self.ledger, self.role, self.resend_unknown).ask(prompts, on_reply)

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Submit what `ask` would submit first, and do not wait for answers."""
        if self.endpoint.batch:
            self._work_on(prompts, None, wait=False)

    def open_batches(self) -> list[BatchRecord]:
        """Return the open batches of this client's budget; the teacher and the opponent share theirs."""
        return [batch for batch in self.ledger.open_batches() if BUDGETS[cast(Role, batch.role)] == BUDGETS[self.role]]

    def cancel(self) -> list[str]:
        """Cancel the open batches, and return a line about each; what they have answered is billed and kept there."""
        return run_async(self._cancel())

    def _work_on(self, prompts: Sequence[Prompt], on_reply: OnReply | None, wait: bool) -> ReplyCollector:
        keys = [request.key for request in build_requests(self.endpoint, prompts)]
        self.ledger.import_results(dict.fromkeys(keys), self.role)
        collector = ReplyCollector(keys, on_reply)
        work = _BatchWork(self, {key: prompts[index] for key, index in collector.distinct_keys()}, collector)
        if work.needed(wait):
            with deferred_signals() as signals:
                run_async(work.run(signals, wait))
        return collector

    async def _cancel(self) -> list[str]:
        lines, redactor = list[str](), KeyRedactor(self.key)
        async with open_http(self.endpoint, self.key) as http:
            api = BatchApi(http, self.endpoint, redactor, self.setting)
            submitter = BatchSubmitter(api, self.ledger, self.endpoint, redactor)
            for batch in self.open_batches():
                if batch.batch_id is None:
                    await submitter.find_lost(batch)
            for batch in self.open_batches():
                assert batch.batch_id is not None
                reply = await api.cancel(batch.batch_id)
                status = read_batch(reply.data, redactor)
                said = status.described() if status else f"{batch.name}: was not cancelled ({reply.said})"
                lines.append(f"{said}, {batch.calls:,} requests")
        return lines

    def _check_addresses(self) -> None:
        """Check that no batch waits at another address, where its answers would be forgotten."""
        for batch in self.open_batches():
            if batch.base_url == self.endpoint.base_url:
                continue
            if not self.resend_unknown:
                raise UserError(
                    f"{self.ledger.path}: {batch.name} with {batch.calls:,} requests of this run waits at "
                    f"{batch.base_url}; set base_url back to collect it, or give it up with --resend-unknown."
                )
            self.ledger.end_batch(batch.id, "given up", CallResult("unknown", error="interrupted"))


class _WaitDisplay:
    """Shows the state of the open batches: when it changes, again soon after that, and every few minutes.

    A display may drop what follows too closely on something else, so that a single message could be lost for hours.
    """

    def __init__(self, on_wait: OnWait | None) -> None:
        self._on_wait = on_wait
        self._text = ""
        self._changed = self._shown = time.monotonic()

    def show(self, done: int, total: int, batches: Sequence[BatchStatus]) -> None:
        """Show how many prompts are done, of how many, and a line about the batches."""
        text, now = "; ".join(batch.described() for batch in batches), time.monotonic()
        if text != self._text:
            self._text, self._changed = text, now
        if self._on_wait and (now - self._changed < SOON or now - self._shown >= AGAIN):
            self._on_wait(done, total, text)
            self._shown = now


class _BatchWork:
    """One call of `ask` or `submit`: the prompts that need a reply, and the batches that are open."""

    def __init__(self, client: BatchClient, prompts: dict[str, Prompt], collector: ReplyCollector) -> None:
        self.client = client
        self.endpoint = client.endpoint
        self.ledger = client.ledger
        self.priced = with_batch_prices(client.endpoint)
        self.redactor = KeyRedactor(client.key)
        self.prompts = prompts
        self.collector = collector
        self.pending: deque[str] = deque()  # keys to ask
        self.waiting: set[str] = set()  # keys in open batches
        self.capped: dict[str, str] = {}  # keys that wait for room under a cap, with the cap
        self.elsewhere: dict[str, str] = {}  # keys that other runs are asking, with their ledgers
        self.repeats: Counter[str] = Counter()
        self.unusable: Counter[str] = Counter()
        self.failed: dict[str, CallResult] = {}  # the last failure of a key that is asked again
        self.most = MAX_REQUESTS  # in one batch
        self.one_at_a_time = False
        self.statuses: dict[int, BatchStatus] = {}
        self.empty_looks: Counter[int] = Counter()  # at batches that have ended and name no file
        self.unreadable: dict[int, str] = {}  # why batches that have ended cannot be collected now
        self.seen_running: set[int] = set()  # batches that had not ended when this process looked
        self.refused: list[str] = []  # keys of a batch that the endpoint refused after it was created
        self.display = _WaitDisplay(client.on_wait)
        self.last_fault = ""
        self.told_elsewhere = False
        self.interrupted = False
        self.stop: str | None = None
        self._sort_keys()

    def _sort_keys(self) -> None:
        """Deliver what the ledger knows, and tell what is in a batch from what is to be asked."""
        in_batches = {key for batch in self.client.open_batches() for key in self.ledger.open_calls(batch.id)}
        repeated = []  # those that failed before come last, as in single calls
        for key in self.prompts:
            result = self.ledger.find_result(key)
            if key in in_batches:
                self.waiting.add(key)
            elif result is None:
                self.pending.append(key)
            elif known := settled_reply(result, self._may_resend(key)):
                self.collector.add_reply(key, known)
            else:
                repeated.append(key)
        self.pending.extend(repeated)

    def _may_resend(self, key: str) -> bool:
        """Return whether a lost request may be sent again: no command buys again what it has lost itself."""
        return self.client.resend_unknown and not self.ledger.sent_here(key)

    def needed(self, wait: bool) -> bool:
        """Return whether there is anything to submit, or to wait for."""
        return bool((self.pending and self.endpoint.batch) or (wait and self.waiting))

    async def run(self, signals: DeferredSignals, wait: bool) -> None:
        """Submit, and collect if `wait`; at a signal, leave open batches to the endpoint.

        Raises:
            UserError: nothing more can be asked for or collected now; batches that go on are named.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        try:
            async with open_http(self.endpoint, self.client.key) as http:
                self.api = BatchApi(http, self.endpoint, self.redactor, self.client.setting)
                self.submitter = BatchSubmitter(self.api, self.ledger, self.endpoint, self.redactor)
                signals.notify(lambda signum: loop.call_soon_threadsafe(self._interrupt, task))
                await self._find_lost()
                await (self._submit_and_collect() if wait else self._submit_pending())
        except asyncio.CancelledError:
            if not self.interrupted:
                raise
            task.uncancel()
            if going_on := self._going_on():
                warnings.warn(PlainWarning(going_on), stacklevel=2)
            raise UserError("stopped by a signal.") from None  # which takes its effect now
        if self.stop:
            raise UserError(" ".join(filter(None, [self.stop, self._going_on()])))

    def _interrupt(self, task: asyncio.Task[object]) -> None:
        """Stop; while a batch is being created, after that, but at a second signal at once."""
        if self.submitter.creating and not self.interrupted:
            asyncio.get_running_loop().call_later(GRACE_SECONDS, task.cancel)
        else:
            task.cancel()
        self.interrupted = True

    def _going_on(self) -> str:
        """Return the sentence about the batches that the endpoint goes on with, or nothing."""
        names = [batch.name for batch in self.client.open_batches() if batch.status not in ENDED]
        if not names:
            return ""
        goes, them = (f"{names[0]} goes", "it") if len(names) == 1 else (f"{len(names)} batches go", "them")
        return (
            f"{goes} on at {self.endpoint.base_url}: the same command collects the answers, "
            f"`purld ledger {self.ledger.path.parent} --cancel-batches` cancels {them}."
        )

    async def _submit_and_collect(self) -> None:
        while not self.stop:
            if self.endpoint.batch and not self.unreadable:
                await self._submit_pending()
            open_batches = self._collectable()
            if self.unreadable and not open_batches:
                self._note_unreadable()
                break
            if self.stop or not (self.waiting or self.elsewhere or (open_batches and (self.pending or self.capped))):
                break
            await self._wait_for_one()
            self.pending.extend([*self.capped, *self.elsewhere])
            self.capped, self.elsewhere = {}, {}
        if not self.stop:
            for key, cap in self.capped.items():
                failed = self.failed.get(key)
                reply = reply_from_result(failed) if failed else capped_reply(cap)
                self.collector.add_reply(key, reply)

    def _collectable(self) -> list[BatchRecord]:
        """Return the open batches but for those that could not be read: one of them keeps no other waiting."""
        return [batch for batch in self.client.open_batches() if batch.id not in self.unreadable]

    def _note_unreadable(self) -> None:
        """Stop at the batches that could not be read, if anything that is asked for now waits for them."""
        if self.waiting or self.capped or self.elsewhere or (self.pending and self.endpoint.batch):
            said, *others = self.unreadable.values()
            batches = "batch" if len(others) == 1 else "batches"
            also = f" {len(others):,} other {batches} cannot be read either." if others else ""
            self.stop = self.stop or f"{said}{also}"

    async def _find_lost(self) -> None:
        """Settle what became of batches that a kill left without an id."""
        for batch in self.client.open_batches():
            if batch.state == "submitting":
                self._settle_submission(await self.submitter.find_lost(batch))

    async def _submit_pending(self) -> None:
        """Submit batches until nothing is pending, or the endpoint takes no more for now."""
        while self.pending and not self.stop:
            if self.one_at_a_time and self.client.open_batches():
                return
            cases, lines = self._next_group()
            caps = Caps(self.endpoint.max_calls, self.endpoint.max_tokens, self.endpoint.max_cost)
            reserved = self.ledger.reserve_batch(cases, self.client.role, self.endpoint.base_url, caps, self._settles)
            for key in reserved.known:
                self._deliver_known(key)
            self.capped |= reserved.capped
            self._note_elsewhere(reserved.elsewhere)
            if reserved.batch is None:
                continue
            self.waiting.update(reserved.calls)
            content = b"".join(lines[key] for key in reserved.calls)
            self._settle_submission(await self.submitter.submit(reserved, content))
            if self.interrupted:
                raise asyncio.CancelledError

    def _next_group(self) -> tuple[list[WorstCase], dict[str, bytes]]:
        """Take as many pending requests as one batch may hold, with their lines of its input file.

        A single request is taken whatever its size: the endpoint says best that it is too large.
        """
        cases, lines, size = list[WorstCase](), dict[str, bytes](), 0
        keys = [self.pending[index] for index in range(min(self.most, len(self.pending)))]
        for key, request in zip(keys, build_requests(self.endpoint, [self.prompts[key] for key in keys]), strict=True):
            line = input_line(request)
            size += len(line)
            if cases and size > MAX_FILE_BYTES:
                break
            read, written = worst_case_tokens(self.endpoint, self.prompts[key])
            cases.append(WorstCase(request, read + written, token_cost(self.priced, read, written)))
            lines[key] = line
            self.pending.popleft()
        return cases, lines

    def _settles(self, result: CallResult) -> bool:
        return settled_reply(result, self.client.resend_unknown) is not None

    def _note_elsewhere(self, ledgers: dict[str, str]) -> None:
        if ledgers and not self.told_elsewhere:
            self.told_elsewhere = True
            ledger = next(iter(ledgers.values()))
            text = f"{ledger}: its run is asking questions of this one at the moment; purld waits for the answers."
            warnings.warn(PlainWarning(text), stacklevel=2)
        self.elsewhere |= ledgers

    def _settle_submission(self, submission: Submission) -> None:
        """Go on with the requests of a batch that did not come to be."""
        self.waiting.difference_update(submission.keys)
        mine = [key for key in submission.keys if key in self.prompts]
        match submission.fate:
            case "too large":
                self._ask_in_smaller_batches(mine, len(submission.keys), "it is too large")
            case "unknown":
                for key in mine:
                    self._deliver_known(key)
            case _ if submission.stop:
                self.stop = self.stop or submission.stop
            case _:
                self.pending.extend(mine)

    def _ask_in_smaller_batches(self, keys: list[str], size: int, said: str) -> None:
        """Ask the requests of a batch of this size again, one batch after the other, each of at most half the size."""
        if size == 1 and not self.client.open_batches():
            self.stop = f"{self.endpoint.base_url}: takes no batch, even of one request ({said}); nothing was billed."
        self.most = max(1, min(self.most, size) // 2)
        self._ask_batch_by_batch(keys)

    def _ask_batch_by_batch(self, keys: list[str]) -> None:
        """Ask requests again, before others, in a batch that is alone at the endpoint, and so from here on."""
        self.one_at_a_time = True
        self.pending.extendleft(reversed(keys))

    def _deliver_known(self, key: str) -> None:
        """Deliver what the ledger knows of a request, or ask for it again."""
        result = self.ledger.find_result(key)
        reply = settled_reply(result, self._may_resend(key)) if result else None
        if reply:
            self.collector.add_reply(key, reply)
        else:
            self.pending.append(key)

    async def _wait_for_one(self) -> None:
        """Wait until a batch has ended and collect it; without one, wait some time for what other runs are asking."""
        wait, failures = FIRST_POLL, 0
        while not self.stop:
            open_batches = self._collectable()
            for batch in open_batches:
                status = await self._look_at(batch)
                failures = failures + 1 if status is None else 0
                if status is None or not status.ended:
                    continue
                if status.lacks_files:
                    self.empty_looks[batch.id] += 1
                    if self.empty_looks[batch.id] < EMPTY_POLLS:
                        continue
                await self._finish(batch, status)
                return
            if failures >= MAX_FAILED_POLLS * len(open_batches) > 0:
                self.stop = f"{self.endpoint.base_url}: says nothing of its batches ({self.last_fault})."
                return
            await asyncio.sleep(wait * random.uniform(0.9, 1.1))
            if not open_batches:
                return
            wait = min(wait * POLL_GROWTH, LONGEST_POLL)

    async def _look_at(self, batch: BatchRecord) -> BatchStatus | None:
        """Return the status of a batch; None if the endpoint does not say at the moment."""
        assert batch.batch_id is not None
        reply = await self.api.retrieve(batch.batch_id)
        status = read_batch(reply.data, self.redactor)
        if status is not None:
            self._show(batch, status)
            return status
        if reply.status in (404, 410):
            self._note_gone(batch, reply.said)
        elif reply.stop or (reply.refused and not reply.passing):
            self.stop = reply.stop or f"{self.endpoint.base_url}: refuses to show {batch.name} ({reply.said})."
        self.last_fault = reply.said
        return None

    def _note_gone(self, batch: BatchRecord, said: str) -> None:
        """Stop at a batch that the endpoint does not know; with `resend_unknown`, ask an earlier command's again."""
        if not self._may_give_up(batch):
            self.stop = (
                f"{self.endpoint.base_url}: does not know {batch.name} of this run ({said}); use the key of the "
                "account that submitted it, or ask again with --resend-unknown."
            )
            return
        keys = self.ledger.end_batch(batch.id, "gone", CallResult("unknown", error="output_gone"))
        self.waiting.difference_update(keys)
        self.pending.extend(key for key in keys if key in self.prompts)

    def _may_give_up(self, batch: BatchRecord) -> bool:
        """Return whether what is lost of a batch may be asked again: with `resend_unknown`, of an earlier command."""
        return self.client.resend_unknown and not any(map(self.ledger.sent_here, self.ledger.open_calls(batch.id)))

    def _show(self, batch: BatchRecord, status: BatchStatus) -> None:
        before = self.statuses.get(batch.id)
        if before is None or before.status != status.status:
            self.ledger.note_batch(batch.id, status.id, status.status)
        self.statuses[batch.id] = status
        if not status.ended:
            self.seen_running.add(batch.id)
        still_open = [self.statuses[b.id] for b in self.client.open_batches() if b.id in self.statuses]
        self.display.show(self.collector.done, len(self.collector), still_open)

    async def _finish(self, batch: BatchRecord, status: BatchStatus) -> None:
        """Collect a batch that has ended, and decide how to go on."""
        collector = BatchCollector(self.api, self.ledger, self.priced, self.redactor)
        try:
            collected = await collector.collect(batch, status, self._on_outcome, self._may_give_up(batch))
        except UserError as unreadable:
            self.unreadable[batch.id] = str(unreadable)
            return
        del self.statuses[batch.id]
        refused, self.refused = self.refused, []
        if status.status == "failed" and not status.files:
            self._note_refused(batch, status, refused)
        elif status.status == "cancelled" and batch.id in self.seen_running:
            self.stop = (
                f"{self.endpoint.base_url}: {batch.name} was cancelled; {collected.answered:,} of its {batch.calls:,} "
                "requests were answered, and the same command asks for the rest."
            )
        else:
            self._check_health(batch, status, collected)

    def _on_outcome(self, key: str, outcome: CallOutcome) -> None:
        """Deliver the reply to a request, or ask again what failed without being billed or cannot be used."""
        self.waiting.discard(key)
        if key not in self.prompts:  # of another role, or of another part of this one
            return
        if (outcome.result.error or "").startswith("batch_failed"):
            self.refused.append(key)
        elif outcome.unusable and self.unusable[key] < self.endpoint.unusable_retries:
            self.unusable[key] += 1
            self.failed[key] = outcome.result
            self.pending.append(key)
        elif outcome.repeat and self.repeats[key] < self.endpoint.retries:
            self.repeats[key] += 1
            self.failed[key] = outcome.result
            self.pending.append(key)
        elif outcome.result.state == "unknown" and self._may_resend(key):
            self.pending.append(key)
        else:
            self.collector.add_reply(key, reply_from_result(outcome.result))

    def _note_refused(self, batch: BatchRecord, status: BatchStatus, keys: list[str]) -> None:
        """Go on in smaller batches where a batch was too large; stop where it was refused for another reason."""
        if status.too_much and self.client.open_batches():  # beside them it was; alone it may not be
            self._ask_batch_by_batch(keys)
        elif status.too_much:
            self._ask_in_smaller_batches(keys, batch.calls, status.errors)
        else:
            said = status.errors or "no reason was given"
            self.stop = f"{self.endpoint.base_url}: refused {batch.name} ({said}); nothing of it was billed."

    def _check_health(self, batch: BatchRecord, status: BatchStatus, collected: Collected) -> None:
        """Stop if every further request would fail, or none of a batch was answered."""
        self.stop = self.stop or collected.stop
        none_answered = not collected.answered and not status.completed and collected.requests >= NONE_ANSWERED
        if none_answered and collected.cause and status.status != "cancelled":
            cause = reply_from_result(collected.cause).detail
            self.stop = self.stop or (
                f"{self.endpoint.base_url}: none of the {collected.requests:,} requests of {batch.name} was answered "
                f"({cause})."
            )
