"""What came back over HTTP, told apart: an answer, or which fault, and whether asking again can cost twice.

Pure functions: no sockets, no clocks but the one handed in, no ledger. The rule for repeating a call: only
what cannot have been billed, which is what never left and what the endpoint itself turned away.
"""

from __future__ import annotations

import email.utils
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from purld.clients.ledger import CallResult, Usage
from purld.clients.requests import token_cost
from purld.config.schema import OpenAIEndpoint

MAX_RAW = 20_000  # characters of a failed body that are kept
# A gateway's timeout says nothing about the model behind it: the answer may have been made, and billed.
LOST = (504, 522, 524)
TURNED_AWAY = (408, 409, 425, 429, 500, 502, 503, 520, 521, 529)
CONTEXT = re.compile(r"context.{0,20}length|context.{0,20}window|maximum context|too many tokens|prompt is too long")
FILTER = re.compile(r"content_filter|content management policy|content_policy")


@dataclass(frozen=True)
class CallOutcome:
    """How a call ended, and what that means for the calls after it."""

    result: CallResult
    repeat: bool = False
    retry_after: float | None = None  # seconds that the endpoint asked for
    stop: str | None = None  # a sentence: no other call can go better
    suspect: bool = False  # the fault may be the endpoint's rather than the prompt's


def classify_response(
    status: int, headers: Mapping[str, str], body: str, endpoint: OpenAIEndpoint, now: float
) -> CallOutcome:
    """Tell apart what an endpoint sent. `now` is the time in seconds since 1970."""
    if status == 200:
        return parse_completion(body, endpoint)
    message, code = _error_of(body)
    shown = f"http_{status}" + (f": {message}" if message else "")
    failed = CallResult("failed", error=shown, raw=body[:MAX_RAW], billable=False)
    match status:
        case 401:
            return CallOutcome(failed, stop=_wrong_key(endpoint))
        case 404:
            return CallOutcome(failed, stop=_not_found(endpoint, message))
        case 429 if code in ("insufficient_quota", "billing_hard_limit_reached"):
            return CallOutcome(
                failed, stop=f"{endpoint.base_url}: the account's quota is used up (HTTP 429: {message})."
            )
        case _ if status in LOST:
            return CallOutcome(CallResult("unknown", error=f"http_{status}", raw=body[:MAX_RAW]), suspect=True)
        case _ if status in TURNED_AWAY:
            return CallOutcome(
                CallResult("failed", error=f"http_{status}", raw=body[:MAX_RAW], billable=False),
                repeat=True,
                retry_after=parse_retry_after(headers, now),
                suspect=True,
            )
        case 400 | 413 | 422:
            return _read_rejection(failed, code, message)
        case _ if 300 <= status < 400:
            said = "redirects elsewhere, and prompts are sent to no address but the configured one"
            return CallOutcome(failed, stop=f"{endpoint.base_url}: {said} (HTTP {status}).")
        case _:
            return CallOutcome(failed, suspect=True)


def parse_completion(body: str, endpoint: OpenAIEndpoint) -> CallOutcome:
    """The answer in a 200 response, or what is wrong with it. Such a call may have been billed: no repeat."""
    try:
        data = json.loads(body)
        choice = data["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text, refusal = message.get("content"), message.get("refusal")
        finish = finish if isinstance(finish, str) else None
        usage = _read_usage(data.get("usage"), endpoint)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return CallOutcome(CallResult("failed", error="invalid_response", raw=body[:MAX_RAW]), suspect=True)
    if isinstance(refusal, str) and refusal.strip() and not text:
        return CallOutcome(CallResult("answered", _clean(refusal), "refusal", usage=usage))
    if finish == "content_filter":
        return CallOutcome(CallResult("answered", _clean(text) if isinstance(text, str) else None, finish, usage=usage))
    if not isinstance(text, str) or not text.strip():
        return CallOutcome(CallResult("failed", None, finish, "empty_answer", body[:MAX_RAW], usage), suspect=True)
    return CallOutcome(CallResult("answered", _clean(text), finish, usage=usage))


def classify_exception(error: BaseException) -> CallOutcome:
    """Tell apart what broke a call: whether anything can have reached the endpoint."""
    # By name: which HTTP library the SDK stands on, and so whose classes these are, depends on its version.
    names = {type(cause).__name__ for cause in _causes(error)}
    reason = str(_causes(error)[-1]) or type(error).__name__
    # A connection that never stood carried no request. A local protocol error is a request never written.
    if names & {"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "LocalProtocolError"}:
        result = CallResult("failed", error="no_connection", raw=reason[:MAX_RAW], billable=False, left=False)
        return CallOutcome(result, repeat=True, suspect=True)
    late = isinstance(error, TimeoutError) or any("Timeout" in name for name in names)
    return CallOutcome(CallResult("unknown", error="timeout" if late else "connection_lost", raw=reason), suspect=True)


def parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait by a Retry-After header, which holds seconds or a date (RFC 9110, section 10.2.3)."""
    text = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(text)) if re.fullmatch(r"\d+(\.\d+)?", text) else max(0.0, _date(text) - now)
    except (ValueError, TypeError, OverflowError):
        return None


def _date(text: str) -> float:
    return email.utils.parsedate_to_datetime(text).timestamp()


def _read_rejection(failed: CallResult, code: str, message: str) -> CallOutcome:
    """A request that the endpoint understood and will not serve: is it this prompt, or every one?"""
    words = f"{code} {message}".lower()
    if CONTEXT.search(words):
        return CallOutcome(CallResult("failed", error="context_too_long", raw=failed.raw, billable=False))
    if FILTER.search(words):
        return CallOutcome(CallResult("failed", error="content_filter", raw=failed.raw, billable=False))
    return CallOutcome(failed, suspect=True)


def _read_usage(usage: Any, endpoint: OpenAIEndpoint) -> Usage | None:
    """The reported usage, or None if it is not two counts: then the worst case stays booked."""
    if not isinstance(usage, dict):
        return None
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if _is_count(read) and _is_count(written):
        return Usage(read, written, token_cost(endpoint, read, written))
    return None


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**53


def _error_of(body: str) -> tuple[str, str]:
    """The message and the code of an error body in OpenAI's form, as far as there are any."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return "", ""
    if isinstance(error, str):
        return _one_line(error), ""
    if not isinstance(error, dict):
        return "", ""
    return _one_line(str(error.get("message") or "")), str(error.get("code") or error.get("type") or "")


def _one_line(text: str) -> str:
    return " ".join(_clean(text).split())[:200]


def _clean(text: str) -> str:
    """`text` with lone surrogates, which neither files nor the ledger can hold, replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while cause := chain[-1].__cause__:
        chain.append(cause)
    return chain


def _wrong_key(endpoint: OpenAIEndpoint) -> str:
    if endpoint.api_key_env:
        place = f"the key in the environment variable {endpoint.api_key_env}"
    elif endpoint.api_key_file:
        place = f"the key in the file {endpoint.api_key_file}"
    else:
        place = "a call without a key (api_key_env names the environment variable that holds one)"
    return f"{endpoint.base_url}: refuses {place} (HTTP 401)."


def _not_found(endpoint: OpenAIEndpoint, message: str) -> str:
    said = f": {message}" if message else ""
    return f"{endpoint.base_url}: has no model {endpoint.model!r}, or no chat completions there (HTTP 404{said})."
