"""A chat-completions server on 127.0.0.1 that shows scripted faults."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

SECRET = "sk-test/9f8e+7d6c=5b4a"


def completion(text: object = "An answer.", finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    return {
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


def turn_text(content: str | list[dict[str, Any]]) -> str:
    """Return a turn's text, with `<image>` for each of its images."""
    return content if isinstance(content, str) else "".join(part.get("text", "<image>") for part in content)


class Server(ThreadingHTTPServer):
    """A server that answers every prompt, or handles its n-th arrival with the n-th entry of `script[prompt]`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: dict[str, list[Callable[[Handler], None]]] = {}
        self.default: Callable[[Handler], None] = lambda handler: handler.reply(completion())
        self.arrived: list[str] = []
        self.finished: list[str] = []
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.mutex = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """Report nothing: killed clients break their connections."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.prompt = turn_text(json.loads(body)["messages"][-1]["content"])
        with self.server.mutex:
            arrival = Counter(self.server.arrived)[self.prompt]
            self.server.arrived.append(self.prompt)
            self.server.bodies.append(body)
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        script = self.server.script.get(self.prompt, [])
        (script[arrival] if arrival < len(script) else self.server.default)(self)
        with self.server.mutex:
            self.server.finished.append(self.prompt)

    def reply(self, payload: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def error(status: int, code: str = "", message: str = "no", headers: dict[str, str] | None = None):
    return lambda handler: handler.reply({"error": {"message": message, "code": code}}, status, headers)


def answer(*args: Any, **message: Any):
    return lambda handler: handler.reply(completion(*args, **message))


def raw(data: bytes, status: int = 200):
    return lambda handler: handler.reply(data, status)


def silence(handler: Handler) -> None:
    """Accept the request and never answer."""
    time.sleep(5)
    handler.close_connection = True


def drip(handler: Handler) -> None:
    """Send one byte every tenth of a second, for longer than any timeout in the tests."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(50):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def reset(handler: Handler) -> None:
    """Send half a body, then a TCP reset."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def hang_up(handler: Handler) -> None:
    """Accept the request and close the connection without an answer."""
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def rate_by_length(handler: Handler) -> None:
    """Answer prompts, and rate candidates as a teacher that likes long ones."""
    _, _, candidate = handler.prompt.partition("Candidate Answer:\n")
    handler.reply(completion(f"{min(1.0, len(candidate) / 100):.2f}" if candidate else "An answer."))


def date_in(seconds: float) -> str:
    return formatdate(time.time() + seconds, usegmt=True)


ServerKind = TypeVar("ServerKind", bound=Server)


def running_server() -> contextlib.AbstractContextManager[Server]:
    return serving(Server())


@contextlib.contextmanager
def serving(server: ServerKind) -> Iterator[ServerKind]:
    """Serve in a thread for the block."""
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
