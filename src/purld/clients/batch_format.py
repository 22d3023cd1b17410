"""The files and objects of a batch API, as OpenAI defines them and other servers imitate them. Pure functions.

An input file is JSONL with a line per request. The endpoint answers in two files, in any order: one with the requests
that it executed, one with those that it did not. A line names its request by `custom_id`, which is the ledger's key.

Servers differ in the case and the words of a status, in empty ids instead of null, and in where they put errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, urlsplit

from purld.clients.batch_records import batch_name
from purld.clients.completion import MAX_RAW, parse_json
from purld.clients.error_bodies import read_error
from purld.clients.faults import CallOutcome, classify_response, too_large
from purld.clients.ledger import CallResult, Request
from purld.clients.redaction import KeyRedactor
from purld.config.clients import OpenAIEndpoint
from purld.errors import one_line

# OpenAI's limits of one batch; servers that imitate it take as many, or say that it is too large.
MAX_REQUESTS = 50_000
MAX_FILE_BYTES = 200 * 10**6
MAX_ERRORS = 20  # of a batch that are read
OVERHEAD_BYTES = 4 * 2**10  # of a line around the response's body
# Statuses in which nothing more happens to a batch.
ENDED = ("completed", "failed", "expired", "cancelled")
_SYNONYMS = {
    "canceled": "cancelled", "canceling": "cancelling", "progress": "in_progress", "running": "in_progress",
    "succeeded": "completed", "success": "completed", "done": "completed", "timeout": "expired",
}  # fmt: skip
_WORD = re.compile(r"[a-z_]{1,40}")  # a status is shown and stored, so a text of the server's is none
# Codes of a batch that is too large now: for the tokens that an account may have queued, or for one file.
TOO_MUCH = ("token_limit_exceeded", "too_many_tasks", "enqueued_token_limit_exceeded", "file_too_large")
_CUSTOM_ID = re.compile(rb'"custom_id"\s*:\s*"([0-9a-f]{64})"')
_ID = re.compile(r"[^\s/?#%]{1,256}")  # goes into an address


@dataclass(frozen=True)
class BatchStatus:
    """What the endpoint says of a batch.

    Attributes:
        id: the endpoint's id.
        status: one of OpenAI's statuses, another word of the server, or `unknown`.
        files: the ids of the output file and the error file, as far as there are any.
        completed: the number of requests that were executed; None if it is not told.
        done: the number that were executed or failed.
        total: the number of all; None if it is not told.
        errors: the messages about the batch as a whole.
        codes: the codes of these errors.
    """

    id: str
    status: str
    files: tuple[str, ...]
    completed: int | None
    done: int
    total: int | None
    errors: str
    codes: tuple[str, ...]

    @property
    def ended(self) -> bool:
        """Return whether nothing more happens to the batch."""
        return self.status in ENDED

    @property
    def lacks_files(self) -> bool:
        """Return whether the batch has ended and names no file of results, which some servers name late.

        Its counts do not tell that it needs none: they may be as late, and read 0 until then.
        """
        return self.ended and self.status != "failed" and not self.files

    def executed_nothing(self, calls: int) -> bool:
        """Return whether it is certain, without any file, that none of the batch's calls was executed.

        A count of 0 says so where those that failed make up the rest. A cancelled batch tells no reason for the rest.
        """
        all_failed = bool(self.total) and self.done >= max(self.total or 0, calls)
        return self.completed == 0 and (self.status == "cancelled" or all_failed)

    @property
    def too_much(self) -> bool:
        """Return whether the batch failed because it is too large now; a smaller or later one may pass."""
        words = f"{' '.join(self.codes)} {self.errors}".lower()
        return self.status == "failed" and (
            any(code in TOO_MUCH for code in self.codes) or bool(re.search(r"enqueued.{0,40}(token|limit)", words))
        )

    def described(self) -> str:
        """Return the status as a line of progress shows it."""
        counts = f", {self.done:,} of {self.total:,} done" if self.total else ""
        return f"{batch_name(self.id)}: {self.status.replace('_', ' ')}{counts}"


def input_line(request: Request) -> bytes:
    """Return the line of an input file for a request; its body is byte for byte that of a single call."""
    url = endpoint_path(request.base_url)
    head = f'{{"custom_id":"{request.key}","method":"POST","url":"{url}","body":'
    return f"{head}{request.body}}}\n".encode("ascii")


def endpoint_path(base_url: str) -> str:
    """Return the path by which a batch names chat completions: with the version that ends the base URL, else /v1."""
    last = urlsplit(base_url).path.rsplit("/", 1)[-1]
    return f"/{last if re.fullmatch(r'v[0-9][a-z0-9]*', last) else 'v1'}/chat/completions"


def read_id(value: object) -> str | None:
    """Return an id that can be part of an address, or None."""
    return quote(value, safe=":@!$&'()*+,;=~") if isinstance(value, str) and _ID.fullmatch(value) else None


def read_batch(data: object, redactor: KeyRedactor) -> BatchStatus | None:
    """Return what a parsed response says of a batch; None if it is no batch."""
    if not isinstance(data, dict) or not isinstance(status := data.get("status"), str):
        return None
    identity = read_id(data.get("id"))
    if identity is None or redactor.redact(identity) != identity:
        return None
    files = (read_id(data.get("output_file_id")), read_id(data.get("error_file_id")))
    counts = data.get("request_counts")
    counts = counts if isinstance(counts, dict) else {}
    completed, failed, total = (_count(counts.get(key)) for key in ("completed", "failed", "total"))
    message, codes = _read_errors(data.get("errors"))
    return BatchStatus(
        identity,
        _read_status(status, redactor),
        tuple(file for file in files if file),
        completed,
        (completed or 0) + (failed or 0),
        total,
        redactor.redact(message),
        codes,
    )


def _read_status(said: str, redactor: KeyRedactor) -> str:
    """Return a status in OpenAI's words; another single word as it is, and `unknown` for anything else."""
    word = said.strip().lower()
    word = _SYNONYMS.get(word, word)
    return word if word in ENDED or (_WORD.fullmatch(word) and redactor.redact(said) == said) else "unknown"


