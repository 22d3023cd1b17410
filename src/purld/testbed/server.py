"""Serve the world's teacher and judge as an OpenAI-compatible chat-completions endpoint on 127.0.0.1.

Both answer `POST /v1/chat/completions` and `GET /v1/models` with a bearer key. They recognise images (data URLs in
content parts) by their pixels, and know only what a request contains. Both are deterministic, so sampling settings are
accepted and ignored. There is no streaming, and nothing is logged. Files and batches are those of `batches`.
"""

from __future__ import annotations

import hmac
import json
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl

from purld import templates
from purld.data.images import read_image
from purld.errors import UserError
from purld.records import IMAGE
from purld.testbed.batches import BadBatchError, BatchStore, UnknownObjectError
from purld.testbed.world.scenes import Scene
from purld.testbed.world.world import answer_quality, read_scene, recognise_problem, teacher_answer

TEACHER, JUDGE = "testbed-teacher", "testbed-judge"
MODELS = (TEACHER, JUDGE)
UNKNOWN_QUESTION = "I can only answer questions of the testbed's world, and this is not one of them."
MAX_BODY_BYTES = 10_000_000
MAX_FILE_BYTES = 201_000_000  # a file of 200 MB in a form


class TestbedServer:
    """The endpoint, served from a thread between `__enter__` and `__exit__`.

    Args:
        api_key: the bearer key that clients must send.
        port: the port to listen on; 0 takes a free one.
    """

    __test__ = False  # pytest would collect the class by its name

    def __init__(self, api_key: str, port: int = 0) -> None:
        self._http = _HttpServer(("127.0.0.1", port), api_key)
        # A short poll interval makes shutdown fast.
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    @property
    def base_url(self) -> str:
        """The `base_url` for an OpenAI client."""
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    @property
    def requests(self) -> dict[str, int]:
        """The number of completions that each model has given."""
        with self._http.lock:
            return dict(self._http.completions)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@dataclass(frozen=True)
class ChatMessage:
    """A message of a chat: its text with an IMAGE for each image, and the scene of each image.

    An image that is not of this world has None in place of a scene.
    """

    role: str
    text: str
    scenes: tuple[Scene | None, ...] = ()

    @property
    def scene(self) -> Scene | None:
        """The scene of the only image, None unless there is exactly one; a problem has at most one image."""
        return self.scenes[0] if len(self.scenes) == 1 else None


def reply_as(model: str, message: ChatMessage) -> str:
    """Return a model's reply to the last user message."""
    return (
        reply_as_judge(message.text, message.scene) if model == JUDGE else reply_as_teacher(message.text, message.scene)
    )


def reply_as_teacher(user_text: str, scene: Scene | None = None) -> str:
    """Return the teacher's answer, its score if asked to rate an answer, or UNKNOWN_QUESTION."""
    if scored := _rating_reply(user_text, scene):
        return scored
    problem = recognise_problem(user_text, scene)
    return teacher_answer(problem) if problem else UNKNOWN_QUESTION


def _rating_reply(user_text: str, scene: Scene | None) -> str | None:
    """Return the score for a filled rating template, None for any other text.

    The score is the judge's measure of quality, scaled to [0, 1].
    """
    opening, to_candidate = re.split(r"\{\w+\}", templates.RATING_HEAD)
    question, mark_found, rest = user_text.removeprefix(opening).partition(to_candidate)
    problem = recognise_problem(question, scene) if mark_found and user_text.startswith(opening) else None
    return f"{answer_quality(problem, rest.removesuffix(templates.SELF_EVALUATION_TAIL)) / 2:.2f}" if problem else None


def reply_as_judge(user_text: str, scene: Scene | None = None) -> str:
    """Return A, B or T for a filled judge template; T if the question is not of this world or the text is no template.

    An answer that contains the mark between the answers makes the template ambiguous. The verdict is then the one that
    all readings agree on, else T, so forging marks cannot win.
    """
    verdicts = {_verdict(*reading, scene) for reading in _possible_readings(user_text)}
    return verdicts.pop() if len(verdicts) == 1 else "T"


def _verdict(question: str, answer_a: str, answer_b: str, scene: Scene | None) -> str:
    """Compare two answers by their quality: A, B or T."""
    problem = recognise_problem(question, scene)
    if problem is None:
        return "T"
    a, b = answer_quality(problem, answer_a), answer_quality(problem, answer_b)
    return "A" if a > b else "B" if b > a else "T"


def _possible_readings(user_text: str) -> Iterator[tuple[str, str, str]]:
    """Yield every (question, answer A, answer B) that fills the judge template to make this text."""
    opening, to_reference, to_a, to_b = re.split(r"\{\w+\}", templates.JUDGE)[:4]
    if not user_text.startswith(opening):
        return
    # Questions and references are the testbed's own and contain no marks, so the first mark is the real one.
    question, _, rest = user_text.removeprefix(opening).partition(to_reference)
    _, mark_found, answers = rest.partition(to_a)
    if not mark_found:
        return
    for mark in re.finditer(re.escape(to_b), answers):
        yield question, answers[: mark.start()], answers[mark.end() :]


