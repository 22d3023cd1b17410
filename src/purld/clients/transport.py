"""Send one request over HTTP and read its response, within a limit of bytes and a deadline.

Nothing is read from the environment but proxies, certificates and what the configuration names: no other service's key,
organisation or headers can leave. Redirects and cookies are off.

Every call opens a new connection. On a kept-alive one, a server that closes while a request is being written cannot be
distinguished from one that received the request and died, so the call would count as lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from purld.config.clients import OpenAIEndpoint
from purld.errors import UserError, reason_of

if TYPE_CHECKING:
    from httpx2 import AsyncClient
    from httpx2 import Request as HttpRequest
    from httpx2 import Response as HttpResponse

CONNECT_SECONDS = 10.0
MIN_BODY_BYTES = 8 * 2**20  # read of an answer at least; a token has no more bytes than BYTES_PER_TOKEN in JSON
BYTES_PER_TOKEN = 128
ERROR_BODY_BYTES = 64 * 2**10
ERROR_BODY_SECONDS = 5.0
_PIECE_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Response:
    """A response as it came; the content of an error may be cut.

    Attributes:
        too_large: a successful response has more bytes than the limit; `content` is its start.
        encoding: the content encoding of a successful response that cannot be read, else empty.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes
    too_large: bool = False
    encoding: str = ""


def body_limit(endpoint: OpenAIEndpoint) -> int:
    """Return the most bytes that are read of an answer."""
    return max(MIN_BODY_BYTES, BYTES_PER_TOKEN * endpoint.max_tokens_per_answer)


def open_http(endpoint: OpenAIEndpoint, key: str | None) -> AsyncClient:
    """Return an HTTP client for an endpoint.

    Raises:
        UserError: the environment names a proxy or certificates that cannot be used.
    """
    import httpx2

    # A redirect would send the prompts to an address that is not configured; so would a proxy for a local server.
    address = urlsplit(endpoint.base_url)
    local = address.hostname in ("127.0.0.1", "::1", "localhost")
    headers = {
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "Connection": "close",
        "User-Agent": "purld",
    }
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        return httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(endpoint.timeout, connect=min(CONNECT_SECONDS, endpoint.timeout / 2)),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # takes none
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            follow_redirects=False,
            trust_env=not local,
            # Reading the certificates takes longer than a call; a local server without TLS needs none.
            verify=not (local and address.scheme == "http"),
        )
    except ImportError:
        raise UserError(
            "the environment names a SOCKS proxy (ALL_PROXY or HTTPS_PROXY), which needs the package socksio: "
            "`pip install socksio`, name an HTTP proxy instead, or except this host by NO_PROXY."
        ) from None
    except (OSError, ValueError) as error:
        # The address of a proxy may hold a password, which the message of the library repeats.
        reason = reason_of(error) if isinstance(error, OSError) else "an address in it is no URL"
        raise UserError(
            f"this machine's proxy or certificate settings cannot be used ({reason}): see ALL_PROXY, HTTPS_PROXY, "
            "HTTP_PROXY and SSL_CERT_FILE."
        ) from None


async def post(
    http: AsyncClient, endpoint: OpenAIEndpoint, body: str, idempotency_key: str, deadline: float
) -> Response:
    """Make one call; `deadline` is in seconds of the event loop's clock.

    Raises:
        TimeoutError: the response was not complete in time.
        httpx2.HTTPError: there was no connection, or it broke.
    """
    request = http.build_request(
        "POST",
        f"{endpoint.base_url}/chat/completions",
        content=body.encode("ascii"),
        headers={"Content-Type": "application/json", "Idempotency-Key": idempotency_key},
    )
    return await exchange(http, request, deadline, body_limit(endpoint))


async def exchange(http: AsyncClient, request: HttpRequest, deadline: float, limit: int) -> Response:
    """Send a request and read at most `limit` bytes of its response; raises as `post` does."""
    async with asyncio.timeout_at(deadline):
        response = await http.send(request, stream=True)
    try:
        if not 200 <= response.status_code < 300:
            return await _read_error(response, deadline)
        async with asyncio.timeout_at(deadline):
            return await _read(response, limit)
    finally:
        with contextlib.suppress(Exception):
            await response.aclose()


@dataclass(frozen=True)
class Line:
    """A line of a response without its line break; of one that is longer than the limit, its start."""

    content: bytes
    too_long: bool = False


