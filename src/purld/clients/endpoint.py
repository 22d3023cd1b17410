"""A client for OpenAI-compatible endpoints that sends requests concurrently and never sends an answered one again.

`transport` sends exactly the bytes in the ledger, `faults` classifies what comes back, `rate_limit` decides when a call
may be sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
import warnings
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from purld.clients.base import (
    OnReply,
    Reply,
    ReplyCollector,
    capped_reply,
    reply_from_ledger,
    reply_from_result,
    settled_reply,
)
from purld.clients.completion import MAX_RAW
from purld.clients.faults import (
    CallOutcome,
    classify_exception,
    classify_response,
    decode_body,
    too_large,
    wrong_encoding,
)
from purld.clients.folder import LOCK_POLL_SECONDS, LOCK_SECONDS, FolderLockedError
from purld.clients.ledger import CallResult, CapReachedError, Caps, Ledger, Request, Role, UnderWayElsewhereError
from purld.clients.rate_limit import RateLimiter, backoff_seconds
from purld.clients.redaction import KeyRedactor
from purld.clients.requests import build_request, build_requests, read_api_key, token_cost, worst_case_tokens
from purld.clients.transport import Response, body_limit, open_http, post
from purld.config.clients import OpenAIEndpoint
from purld.errors import PlainWarning, UserError
from purld.event_loops import run_async
from purld.records import Prompt
from purld.signals import DeferredSignals, deferred_signals

if TYPE_CHECKING:
    from httpx2 import AsyncClient

MAX_CONSECUTIVE_FAILURES = 10  # after so many, the endpoint is down or all requests have the same fault
POLL_SECONDS = 0.5  # between looks at a question that another run is asking
GRACE_SECONDS = 20.0  # how long a signal to stop waits for the calls in flight
LARGE_BODY = 32 * 2**10  # bytes; a larger body is read in a thread, so that other calls are not held up


class EndpointClient:
    """A client for an OpenAI-compatible endpoint; see `purld.clients.base.Client`."""

    def __init__(self, endpoint: OpenAIEndpoint, ledger: Ledger, role: Role, resend_unknown: bool = False) -> None:
        self.endpoint = endpoint
        self.ledger = ledger
        self.role: Role = role
        self.resend_unknown = resend_unknown
        self._key = read_api_key(endpoint)

    def ask(self, prompts: Sequence[Prompt], on_reply: OnReply | None = None) -> list[Reply]:
        """Return the replies in the order of `prompts`; see `Client.ask`.

        At SIGINT (Ctrl-C), SIGTERM and SIGHUP nothing more is sent, and the calls in flight, which may be billed, are
        awaited for up to `GRACE_SECONDS` and stored; after a second SIGINT they become `unknown` at once. Then the
        signal takes its usual effect. An error of `on_reply` is raised after the calls in flight have been stored.
        """
        keys = [request.key for request in build_requests(self.endpoint, prompts)]
        self.ledger.import_results(dict.fromkeys(keys), self.role)
        collector = ReplyCollector(keys, on_reply)
        pending: deque[Prompt] = deque()
        repeated: list[Prompt] = []  # those that failed before come last: they may fail again, and so stop the run
        for key, index in collector.distinct_keys():
            result = self.ledger.find_result(key)
            if result is None:
                pending.append(prompts[index])
            elif known := settled_reply(result, self.resend_unknown and not self.ledger.sent_here(key)):
                collector.add_reply(key, known)
            else:
                repeated.append(prompts[index])
        pending.extend(repeated)
        if pending:
            with deferred_signals() as signals:
                run_async(_ConcurrentAsk(self, self._key, pending, collector).run(signals))
        return collector.in_order()


class _ConcurrentAsk:
    """One call of `ask`: the prompts that still need a reply, and the workers that request the replies."""

    def __init__(
        self, client: EndpointClient, key: str | None, pending: deque[Prompt], collector: ReplyCollector
    ) -> None:
        self.endpoint = client.endpoint
        self.ledger = client.ledger
        self.role: Role = client.role
        self.resend_unknown = client.resend_unknown
        self.caps = Caps(self.endpoint.max_calls, self.endpoint.max_tokens, self.endpoint.max_cost)
        self.key = key
        self.redactor = KeyRedactor(key)
        self.large_body = asyncio.Lock()  # one at a time: a parsed body takes many times its bytes
        self.claiming = asyncio.Lock()  # one worker waits for the folder's lock, for all
        self.pending = pending
        self.asked_elsewhere: list[Prompt] = []  # which another run in the folder is asking now
        self.collector = collector
        self.rate_limiter = RateLimiter(self.endpoint.requests_per_minute, self.endpoint.tokens_per_minute)
        self.in_flight = 0
        self.consecutive_failures = 0
        self.answered = False
        self.stop: str | None = None  # the reason for stopping
        self.error: BaseException | None = None  # the first that a worker could not handle
        self.told_of_waiting = False
        self.interrupted = False  # by a signal
        self.workers: list[asyncio.Task[None]] = []
        self.stopped = asyncio.Event()
        self.call_settled = asyncio.Event()

    async def run(self, signals: DeferredSignals) -> None:
        loop = asyncio.get_running_loop()
        async with open_http(self.endpoint, self.key) as http:
            self.workers = [
                asyncio.create_task(self._work(http)) for _ in range(min(self.endpoint.concurrency, len(self.pending)))
            ]
            signals.notify(lambda signum: loop.call_soon_threadsafe(self._interrupt, signum))
            try:
                await asyncio.gather(*self.workers, return_exceptions=True)
            finally:
                self._cancel_workers()
                await asyncio.gather(*self.workers, return_exceptions=True)
        if self.error:
            raise self.error
        if self.stop:
            raise UserError(self.stop)

    def _interrupt(self, signum: int) -> None:
        """Send nothing more at the first signal, and give the calls in flight some time; at a second SIGINT, none."""
        if not self.interrupted:
            self.interrupted = True
            self._stop(f"stopped by {signal.Signals(signum).name}")
            asyncio.get_running_loop().call_later(GRACE_SECONDS, self._cancel_workers)
            if self.in_flight:
                warnings.warn(PlainWarning(_describe_grace(self.in_flight, signum)), stacklevel=2)
        elif signum == signal.SIGINT:
            self._cancel_workers()

    def _cancel_workers(self) -> None:
        for worker in self.workers:
            worker.cancel()

    async def _work(self, http: AsyncClient) -> None:
        """Ask for pending prompts; after an error, which is raised at the end, let the other workers finish."""
        try:
            await self._ask_pending(http)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            self.error = self.error or error
            self._stop(str(error))

    async def _ask_pending(self, http: AsyncClient) -> None:
        while not self.stop and (self.pending or await self._look_again_elsewhere()):
            prompt = self.pending.popleft()
            try:
                request = await asyncio.to_thread(build_request, self.endpoint, prompt)
            except UserError as missing_image:
                # Calls in flight may be billed, so wait for them.
                self._stop(str(missing_image))
                break
            try:
                reply = await self._request_reply(http, request, *worst_case_tokens(self.endpoint, prompt))
            except UnderWayElsewhereError as other:
                self._note_elsewhere(prompt, str(other))
                continue
            if reply:
                self.collector.add_reply(request.key, reply)

    def _note_elsewhere(self, prompt: Prompt, ledger: str) -> None:
        if not self.told_of_waiting:
            self.told_of_waiting = True
            text = f"{ledger}: its run is asking a question of this one at the moment; purld waits for the answer."
            warnings.warn(PlainWarning(text), stacklevel=2)
        self.asked_elsewhere.append(prompt)

    async def _look_again_elsewhere(self) -> bool:
        """When nothing else is left to ask, return to the questions that other runs are asking, after a moment."""
        if not self.asked_elsewhere:
            return False
        await self._sleep(POLL_SECONDS)
        self.pending.extend(self.asked_elsewhere)
        self.asked_elsewhere.clear()
        return bool(self.pending) and not self.stop

    async def _request_reply(
        self, http: AsyncClient, request: Request, input_tokens: int, output_tokens: int
    ) -> Reply | None:
        """Request the reply to one prompt, with retries; None if the run was stopped first."""
        outcome, repeats, unusable = None, 0, 0
        while True:
            try:
                call = await self._reserve(request, input_tokens, output_tokens)
            except CapReachedError as cap:
                return reply_from_result(outcome.result) if outcome else capped_reply(str(cap))
            except UserError as disk_full:
                # Nothing more may be sent, but calls in flight may be billed, so wait for them.
                self._stop(str(disk_full))
                break
            if call is None:
                return reply_from_ledger(self.ledger, request.key, self.resend_unknown)
            outcome = await self._call(http, request, call, input_tokens + output_tokens)
            if outcome and outcome.unusable and unusable < self.endpoint.unusable_retries:
                unusable += 1
            elif outcome and outcome.repeat and repeats < self.endpoint.retries:
                repeats += 1
            else:
                break
            await self._sleep(self._retry_wait(repeats + unusable - 1, outcome))
            if self.stop:
                break
        if outcome is None:
            return None
        self._check_health(outcome)
        return reply_from_result(outcome.result)

    async def _reserve(self, request: Request, input_tokens: int, output_tokens: int) -> int | None:
        """Reserve the worst case of a call; None if another run in the folder turns out to know the result.

        At a cap, wait for calls in flight, which may cost less than reserved.
        """
        cost = token_cost(self.endpoint, input_tokens, output_tokens)
        while True:
            try:
                call = await self._claim(request, input_tokens + output_tokens, cost)
            except CapReachedError:
                if not self.in_flight:
                    raise
                await self.call_settled.wait()
            else:
                self.in_flight += call is not None
                return call

    async def _claim(self, request: Request, tokens: int, cost: float) -> int | None:
        """Claim a call, and wait while another process holds the folder's lock.

        The ledger would wait as well, but then the calls in flight would have to, and could time out.
        """
        async with self.claiming:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    return self.ledger.claim(request, self.role, tokens, cost, self.caps, self._settles, wait=False)
                except FolderLockedError:
                    if self.stop or time.monotonic() >= deadline:
                        raise
                    await self._sleep(LOCK_POLL_SECONDS)

    def _settles(self, result: CallResult) -> bool:
        return settled_reply(result, self.resend_unknown) is not None

    async def _call(self, http: AsyncClient, request: Request, call: int, tokens: int) -> CallOutcome | None:
        """Send one reserved call and settle it; the ledger stays correct if this is interrupted at any point."""
        sent = settled = False
        result = CallResult("unknown", error="interrupted")
        try:
            await self._sleep(self.rate_limiter.reserve_start(tokens, time.monotonic()))
            if self.stop:
                return None
            self.ledger.mark_sent(call)
            sent = True
            outcome = await self._exchange(http, request)
            result = outcome.result
            self.ledger.settle(call, result)
            settled = True
            if usage := outcome.result.usage:
                self.rate_limiter.return_tokens(tokens, usage.input_tokens + usage.output_tokens)
            return outcome
        finally:
            try:
                if not sent:
                    self.ledger.release(call)
                elif not settled:
                    self.ledger.settle(call, result)
            finally:  # whatever became of the ledger, nobody waits for this call any more
                self.in_flight -= 1
                self.call_settled.set()
                self.call_settled = asyncio.Event()

    async def _exchange(self, http: AsyncClient, request: Request) -> CallOutcome:
        """Make one HTTP call; the timeout covers the whole response, not each piece."""
        import httpx2

        deadline = asyncio.get_running_loop().time() + self.endpoint.timeout
        attempt = self.ledger.count_results(request.key)
        # A gateway that knows the key of a lost call can give back its answer; any other call must be made anew, also
        # if the runs beside this one made it.
        idempotency_key = f"{request.key}-{attempt}" if attempt else request.key
        try:
            response = await post(http, self.endpoint, request.body, idempotency_key, deadline)
        except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError, OSError) as error:
            return classify_exception(error, self.redactor)
        # Reading takes time in proportion to the body, which is bounded, so no answer that came in time is given up.
        if len(response.content) <= LARGE_BODY:
            return self._classify(response)
        async with self.large_body:
            return await asyncio.to_thread(self._classify, response)

    def _classify(self, response: Response) -> CallOutcome:
        if response.encoding:
            return wrong_encoding(response.encoding)
        content_type = response.headers.get("content-type", "")
        if response.too_large:
            start = decode_body(response.content[: 4 * MAX_RAW], content_type)
            return too_large(body_limit(self.endpoint), start, self.redactor)
        text = decode_body(response.content, content_type)
        return classify_response(response.status, response.headers, text, self.endpoint, time.time(), self.redactor)

    def _retry_wait(self, attempt: int, outcome: CallOutcome) -> float:
        wait = backoff_seconds(attempt, outcome.retry_after)
        if outcome.retry_after is not None:
            self.rate_limiter.pause(outcome.retry_after, time.monotonic())
        return wait

    def _check_health(self, outcome: CallOutcome) -> None:
        """Stop if the outcome means that every further call would fail, or after too many consecutive failures."""
        self.consecutive_failures = self.consecutive_failures + 1 if outcome.suspect else 0
        self.answered |= outcome.result.state == "answered"
        reason = outcome.stop or (None if self.answered else outcome.stop_if_first)
        if self.consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
            cause = reply_from_result(outcome.result).detail
            failures = f"{self.consecutive_failures} prompts in a row failed ({cause})"
            reason = reason or f"{self.endpoint.base_url}: {failures}."
        if reason:
            self._stop(reason)

    def _stop(self, reason: str) -> None:
        """Send nothing more, but wait for calls in flight; only the first reason is reported."""
        self.stop = self.stop or reason
        self.stopped.set()

    async def _sleep(self, seconds: float) -> None:
        """Sleep, or return early when the run is stopped."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.stopped.wait()


def _describe_grace(calls: int, signum: int) -> str:
    again = "; a second Ctrl-C ends it at once" if signum == signal.SIGINT else ""
    calls_in_flight = "the call in flight" if calls == 1 else f"the {calls} calls in flight"
    return f"nothing more is sent; purld waits up to {GRACE_SECONDS:g} s for {calls_in_flight}{again}."