class _ApiError(Exception):
    """An error that is sent as an OpenAI-style error body."""

    def __init__(self, status: HTTPStatus, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True  # idle keep-alive connections must not block shutdown

    def __init__(self, address: tuple[str, int], api_key: str) -> None:
        super().__init__(address, _Handler)
        self.api_key = api_key
        self.lock = threading.Lock()
        self.completions: Counter[str] = Counter()
        self.batches = BatchStore(self.complete)

    def complete(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the response to a chat completion request."""
        try:
            model, prompt, message = _parse_request(body)
            if model not in MODELS:
                raise _ApiError(HTTPStatus.NOT_FOUND, f"The model {model!r} does not exist.", "model_not_found")
        except _ApiError as error:
            return error.status, error.body
        text = reply_as(model, message)
        with self.lock:
            self.completions[model] += 1
        return HTTPStatus.OK, _completion(model, prompt, text)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _HttpServer

    def do_GET(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def _respond(self) -> None:
        path, _, query = self.path.partition("?")
        try:
            body = self._read_body(MAX_FILE_BYTES if path == "/v1/files" else MAX_BODY_BYTES)
            self._check_key()
            self._send(*self._answer(path.removeprefix("/v1/").split("/"), query, body))
        except _ApiError as error:
            self._send(error.status, error.body)
        except UnknownObjectError as missing:
            self._send(HTTPStatus.NOT_FOUND, _ApiError(HTTPStatus.NOT_FOUND, f"There is no {missing}.").body)
        except BadBatchError as bad:
            self._send(HTTPStatus.BAD_REQUEST, _ApiError(HTTPStatus.BAD_REQUEST, str(bad)).body)

    def _answer(self, path: list[str], query: str, body: bytes) -> tuple[int, dict[str, Any] | bytes]:
        """Return the status and the body of the response; `path` is without its version."""
        store = self.server.batches
        match self.command, path:
            case "GET", ["models"]:
                return HTTPStatus.OK, _list_models()
            case "POST", ["chat", "completions"]:
                return self.server.complete(body)
            case "POST", ["files"]:
                return HTTPStatus.OK, store.upload(self.headers.get("Content-Type", ""), body)
            case "GET", ["files", identity]:
                return HTTPStatus.OK, store.describe_file(identity)
            case "GET", ["files", identity, "content"]:
                return HTTPStatus.OK, store.read_file(identity)
            case "POST", ["batches"]:
                return HTTPStatus.OK, store.create(_parse_object(body))
            case "GET", ["batches"]:
                asked = dict(parse_qsl(query))
                return HTTPStatus.OK, store.list_batches(asked.get("after"), int(asked.get("limit", "20")))
            case "GET", ["batches", identity]:
                return HTTPStatus.OK, store.retrieve(identity)
            case "POST", ["batches", identity, "cancel"]:
                return HTTPStatus.OK, store.cancel(identity)
        raise _ApiError(HTTPStatus.NOT_FOUND, f"There is no {self.command} {self.path} here.")

    def _read_body(self, most: int) -> bytes:
        # Read the body even if the request is refused: on a kept-alive connection it precedes the next request.
        length = self.headers.get("Content-Length", "0")
        if self.headers.get("Transfer-Encoding") or not length.isdecimal():
            self.close_connection = True
            raise _ApiError(HTTPStatus.LENGTH_REQUIRED, "Send a Content-Length.")
        if int(length) > most:
            self.close_connection = True
            raise _ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"More than {most} bytes.")
        return self.rfile.read(int(length))

    def _check_key(self) -> None:
        expected = f"Bearer {self.server.api_key}".encode()
        if not hmac.compare_digest(self.headers.get("Authorization", "").encode(), expected):
            raise _ApiError(HTTPStatus.UNAUTHORIZED, "Incorrect API key provided.", "invalid_api_key")

    def _send(self, status: int, value: dict[str, Any] | bytes) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if data is value else "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet."""


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise _ApiError(HTTPStatus.BAD_REQUEST, "The request body is not a JSON object.")
    return value


def _list_models() -> dict[str, Any]:
    entries = [{"id": name, "object": "model", "created": 0, "owned_by": "purld"} for name in MODELS]
    return {"object": "list", "data": entries}


def _parse_request(body: bytes) -> tuple[str, str, ChatMessage]:
    """Return the requested model, the text of the whole conversation, and the last user message."""
    try:
        request = json.loads(body)
        model = request["model"]
        messages = [_parse_message(message["role"], message["content"]) for message in request["messages"]]
        last_message = next(message for message in reversed(messages) if message.role == "user")
    except ValueError:
        raise _ApiError(HTTPStatus.BAD_REQUEST, "The request body is not valid JSON.") from None
    except (TypeError, KeyError, AttributeError, StopIteration):
        reason = "The request needs a model and messages with at least one user turn of text."
        raise _ApiError(HTTPStatus.BAD_REQUEST, reason) from None
    if request.get("stream"):
        raise _ApiError(HTTPStatus.BAD_REQUEST, "Streaming is not supported.")
    return str(model), "\n".join(message.text for message in messages), last_message


def _parse_message(role: str, content: Any) -> ChatMessage:
    """Parse a message whose content is a string or a list of parts of type text and image_url."""
    if isinstance(content, str):
        return ChatMessage(role, content)
    text, scenes = "", list[Scene | None]()
    for part in content:
        if part["type"] == "text":
            text += part["text"]
        elif part["type"] == "image_url":
            text += IMAGE
            scenes.append(_recognise_image_url(part["image_url"]["url"]))
    return ChatMessage(role, text, tuple(scenes))


def _recognise_image_url(url: str) -> Scene | None:
    """Return the scene of an image that comes as a data URL, else None; no other URL is opened."""
    if not url.startswith("data:"):
        return None
    try:
        return read_scene(read_image(url, Path()))
    except (ValueError, UserError):
        return None


def _completion(model: str, prompt: str, text: str) -> dict[str, Any]:
    prompt_tokens, completion_tokens = _count_tokens(prompt), _count_tokens(text)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _count_tokens(text: str) -> int:
    """Return a plausible token count to bill: words and punctuation marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))
