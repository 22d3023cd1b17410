"""Classify what an HTTP call returned: an answer, or which fault, and whether the call may be repeated.

A call is repeated only if it cannot have been billed: it was never sent, or the endpoint itself rejected it. Pure
functions, without sockets, clocks or the ledger. What leaves this module never holds the API key and is printable.
"""

from __future__ import annotations

import email.utils
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from purld.clients.completion import MAX_RAW, is_cut_completion, parse_body, read_completion, reports_output
from purld.clients.error_bodies import EndpointError, read_error
from purld.clients.finish_reasons import FinishKind, finish_kind
from purld.clients.ledger import CallResult
from purld.clients.redaction import KeyRedactor
from purld.config.clients import OpenAIEndpoint
from purld.errors import one_line

# After a gateway timeout, the model behind it may still have generated an answer, and billed it.
LOST = (504, 522, 524)
REJECTED = (408, 409, 425, 429, 500, 502, 503, 520, 521, 529)
QUOTA_CODES = ("insufficient_quota", "billing_hard_limit_reached")
# Only encodings of text: Python's table also holds codecs that are slow or compress.
NAMED_ENCODING = re.compile(
    r"charset=\"?((?:iso-8859|windows-125|cp125|latin|gb|big5|shift_jis|euc|koi8)[a-z0-9_-]{0,12})"
)
NO_KEY = KeyRedactor(None)


@dataclass(frozen=True)
class CallOutcome:
    """The end of a call, and its consequences for later calls."""

    result: CallResult
    repeat: bool = False
    unusable: bool = False  # it may be billed and holds no answer, but another attempt may
    retry_after: float | None = None  # seconds that the endpoint asked to wait
    stop: str | None = None  # one sentence that says why every further call would fail
    suspect: bool = False  # the fault may be the endpoint's, not the prompt's
    stop_if_first: str | None = None  # as `stop`, unless this endpoint has answered before


def classify_response(
    status: int,
    headers: Mapping[str, str],
    body: str,
    endpoint: OpenAIEndpoint,
    now: float,
    redactor: KeyRedactor = NO_KEY,
) -> CallOutcome:
    """Classify an endpoint's response; `now` is the time in seconds since 1970."""
    data = parse_body(body)
    if 200 <= status < 300:
        outcome = _classify_success(data, body, headers, endpoint, now, redactor)
    else:
        outcome = _Rejection(status, read_error(data, body), body, headers, endpoint, now, redactor).classify()
    return replace(outcome, result=redactor.redact_result(outcome.result))


def _classify_success(
    data: object, body: str, headers: Mapping[str, str], endpoint: OpenAIEndpoint, now: float, redactor: KeyRedactor
) -> CallOutcome:
    """Classify a response with a status of success. An answer may have been billed and is never repeated."""
    result = read_completion(data, body, endpoint)
    if result is None and data is None and is_cut_completion(body):
        return CallOutcome(CallResult("answered", error="cut_response", raw=body), unusable=True, suspect=True)
    if result is not None and result.error != "empty_answer":
        return CallOutcome(
            result, suspect=result.text is None and finish_kind(result.finish_reason) != FinishKind.REFUSED
        )
    error = _error_within(data)
    paid = reports_output(data)  # also in a usage that cannot be booked
    if error is not None and error.status is not None and not paid:
        return _Rejection(error.status, error, body, headers, endpoint, now, redactor, named=True).classify()
    if error is not None and error.message:
        words = f"http_200: {redactor.redact(error.message)}"
        usage = result.usage if result else None
        finish = result.finish_reason if result else None
        failed = CallResult("answered" if paid else "failed", None, finish, words, body[:MAX_RAW], usage)
    else:
        failed = result or CallResult("failed", error="invalid_response", raw=body[:MAX_RAW])
    hint = _version_hint(endpoint) if result is None else ""
    first = f"{endpoint.base_url}: the response is not a chat completion{hint}." if hint else None
    return CallOutcome(failed, unusable=failed.state == "answered", suspect=True, stop_if_first=first)


def _error_within(data: object) -> EndpointError | None:
    """Return the error in a body that was sent with a status of success, or None if there is none."""
    if isinstance(data, dict) and isinstance(choices := data.get("choices"), list) and choices:
        first = choices[0] if isinstance(choices[0], dict) else {}
        data = first.get("error") or data.get("error")
        return read_error(data, "") if data else None
    return read_error(data, "") if isinstance(data, dict | list) else None