def _read_errors(errors: object) -> tuple[str, tuple[str, ...]]:
    """Return the messages and the codes about a batch as a whole, from a list of objects or texts."""
    items = errors.get("data", [errors]) if isinstance(errors, dict) else errors
    items = items[:MAX_ERRORS] if isinstance(items, list) else [items] if items else []
    said = [read_error({"error": item}, "") for item in items]
    messages = dict.fromkeys(error.message for error in said if error.message)
    return one_line("; ".join(messages)), tuple(dict.fromkeys(code for error in said for code in error.codes))


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 10**9 else None


@dataclass(frozen=True)
class LineOutcome:
    """What a line of an output or error file says about one request.

    Attributes:
        key: the request's key.
        outcome: the end of its call.
        executed: the request was executed, with whatever result.
    """

    key: str
    outcome: CallOutcome
    executed: bool


def read_line(
    content: bytes, too_long: bool, limit: int, endpoint: OpenAIEndpoint, now: float, redactor: KeyRedactor
) -> LineOutcome | None:
    """Return what a line says; None if it names no request. A response is classified as that of a single call.

    Args:
        content: the line, or its start.
        too_long: whether it is only the start.
        limit: the most bytes that are read of a line.
        endpoint: the endpoint, with the prices of a batch.
        now: the time in seconds since 1970.
        redactor: removes the key.
    """
    data = None if too_long else parse_json(content.decode("utf-8", "replace"))
    if not isinstance(data, dict):
        return _damaged_line(content, too_long, limit, endpoint, now, redactor)
    key = data.get("custom_id")
    if not isinstance(key, str):
        return None
    response, error = data.get("response"), data.get("error")
    if isinstance(response, dict) and (response.get("body") is not None or "choices" in response):
        status, body = _response_of(response)
        outcome = classify_response(status, {}, body, endpoint, now, redactor)
        return LineOutcome(key, outcome, executed=200 <= status < 300)
    return LineOutcome(key, _not_executed(error, endpoint, now, redactor), executed=False)


def _damaged_line(
    content: bytes, too_long: bool, limit: int, endpoint: OpenAIEndpoint, now: float, redactor: KeyRedactor
) -> LineOutcome | None:
    """Classify a line that is no JSON as a response of the same kind, if it still names its request."""
    found = _CUSTOM_ID.search(content[: 4 * MAX_RAW])
    if found is None:
        return None
    text = content.decode("utf-8", "replace")
    if too_long:
        return LineOutcome(found[1].decode(), too_large(limit, text[: 4 * MAX_RAW], redactor), executed=True)
    body = text.partition('"body"')[2].lstrip(" :") or text
    return LineOutcome(found[1].decode(), classify_response(200, {}, body, endpoint, now, redactor), executed=True)


def _response_of(response: Mapping[str, Any]) -> tuple[int, str]:
    """Return the status and the body of a line's response; some servers give no status, or the body as a text."""
    body = response.get("body", response if "choices" in response else None)
    status = response.get("status_code", response.get("status"))
    text = body if isinstance(body, str) else json.dumps(body)
    return status if type(status) is int and 100 <= status < 600 else 200, text


def _not_executed(error: object, endpoint: OpenAIEndpoint, now: float, redactor: KeyRedactor) -> CallOutcome:
    """Return the outcome of a request that the endpoint did not execute; it cannot have been billed."""
    said = read_error({"error": error}, "")
    for code in ("batch_expired", "batch_cancelled"):
        if code in said.codes or code.replace("cancelled", "canceled") in said.codes:
            return unexecuted(code)
    outcome = classify_response(said.status or 500, {}, json.dumps({"error": error}), endpoint, now, redactor)
    return replace(outcome, result=replace(outcome.result, billable=False))


def unexecuted(error: str) -> CallOutcome:
    """Return the outcome of a request that a batch left out, which cannot have been billed."""
    return CallOutcome(CallResult("failed", error=error, billable=False), repeat=True, suspect=True)
