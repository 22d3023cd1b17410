"""The calls of a batch API: upload a file, create a batch, look at it, cancel it, read its files.

None of these calls is billed, so all but one may be made again. Whether a lost attempt to create a batch created it is
asked by `find`. Ids are checked before they become part of an address.
"""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlencode

from purld.clients.batch_format import OVERHEAD_BYTES, BatchStatus, endpoint_path, read_batch, read_id
from purld.clients.completion import parse_json
from purld.clients.error_bodies import read_error
from purld.clients.faults import classify_response, decode_body, parse_retry_after
from purld.clients.redaction import KeyRedactor
from purld.clients.transport import Line, Response, body_limit, exchange, read_lines
from purld.config.clients import OpenAIEndpoint
from purld.errors import one_line

if TYPE_CHECKING:
    from httpx2 import AsyncClient, Request

ANSWER_BYTES = 4 * 2**20  # of an object of the API, or a page of a list
LEAST_UPLOAD_RATE = 125_000  # bytes a second; a slower upload is given up
PAGE, MOST_PAGES = 100, 20  # of the list of batches in which a lost one is looked for
CLOCKS_APART = 3600.0  # seconds by which the endpoint's clock may differ from this one


OnWait = Callable[[int, int, str], None]
"""Receives the number of prompts done, that of all, and a line about the batches that are waited for."""


@dataclass(frozen=True)
class ApiReply:
    """What a call of the batch API returned.

    Attributes:
        data: the object, if the call succeeded and returned one.
        status: the HTTP status; None if no response came.
        said: the reason of a failure, as the end of a sentence.
        stop: one sentence, if every further call would fail.
        retry_after: seconds that the endpoint asked to wait.
        sent: False if nothing can have reached the endpoint.
        too_large: the file is larger than the endpoint accepts.
    """

    data: dict[str, Any] | None = None
    status: int | None = None
    said: str = ""
    stop: str | None = None
    retry_after: float | None = None
    sent: bool = True
    too_large: bool = False

    @property
    def refused(self) -> bool:
        """Return whether the endpoint has certainly not done what it was asked for."""
        return not self.sent or (self.status is not None and 400 <= self.status < 500 and self.status not in (408, 409))

    @property
    def passing(self) -> bool:
        """Return whether the fault may be gone a moment later."""
        return self.stop is None and (self.status is None or self.status in (408, 409, 425, 429) or self.status >= 500)


@dataclass(frozen=True)
class FoundBatch:
    """Whether the endpoint has a batch whose creation was lost."""

    answer: Literal["found", "absent", "unknown"]
    batch: BatchStatus | None = None