@dataclass(frozen=True)
class _Rejection:
    """A response that is an error, with what is needed to classify it.

    `named` says that the status stands in the body, of a response whose own status is a success.
    """

    status: int
    error: EndpointError
    body: str
    headers: Mapping[str, str]
    endpoint: OpenAIEndpoint
    now: float
    redactor: KeyRedactor
    named: bool = False

    @property
    def message(self) -> str:
        return self.redactor.redact(self.error.message)

    def classify(self) -> CallOutcome:
        """Return what became of the call. A rejected call cannot have been billed, unless a gateway gave up on it."""
        if stop := self._reason_to_stop():
            return CallOutcome(self._failed(self._words()), stop=stop)
        if self.status in LOST:
            lost = CallResult("unknown", error=self._words(), raw=self.body[:MAX_RAW])
            return CallOutcome(lost, suspect=True)
        if self.status in (400, 403, 413, 422, 500) and self.error.context_too_long:
            return CallOutcome(self._failed("context_too_long"))
        if self.status in (400, 403, 422, 451) and self.error.filtered:
            return CallOutcome(self._failed("content_filter"))
        if self.status in REJECTED:
            wait = parse_retry_after(self.headers, self.now)
            return CallOutcome(self._failed(self._words()), repeat=True, retry_after=wait, suspect=True)
        return CallOutcome(self._failed(self._words()), suspect=True)

    def _failed(self, error: str) -> CallResult:
        return CallResult("failed", error=error, raw=self.body[:MAX_RAW], billable=False)

    def _words(self) -> str:
        """Return the error's class; faults that pass have no message, so that one cause has one wording."""
        passing = self.status in LOST or self.status in REJECTED
        shown = self.message if self.named or not passing else ""
        return f"http_{self.status}" + (f": {shown}" if shown else "")

    def _reason_to_stop(self) -> str | None:
        """Return one sentence if every further call would fail in the same way."""
        where, said = self.endpoint.base_url, f": {self.message}" if self.message else ""
        match self.status:
            case 401:
                return _describe_wrong_key(self.endpoint)
            case 404 | 405:
                return self._describe_not_found()
            case 402:
                return f"{where}: asks for payment (HTTP 402{said})."
            case 429 if any(code in QUOTA_CODES for code in self.error.codes):
                return f"{where}: the account's quota is used up (HTTP 429{said})."
            case 400 | 422 if remedy := find_remedy(self.error.words, self.endpoint):
                return f"{where}: {self.message.rstrip('.')} (HTTP {self.status}); {remedy}."
            case _ if 300 <= self.status < 400:
                reason = "redirects to another address, but prompts are sent only to the configured one"
                return f"{where}: {reason} (HTTP {self.status})."
        return None

    def _describe_not_found(self) -> str:
        said = f": {self.message}" if self.message else ""
        missing = f"has no model {self.endpoint.model!r}, or no chat completions API"
        if self.status == 405:
            missing = "has no chat completions API"
        return f"{self.endpoint.base_url}: {missing} (HTTP {self.status}{said}){_version_hint(self.endpoint)}."


def find_remedy(words: str, endpoint: OpenAIEndpoint) -> str | None:
    """Return which key to change if an endpoint rejects a setting of every request, or None."""
    rejected = re.search(r"unsupported|not support|unrecognized|unknown|unexpected|not permitted|not allowed", words)
    if endpoint.token_limit_field == "max_tokens" and re.search(r"use.{0,20}max_completion_tokens", words):
        return "set token_limit_field to max_completion_tokens"
    if rejected and endpoint.token_limit_field == "max_completion_tokens" and "max_completion_tokens" in words:
        return "set token_limit_field to max_tokens"
    if endpoint.temperature is not None and re.search(
        r"temperature.{0,60}(support|only|permitted|allowed|deprecated|strictly|positive|must be|range)"
        r"|(unsupported|unrecognized|unknown).{0,60}temperature",
        words,
    ):
        return "set temperature to null, or to a value that this model accepts"
    limit = r"max_(completion_|output_|new_)?tokens.{0,80}(too large|at most|less than or equal|<=|range|maximum value)"
    if re.search(limit + r"|range of max_tokens", words) and not re.search(
        r"maximum context length|\+ `?max_(new_)?tokens|input length and", words
    ):
        return "lower max_tokens_per_answer"
    return None


def too_large(limit: int, start: str, redactor: KeyRedactor) -> CallOutcome:
    """Return the outcome of a call whose answer is longer than `limit` bytes; it may have been billed."""
    result = CallResult("unknown", error=f"too_large: {limit / 2**20:.0f} MiB", raw=start[:MAX_RAW])
    return CallOutcome(redactor.redact_result(result), suspect=True)


def wrong_encoding(encoding: str) -> CallOutcome:
    """Return the outcome of a call whose answer is compressed in a way that cannot be read; it may have been billed."""
    return CallOutcome(CallResult("unknown", error=f"compressed: {one_line(encoding, 40)}"), suspect=True)


def classify_exception(error: BaseException, redactor: KeyRedactor = NO_KEY) -> CallOutcome:
    """Classify an exception by whether the request can have reached the endpoint."""
    names = {type(cause).__name__ for cause in _causes(error)}
    reason = str(_causes(error)[-1]) or type(error).__name__
    # With these errors no request was sent: there was no connection, or the request could not be written.
    unsent = {"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "LocalProtocolError", "InvalidURL"}
    if names & (unsent | {"UnsupportedProtocol"}):
        result = CallResult("failed", error="no_connection", raw=reason[:MAX_RAW], billable=False, left=False)
        return CallOutcome(redactor.redact_result(result), repeat=True, suspect=True)
    timed_out = isinstance(error, TimeoutError) or any("Timeout" in name for name in names)
    error_class = "timeout" if timed_out else "connection_lost"
    result = CallResult("unknown", error=error_class, raw=reason[:MAX_RAW])
    return CallOutcome(redactor.redact_result(result), suspect=True)


def decode_body(content: bytes, content_type: str) -> str:
    """Decode a body: JSON's own encodings first, then the one that its header names; bad bytes are replaced."""
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        named = NAMED_ENCODING.search(content_type.lower())
        try:
            return content.decode(named[1] if named else "utf-8", "replace")
        except LookupError:
            return content.decode("utf-8", "replace")


def parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds to wait by a Retry-After header, which holds seconds or a date (RFC 9110, section 10.2.3).

    A date is compared with the response's own, because this machine's clock may be wrong.
    """
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    until, sent = _parse_date(text), _parse_date(headers.get("date", ""))
    return None if until is None else max(0.0, until - (now if sent is None else sent))


def _parse_date(text: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text.strip()[:100]).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


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


def _version_hint(endpoint: OpenAIEndpoint) -> str:
    """Return what to try if the address names no version of the API; most servers expect one."""
    if re.search(r"/v\d", urlsplit(endpoint.base_url).path):
        return ""
    return f"; base_url usually ends in /v1: try {endpoint.base_url}/v1"