async def read_lines(http: AsyncClient, request: HttpRequest, limit: int) -> AsyncIterator[Line | Response]:
    """Yield the lines of a response, each of at most `limit` bytes; of one that is an error, nothing but the response.

    Memory is bounded by a line. A server that stalls is given up after the client's own timeout of one read.

    Raises:
        httpx2.HTTPError: there was no connection, or it broke; the lines before are complete.
        zlib.error: the response is compressed and damaged.
    """
    deadline = asyncio.get_running_loop().time() + float(http.timeout.read or 0)
    async with asyncio.timeout_at(deadline):
        response = await http.send(request, stream=True)
    try:
        if not 200 <= response.status_code < 300:
            yield await _read_error(response, deadline)
            return
        splitter = _LineSplitter(limit)
        async for piece in _decoded_pieces(response):
            for line in splitter.feed(piece):
                yield line
        if last := splitter.rest():
            yield last
    finally:
        with contextlib.suppress(Exception):
            await response.aclose()


async def _decoded_pieces(response: HttpResponse) -> AsyncIterator[bytes]:
    """Yield the content of a response, decompressed, in pieces of bounded size."""
    plain = response.headers.get("content-encoding", "").strip().lower() in ("", "identity")
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)
    async for chunk in response.aiter_raw():
        if plain:
            yield chunk
            continue
        while chunk:
            yield decoder.decompress(chunk, _PIECE_BYTES)
            chunk = decoder.unconsumed_tail


class _LineSplitter:
    """Splits a stream of bytes into lines of which at most `limit` bytes are kept."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._line = bytearray()
        self._too_long = False

    def feed(self, piece: bytes) -> Iterator[Line]:
        """Yield the lines that a piece of the stream completes."""
        *ended, begun = piece.split(b"\n")
        for part in ended:
            self._add(part)
            if line := self.rest():
                yield line
        self._add(begun)

    def rest(self) -> Line | None:
        """Return the line that has begun, and begin another; None if it is blank."""
        line = Line(bytes(self._line), self._too_long)
        self._line.clear()
        self._too_long = False
        return line if line.content.strip() else None

    def _add(self, part: bytes) -> None:
        room = self._limit - len(self._line)
        self._too_long = self._too_long or len(part) > room
        self._line += part[:room]


async def _read_error(response: HttpResponse, deadline: float) -> Response:
    """Read what comes of an error's body in a short time: its status says already what became of the call."""
    import httpx2

    soon = asyncio.get_running_loop().time() + ERROR_BODY_SECONDS
    body = _BoundedBody(ERROR_BODY_BYTES, response.headers.get("content-encoding", ""))
    with contextlib.suppress(TimeoutError, httpx2.HTTPError, zlib.error):
        async with asyncio.timeout_at(min(deadline, soon)):
            async for chunk in response.aiter_raw():
                if not body.add(chunk):
                    break
    return Response(response.status_code, response.headers, bytes(body.content))


async def _read(response: HttpResponse, limit: int) -> Response:
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in _READABLE_ENCODINGS:
        return Response(response.status_code, response.headers, b"", encoding=encoding)
    body = _BoundedBody(limit, encoding)
    try:
        async for chunk in response.aiter_raw():
            if not body.add(chunk):
                return Response(response.status_code, response.headers, bytes(body.content), too_large=True)
    except zlib.error:
        return Response(response.status_code, response.headers, b"", encoding=f"{encoding}, damaged")
    return Response(response.status_code, response.headers, bytes(body.content))


_READABLE_ENCODINGS = ("", "identity", "gzip", "x-gzip", "deflate")


class _BoundedBody:
    """A body of at most `limit` bytes. No encoding is asked for; a proxy may compress all the same."""

    def __init__(self, limit: int, encoding: str) -> None:
        self.content = bytearray()
        self._limit = limit
        plain = encoding.strip().lower() in ("", "identity")
        self._decoder = None if plain else zlib.decompressobj(zlib.MAX_WBITS | 32)  # finds gzip or zlib by itself

    def add(self, chunk: bytes) -> bool:
        """Add a piece as sent; return False if it goes beyond the limit.

        Raises:
            zlib.error: it cannot be decompressed.
        """
        room = self._limit - len(self.content)
        if self._decoder is not None:
            chunk = self._decoder.decompress(chunk, room + 1)
        self.content += chunk[:room]
        return len(chunk) <= room
