"""Classify what an HTTP call returned: an answer, or which fault, and whether the call may be repeated.

A call is repeated only if it cannot have been billed: it was never sent, or the endpoint itself rejected it. Pure
functions, without sockets, clocks or the ledger.
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
from purld.config.clients import OpenAIEndpoint

MAX_RAW = 20_000  # characters kept of the body of a failed call
# After a gateway timeout, the model behind it may still have generated an answer, and billed it.
LOST = (504, 522, 524)
REJECTED = (408, 409, 425, 429, 500, 502, 503, 520, 521, 529)
CONTEXT = re.compile(r"context.{0,20}length|context.{0,20}window|maximum context|too many tokens|prompt is too long")
FILTER = re.compile(r"content_filter|content management policy|content_policy")


@dataclass(frozen=True)
class CallOutcome:
    """The end of a call, and its consequences for later calls."""

    result: CallResult
    repeat: bool = False
    retry_after: float | None = None  # seconds that the endpoint asked to wait
    stop: str | None = None  # one sentence that says why every further call would fail
    suspect: bool = False  # the fault may be the endpoint's, not the prompt's


def classify_response(
    status: int, headers: Mapping[str, str], body: str, endpoint: OpenAIEndpoint, now: float
) -> CallOutcome:
    """Classify an endpoint's response; `now` is the time in seconds since 1970."""
    if status == 200:
        return parse_completion(body, endpoint)
    message, code = _parse_error(body)
    error = f"http_{status}" + (f": {message}" if message else "")
    failed = CallResult("failed", error=error, raw=body[:MAX_RAW], billable=False)
    match status:
        case 401:
            return CallOutcome(failed, stop=_describe_wrong_key(endpoint))
        case 404:
            return CallOutcome(failed, stop=_describe_not_found(endpoint, message))
        case 429 if code in ("insufficient_quota", "billing_hard_limit_reached"):
            return CallOutcome(
                failed, stop=f"{endpoint.base_url}: the account's quota is used up (HTTP 429: {message})."
            )
        case _ if status in LOST:
            return CallOutcome(CallResult("unknown", error=f"http_{status}", raw=body[:MAX_RAW]), suspect=True)
        case _ if status in REJECTED:
            return CallOutcome(
                CallResult("failed", error=f"http_{status}", raw=body[:MAX_RAW], billable=False),
                repeat=True,
                retry_after=parse_retry_after(headers, now),
                suspect=True,
            )
        case 400 | 413 | 422:
            return _classify_rejection(failed, code, message)
        case _ if 300 <= status < 400:
            reason = "redirects to another address, but prompts are sent only to the configured one"
            return CallOutcome(failed, stop=f"{endpoint.base_url}: {reason} (HTTP {status}).")
        case _:
            return CallOutcome(failed, suspect=True)


def parse_completion(body: str, endpoint: OpenAIEndpoint) -> CallOutcome:
    """Parse a response with status 200. Such a call may have been billed and is never repeated."""
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
    """Classify an exception by whether the request can have reached the endpoint."""
    # Compared by name, because the SDK's version decides which HTTP library defines these classes.
    names = {type(cause).__name__ for cause in _causes(error)}
    reason = str(_causes(error)[-1]) or type(error).__name__
    # With these errors no request was sent: there was no connection, or the request could not be written.
    if names & {"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "LocalProtocolError"}:
        result = CallResult("failed", error="no_connection", raw=reason[:MAX_RAW], billable=False, left=False)
        return CallOutcome(result, repeat=True, suspect=True)
    timed_out = isinstance(error, TimeoutError) or any("Timeout" in name for name in names)
    error_class = "timeout" if timed_out else "connection_lost"
    return CallOutcome(CallResult("unknown", error=error_class, raw=reason), suspect=True)


def parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds to wait by a Retry-After header, which holds seconds or a date (RFC 9110, section 10.2.3)."""
    text = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(text)) if re.fullmatch(r"\d+(\.\d+)?", text) else max(0.0, _parse_date(text) - now)
    except (ValueError, TypeError, OverflowError):
        return None


def _parse_date(text: str) -> float:
    return email.utils.parsedate_to_datetime(text).timestamp()


def _classify_rejection(failed: CallResult, code: str, message: str) -> CallOutcome:
    """Classify a rejected request: the prompt is too long or filtered, or possibly every request is wrong."""
    text = f"{code} {message}".lower()
    if CONTEXT.search(text):
        return CallOutcome(CallResult("failed", error="context_too_long", raw=failed.raw, billable=False))
    if FILTER.search(text):
        return CallOutcome(CallResult("failed", error="content_filter", raw=failed.raw, billable=False))
    return CallOutcome(failed, suspect=True)


def _read_usage(usage: Any, endpoint: OpenAIEndpoint) -> Usage | None:
    """Return the reported usage, or None if it is not two counts; the worst case then stays booked."""
    if not isinstance(usage, dict):
        return None
    input_tokens, output_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if _is_count(input_tokens) and _is_count(output_tokens):
        return Usage(input_tokens, output_tokens, token_cost(endpoint, input_tokens, output_tokens))
    return None


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**53


def _parse_error(body: str) -> tuple[str, str]:
    """Return the message and code of an error body in OpenAI's format, empty where missing."""
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
    """Replace lone surrogates, which neither files nor the ledger can store."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while cause := chain[-1].__cause__:
        chain.append(cause)
    return chain


def _describe_wrong_key(endpoint: OpenAIEndpoint) -> str:
    if endpoint.api_key_env:
        refused = f"the key in the environment variable {endpoint.api_key_env}"
    elif endpoint.api_key_file:
        refused = f"the key in the file {endpoint.api_key_file}"
    else:
        refused = "a call without a key; set api_key_env to the environment variable that holds one"
    return f"{endpoint.base_url}: refuses {refused} (HTTP 401)."


def _describe_not_found(endpoint: OpenAIEndpoint, message: str) -> str:
    detail = f": {message}" if message else ""
    return f"{endpoint.base_url}: has no model {endpoint.model!r}, or no chat completions API (HTTP 404{detail})."
