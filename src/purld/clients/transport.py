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
from dataclasses import dataclass, replace
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
_GZIP_MAGIC = b"\x1f\x8b"


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
    """A line of a response without its line break; of one that is longer than the limit, its start.

    `ended` is False for a last line without a line break, with which the response may have broken off.
    """

    content: bytes
    too_long: bool = False
    ended: bool = True


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
            yield replace(last, ended=False)
    finally:
        with contextlib.suppress(Exception):
            await response.aclose()


async def _decoded_pieces(response: HttpResponse) -> AsyncIterator[bytes]:
    """Yield the content of a response, decompressed, in pieces of bounded size."""
    plain = response.headers.get("content-encoding", "").strip().lower() in ("", "identity")
    inflater = Inflater()
    async for chunk in response.aiter_raw():
        for piece in [chunk] if plain else inflater.pieces(chunk):
            yield piece


class Inflater:
    """Decompresses gzip or zlib, also gzip in several members, as servers that compress part by part send it.

    What follows a member and is none, such as padding, is left out.
    """

    def __init__(self) -> None:
        self._decoder = _new_decoder()
        self._between = b""  # what has come since the last member, as far as another may begin with it

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """Yield what a chunk decompresses to, in pieces of bounded size.

        Raises:
            zlib.error: it cannot be decompressed.
        """
        while chunk:
            if self._decoder.eof:
                chunk, self._between = self._between + chunk, b""
                if chunk == _GZIP_MAGIC[:1]:
                    self._between = chunk
                    return
                if not chunk.startswith(_GZIP_MAGIC):
                    return
                self._decoder = _new_decoder()
            yield self._decoder.decompress(chunk, _PIECE_BYTES)
            chunk = self._decoder.unused_data if self._decoder.eof else self._decoder.unconsumed_tail


def _new_decoder() -> zlib._Decompress:
    return zlib.decompressobj(zlib.MAX_WBITS | 32)  # finds gzip or zlib by itself


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
        self._inflater = None if encoding.strip().lower() in ("", "identity") else Inflater()

    def add(self, chunk: bytes) -> bool:
        """Add a piece as sent; return False if it goes beyond the limit.

        Raises:
            zlib.error: it cannot be decompressed.
        """
        for piece in self._inflater.pieces(chunk) if self._inflater else [chunk]:
            room = self._limit - len(self.content)
            self.content += piece[:room]
            if len(piece) > room:
                return False
        return True
