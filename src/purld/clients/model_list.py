"""Ask an endpoint for its list of models: a request that bills nothing and carries no prompt.

It is not part of the ledger, which records what may cost something, and only `purld doctor` makes it.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass

from purld.clients.error_bodies import read_error
from purld.clients.redaction import KeyRedactor
from purld.clients.transport import open_http
from purld.config.clients import OpenAIEndpoint
from purld.errors import one_line, reason_of
from purld.event_loops import run_async

SECONDS = 10.0  # for the whole request
_MOST_BYTES = 2**20


@dataclass(frozen=True)
class ModelList:
    """What came back when the list of models was asked for.

    Attributes:
        status: the HTTP status; None if there was no response.
        models: the names in the list, without the key; None if the response is no list.
        words: what the server or the connection said, without the key.
        seconds: how long it took.
        clock_error: how far this machine's clock is ahead of the server's, in seconds; None if it sent no date.
    """

    status: int | None
    models: list[str] | None = None
    words: str = ""
    seconds: float = 0.0
    clock_error: float | None = None


def fetch_model_list(endpoint: OpenAIEndpoint, key: str | None) -> ModelList:
    """Ask an endpoint for its models, within `SECONDS`.

    Raises:
        UserError: this machine's proxy or certificate settings cannot be used.
    """
    started = time.monotonic()
    brief = endpoint.model_copy(update={"timeout": min(SECONDS, endpoint.timeout)})
    found = run_async(_fetch(brief, key, KeyRedactor(key)))
    return ModelList(found.status, found.models, found.words, time.monotonic() - started, found.clock_error)


async def _fetch(endpoint: OpenAIEndpoint, key: str | None, redactor: KeyRedactor) -> ModelList:
    import httpx2

    body = bytearray()
    try:
        async with (
            asyncio.timeout(endpoint.timeout),
            open_http(endpoint, key) as http,
            http.stream("GET", f"{endpoint.base_url}/models") as response,
        ):
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > _MOST_BYTES:
                    break
            status, headers = response.status_code, response.headers
    except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError, OSError) as error:
        words = "no response in time" if isinstance(error, TimeoutError) else reason_of(_first_cause(error))
        return ModelList(None, words=one_line(redactor.redact(words)))
    return _read_response(status, headers, bytes(body[:_MOST_BYTES]), endpoint.model, redactor)


def _read_response(
    status: int, headers: Mapping[str, str], body: bytes, model: str, redactor: KeyRedactor
) -> ModelList:
    text = body.decode("utf-8", "replace")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if 200 <= status < 300:
        return ModelList(status, _names(data, model, redactor), clock_error=_clock_error(headers))
    words = one_line(redactor.redact(read_error(data, text).message))
    return ModelList(status, words=words, clock_error=_clock_error(headers))


def _names(data: object, model: str, redactor: KeyRedactor) -> list[str] | None:
    """Return the names in OpenAI's list of models, {"data": [{"id": …}]}; None if it is none.

    The name `model` of the configuration stays as it is, though it may hold a key that is only a placeholder.
    """
    rows = data.get("data") if isinstance(data, dict) else None
    if not isinstance(rows, list):
        return None
    names = [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row]
    return [name if name == model else one_line(redactor.redact(name)) for name in names]


def _clock_error(headers: Mapping[str, str]) -> float | None:
    try:
        return time.time() - email.utils.parsedate_to_datetime(headers.get("date", "")[:100]).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