class BatchApi:
    """The batch API of an endpoint.

    Args:
        http: the HTTP client.
        endpoint: the endpoint.
        redactor: removes the key from what the endpoint says.
        setting: the key of the configuration that asks for batches, for messages.
    """

    def __init__(self, http: AsyncClient, endpoint: OpenAIEndpoint, redactor: KeyRedactor, setting: str) -> None:
        self._http = http
        self._endpoint = endpoint
        self._redactor = redactor
        self._setting = setting

    async def upload(self, content: bytes, token: str) -> ApiReply:
        """Upload the input file of a batch."""
        file = (f"purld-{token}.jsonl", content, "application/jsonl")
        request = self._http.build_request(
            "POST", f"{self._endpoint.base_url}/files", data={"purpose": "batch"}, files={"file": file}
        )
        return await self._call(request, self._endpoint.timeout + len(content) / LEAST_UPLOAD_RATE)

    async def create(self, file_id: str, token: str, with_metadata: bool = True) -> ApiReply:
        """Create a batch of an uploaded file, marked by a token."""
        values: dict[str, Any] = {
            "input_file_id": file_id,
            "endpoint": endpoint_path(self._endpoint.base_url),
            "completion_window": "24h",
        }
        if with_metadata:
            values["metadata"] = {"purld": token}
        headers = {"Content-Type": "application/json", "Idempotency-Key": token}
        url = f"{self._endpoint.base_url}/batches"
        return await self._call(self._http.build_request("POST", url, content=json.dumps(values), headers=headers))

    async def retrieve(self, batch_id: str) -> ApiReply:
        """Ask for the status of a batch."""
        return await self._call(self._get(f"/batches/{batch_id}"), known=True)

    async def cancel(self, batch_id: str) -> ApiReply:
        """Cancel a batch; what it has executed so far is billed and can be read."""
        url = f"{self._endpoint.base_url}/batches/{batch_id}/cancel"
        headers = {"Content-Type": "application/json"}
        return await self._call(self._http.build_request("POST", url, content="{}", headers=headers), known=True)

    async def find(self, file_id: str, token: str, since: float) -> FoundBatch:
        """Look for a batch in the endpoint's list, by its input file or its token.

        Args:
            file_id: the id of its input file.
            token: the token in its metadata.
            since: when it was submitted, in seconds since 1970; older batches are not looked at.

        Returns:
            `absent` only if the whole list was read and the input file is there, so that the key is of the same
            account.
        """
        after = ""
        for _ in range(MOST_PAGES):
            query = urlencode({"limit": PAGE} | ({"after": after} if after else {}))
            page = await self._call(self._get(f"/batches?{query}"))
            rows = page.data.get("data") if page.data else None
            if not isinstance(rows, list):
                return FoundBatch("unknown")
            rows = [row for row in rows if isinstance(row, dict)]
            for row in rows:
                if row.get("input_file_id") == file_id or _token_of(row) == token:
                    batch = read_batch(row, self._redactor)
                    return FoundBatch("found" if batch else "unknown", batch)
            last = read_id(rows[-1].get("id")) if rows else None
            if last is None or last == after or not (page.data or {}).get("has_more") or _older(rows[-1], since):
                known = await self._call(self._get(f"/files/{file_id}"))
                return FoundBatch("absent" if known.data is not None else "unknown")
            after = last
        return FoundBatch("unknown")

    async def lines(self, file_id: str) -> AsyncIterator[Line | ApiReply]:
        """Yield the lines of a file; if it cannot be read to its end, the reason as the last value."""
        import httpx2

        limit = body_limit(self._endpoint) + OVERHEAD_BYTES
        try:
            async for item in read_lines(self._http, self._get(f"/files/{file_id}/content"), limit):
                yield self._failure(item, known=True) if isinstance(item, Response) else item
        except (httpx2.HTTPError, TimeoutError, OSError, zlib.error) as error:
            yield self._lost(error)

    def _get(self, path: str) -> Request:
        return self._http.build_request("GET", self._endpoint.base_url + path)

    async def _call(self, request: Request, seconds: float | None = None, known: bool = False) -> ApiReply:
        import httpx2

        deadline = asyncio.get_running_loop().time() + (seconds or self._endpoint.timeout)
        try:
            response = await exchange(self._http, request, deadline, ANSWER_BYTES)
        except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError, OSError) as error:
            return self._lost(error)
        if not 200 <= response.status < 300:
            return self._failure(response, known)
        data = None if response.too_large else parse_json(_text_of(response))
        if not isinstance(data, dict):
            return ApiReply(None, response.status, "the response is no object of a batch API")
        return ApiReply(data, response.status)

    def _lost(self, error: BaseException) -> ApiReply:
        never = ("ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "InvalidURL", "UnsupportedProtocol")
        name = type(error).__name__
        said = "no connection" if name in never else "the connection broke or timed out"
        return ApiReply(said=said, sent=name not in never)

    def _failure(self, response: Response, known: bool = False) -> ApiReply:
        """Return what an error says; of a `known` object of the API, a 404 says that it is gone."""
        text = _text_of(response)
        error = read_error(parse_json(text), text)
        said = one_line(self._redactor.redact(error.message))
        named = f"HTTP {response.status}" + (f": {said}" if said else "")
        return ApiReply(
            None,
            response.status,
            named,
            None if known and response.status == 404 else self._reason_to_stop(response, text, named),
            parse_retry_after(response.headers, time.time()),
            too_large=response.status == 413,
        )

    def _reason_to_stop(self, response: Response, text: str, named: str) -> str | None:
        """Return one sentence if a batch cannot be asked for at all."""
        if response.status in (404, 405, 501):
            return (
                f"{self._endpoint.base_url}: has no batch API ({named}); set {self._setting} to false, which asks one "
                "call at a time."
            )
        return classify_response(
            response.status, response.headers, text, self._endpoint, time.time(), self._redactor
        ).stop


def _token_of(row: dict[str, Any]) -> object:
    metadata = row.get("metadata")
    return metadata.get("purld") if isinstance(metadata, dict) else None


def _older(row: dict[str, Any], since: float) -> bool:
    """Return whether a batch, and so all that follow it in the list, is older than a time."""
    created = row.get("created_at")
    return isinstance(created, int | float) and created < since - CLOCKS_APART


def _text_of(response: Response) -> str:
    return decode_body(response.content, response.headers.get("content-type", ""))
