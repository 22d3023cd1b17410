"""A model behind an OpenAI-compatible endpoint, asked concurrently and never twice for the same thing.

The SDK is the transport only: its retries, redirects and environment defaults are off, and the bytes it sends
are those that the ledger holds. What a fault means is told apart in `faults`, when a call may leave in `pace`.

Every call has a connection of its own. On a kept one, a server that closes just as a request is written cannot
be told from one that took the request and died: the call would be lost for want of a handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from purld.clients.base import OnReply, Reply, ReplyCollector, describe_failure, reply_from_ledger, reply_from_result
from purld.clients.faults import CallOutcome, classify_exception, classify_response
from purld.clients.ledger import CallResult, CapReachedError, Caps, Ledger, Request, Role
from purld.clients.rate_limit import RateLimiter, backoff_seconds
from purld.clients.requests import build_request, build_requests, read_api_key, token_cost, worst_case_tokens
from purld.config.schema import OpenAIEndpoint
from purld.errors import UserError
from purld.records import Prompt

if TYPE_CHECKING:
    from openai import AsyncOpenAI

STOP_AFTER = 10  # suspect failures in a row: the endpoint is down, or every request is wrong in the same way
CONNECT_SECONDS = 10.0
PLACEHOLDER = 16  # a key of fewer characters may be a word, such as EMPTY, that an answer may hold, too


class EndpointClient:
    """Asks an OpenAI-compatible endpoint; see `purld.clients.base.Client`."""

    def __init__(self, endpoint: OpenAIEndpoint, ledger: Ledger, role: Role, resend_unknown: bool = False) -> None:
        self.endpoint = endpoint
        self.ledger = ledger
        self.role: Role = role
        self.resend_unknown = resend_unknown
        self._key = read_api_key(endpoint)

    def ask(self, prompts: Sequence[Prompt], on_reply: OnReply | None = None) -> list[Reply]:
        """See `Client.ask`. On Ctrl-C the calls under way become `unknown`; all that was answered is kept."""
        keys = [request.key for request in build_requests(self.endpoint, prompts)]
        self.ledger.adopt(dict.fromkeys(keys), self.role)
        delivery = ReplyCollector(keys, on_reply)
        wanted: deque[Prompt] = deque()
        for key, place in delivery.questions():
            if known := reply_from_ledger(self.ledger, key, self.resend_unknown):
                delivery.deliver(key, known)
            else:
                wanted.append(prompts[place])
        if wanted:
            asyncio.run(_Purchase(self, self._key, wanted, delivery).run())
        return delivery.in_order()


class _Purchase:
    """One `ask`: prompts still to be bought, and the workers that buy them."""

    def __init__(
        self, client: EndpointClient, key: str | None, wanted: deque[Prompt], delivery: ReplyCollector
    ) -> None:
        self.endpoint = client.endpoint
        self.ledger = client.ledger
        self.role: Role = client.role
        self.caps = Caps(self.endpoint.max_calls, self.endpoint.max_tokens, self.endpoint.max_cost)
        self.key = key
        self.wanted = wanted
        self.delivery = delivery
        self.pacer = RateLimiter(self.endpoint.requests_per_minute, self.endpoint.tokens_per_minute)
        self.under_way = 0
        self.suspects = 0
        self.stop: str | None = None
        self.stopped = asyncio.Event()
        self.settled = asyncio.Event()

    async def run(self) -> None:
        async with _open_http(self.endpoint, self.key) as http:
            workers = [
                asyncio.create_task(self._work(http)) for _ in range(min(self.endpoint.concurrency, len(self.wanted)))
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if self.stop:
            raise UserError(self.stop)

    async def _work(self, http: AsyncOpenAI) -> None:
        while self.wanted and not self.stop:
            prompt = self.wanted.popleft()
            try:
                request = await asyncio.to_thread(build_request, self.endpoint, prompt)
            except UserError as gone:
                # An image is: what is under way may be paid for and is waited for.
                self._stop(str(gone))
                break
            reply = await self._buy(http, request, *worst_case_tokens(self.endpoint, prompt))
            if reply:
                self.delivery.deliver(request.key, reply)

    async def _buy(self, http: AsyncOpenAI, request: Request, input_tokens: int, output_tokens: int) -> Reply | None:
        """One prompt's reply, after as many calls as its faults allow; None if the purchase was stopped."""
        outcome = None
        for attempt in range(self.endpoint.retries + 1):
            try:
                call = await self._reserve(request, input_tokens, output_tokens)
            except CapReachedError as cap:
                return reply_from_result(outcome.result) if outcome else Reply("capped", detail=f"{cap} is reached")
            except UserError as full:
                # The disk is: nothing more may leave, but what is under way may be paid for and is waited for.
                self._stop(str(full))
                break
            outcome = await self._call(http, request, call, input_tokens + output_tokens)
            if outcome is None or not outcome.repeat or attempt == self.endpoint.retries:
                break
            await self._sleep(self._wait_before(attempt, outcome))
            if self.stop:
                break
        if outcome is None:
            return None
        self._watch(outcome)
        return reply_from_result(outcome.result)

    async def _reserve(self, request: Request, input_tokens: int, output_tokens: int) -> int:
        """Book the worst case. Under a cap, wait for the calls under way: they may turn out cheaper."""
        cost = token_cost(self.endpoint, input_tokens, output_tokens)
        while True:
            try:
                call = self.ledger.reserve(request, self.role, input_tokens + output_tokens, cost, self.caps)
            except CapReachedError:
                if not self.under_way:
                    raise
                await self.settled.wait()
            else:
                self.under_way += 1
                return call

    async def _call(self, http: AsyncOpenAI, request: Request, call: int, tokens: int) -> CallOutcome | None:
        """Send one reserved call and settle it. Whatever breaks in here, the ledger ends up true."""
        sent = settled = False
        try:
            await self._sleep(self.pacer.book(tokens, time.monotonic()))
            if self.stop:
                return None
            self.ledger.sent(call)
            sent = True
            outcome = await _post(http, request.body, self.endpoint, self.key)
            self.ledger.settle(call, outcome.result)
            settled = True
            if usage := outcome.result.usage:
                self.pacer.give_back(tokens, usage.input_tokens + usage.output_tokens)
            return outcome
        finally:
            if not sent:
                self.ledger.release(call)
            elif not settled:
                self.ledger.settle(call, CallResult("unknown", error="interrupted"))
            self.under_way -= 1
            self.settled.set()
            self.settled = asyncio.Event()

    def _wait_before(self, attempt: int, outcome: CallOutcome) -> float:
        wait = backoff_seconds(attempt, outcome.retry_after)
        if outcome.retry_after is not None:
            self.pacer.pause(outcome.retry_after, time.monotonic())
        return wait

    def _watch(self, outcome: CallOutcome) -> None:
        """Stop when no call can go better, or when too many in a row failed to be chance."""
        self.suspects = self.suspects + 1 if outcome.suspect else 0
        reason = outcome.stop
        if self.suspects >= STOP_AFTER:
            cause = describe_failure(outcome.result)
            reason = f"{self.endpoint.base_url}: {self.suspects} prompts in a row failed ({cause})."
        if reason:
            self._stop(reason)

    def _stop(self, reason: str) -> None:
        """Let nothing more leave, and wait for what is under way; the first reason is the one that is told."""
        self.stop = self.stop or reason
        self.stopped.set()

    async def _sleep(self, seconds: float) -> None:
        """Wait, but no longer than until the purchase is stopped."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.stopped.wait()


def _open_http(endpoint: OpenAIEndpoint, key: str | None) -> AsyncOpenAI:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

    timeout = Timeout(endpoint.timeout, connect=min(CONNECT_SECONDS, endpoint.timeout / 2))
    # A redirect would take the prompts to an address nobody agreed to, a proxy those for this very machine.
    local = urlsplit(endpoint.base_url).hostname in ("127.0.0.1", "::1", "localhost")
    try:
        transport = DefaultAsyncHttpxClient(timeout=timeout, follow_redirects=False, trust_env=not local)
    except (OSError, ValueError) as error:
        raise UserError(f"this machine's proxy or certificate settings cannot be used ({error}).") from None
    return AsyncOpenAI(
        api_key=key or "none",  # without one, the SDK would send OPENAI_API_KEY to a server it is not meant for
        base_url=endpoint.base_url,
        timeout=timeout,
        max_retries=0,
        default_headers={"Connection": "close"},
        http_client=transport,
    )


async def _post(http: AsyncOpenAI, body: str, endpoint: OpenAIEndpoint, key: str | None) -> CallOutcome:
    """One HTTP call. Its deadline covers the whole: a server that drips a byte a second is late, too."""
    import openai

    try:
        async with asyncio.timeout(endpoint.timeout):
            response = await http.post(
                "/chat/completions",
                cast_to=openai.HttpxBinaryResponseContent,
                content=body.encode("ascii"),
                options={"headers": {"Content-Type": "application/json"}},
            )
        status, headers, content = 200, response.response.headers, response.content
    except openai.APIStatusError as error:
        status, headers, content = error.status_code, error.response.headers, error.response.content
    except (openai.APIError, TimeoutError) as error:
        return classify_exception(error)
    text = content.decode("utf-8", "replace")
    # Some servers quote the key, most of them when they refuse it.
    if key and (status != 200 or len(key) >= PLACEHOLDER):
        text = _without_key(text, key)
    return classify_response(status, headers, text, endpoint, time.time())


def _without_key(text: str, key: str) -> str:
    """`text` without the key, also where JSON writes its characters as escapes."""
    written = (rf"\\*(?:{re.escape(letter)}|u00(?i:{ord(letter):02x}))" for letter in key)
    return re.sub("".join(written), "[key]", text)
