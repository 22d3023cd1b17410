"""The files and batches of the testbed's endpoint, as in OpenAI's batch API, kept in memory.

A batch is executed when it is created and reported as validating, in progress and completed, one step each time that
somebody looks. Nothing expires.
"""

from __future__ import annotations

import email
import email.policy
import json
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

Complete = Callable[[bytes], tuple[int, dict[str, Any]]]
"""Takes the body of a chat completion request; returns the HTTP status and the response."""

MAX_REQUESTS = 50_000
T = TypeVar("T")


class UnknownObjectError(Exception):
    """There is no file or batch of the id in the message."""


class BadBatchError(Exception):
    """The message says why a request to the batch API cannot be served."""


class BatchStore:
    """Files and batches.

    Args:
        complete: answers one request.
    """

    def __init__(self, complete: Complete) -> None:
        self.complete = complete
        self.files: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def upload(self, content_type: str, form: bytes) -> dict[str, Any]:
        """Store the file of a multipart form, and return the object that describes it.

        Raises:
            BadBatchError: the form has no file, or no purpose `batch`.
        """
        parts = _read_form(content_type, form)
        if parts.get("purpose", ("", b""))[1] != b"batch" or "file" not in parts:
            raise BadBatchError("The form needs a file and the purpose batch.")
        name, content = parts["file"]
        return self.add_file(content, name, "batch")

    def add_file(self, content: bytes, name: str, purpose: str) -> dict[str, Any]:
        """Store a file, and return the object that describes it."""
        identity = f"file-{uuid.uuid4().hex}"
        described = {"id": identity, "object": "file", "bytes": len(content), "created_at": int(time.time())}
        described |= {"filename": name, "purpose": purpose, "status": "processed"}
        with self._lock:
            self.files[identity], self.contents[identity] = described, content
        return described

    def describe_file(self, identity: str) -> dict[str, Any]:
        """Return the object that describes a file."""
        return _find(self.files, identity)

    def read_file(self, identity: str) -> bytes:
        """Return the content of a file."""
        return _find(self.contents, identity)

    def create(self, request: dict[str, Any]) -> dict[str, Any]:
        """Create a batch, execute it, and return the object that describes it.

        Raises:
            BadBatchError: the endpoint or the completion window is not one of a batch, or the file is none.
        """
        if request.get("endpoint") != "/v1/chat/completions" or request.get("completion_window") != "24h":
            raise BadBatchError("A batch needs the endpoint /v1/chat/completions and the completion window 24h.")
        content, identity = self.read_file(str(request.get("input_file_id"))), f"batch_{uuid.uuid4().hex}"
        batch: dict[str, Any] = {
            "id": identity,
            "object": "batch",
            "endpoint": request["endpoint"],
            "input_file_id": request["input_file_id"],
            "completion_window": "24h",
            "status": "validating",
            "created_at": int(time.time()),
            "metadata": request.get("metadata"),
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }
        try:
            lines = _read_lines(content)
        except ValueError as problem:
            batch |= {
                "status": "failed",
                "errors": {"object": "list", "data": [{"code": "bad", "message": str(problem)}]},
            }
        else:
            batch["request_counts"]["total"] = len(lines)
            batch["_results"] = self._execute(lines)
        with self._lock:
            self.batches[identity] = batch
        return shown(batch)

    def _execute(self, lines: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the lines of the output file and those of the error file; their order is not that of the input."""
        done, failed = list[dict[str, Any]](), list[dict[str, Any]]()
        for line in reversed(lines):
            status, body = self.complete(json.dumps(line["body"]).encode())
            response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}
            result = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line["custom_id"]}
            (done if status == 200 else failed).append(result | {"response": response, "error": None})
        return done, failed

    def retrieve(self, identity: str) -> dict[str, Any]:
        """Return the object that describes a batch, after its next step."""
        batch = _find(self.batches, identity)
        with self._lock:
            status = batch["status"]
            if status == "in_progress":
                self.finish(batch, "completed")
            batch["status"] = {"validating": "in_progress", "cancelling": "cancelled"}.get(status, batch["status"])
        return shown(batch)

    def finish(self, batch: dict[str, Any], status: str) -> None:
        """End a batch with the results that it has."""
        done, failed = batch["_results"]
        batch["status"] = status
        batch["request_counts"] |= {"completed": len(done), "failed": len(failed)}
        for name, lines in (("output_file_id", done), ("error_file_id", failed)):
            if lines:
                content = "".join(json.dumps(line) + "\n" for line in lines).encode()
                file = {"id": f"file-{uuid.uuid4().hex}"}
                self.files[file["id"]], self.contents[file["id"]] = file, content
                batch[name] = file["id"]

    def cancel(self, identity: str) -> dict[str, Any]:
        """Cancel a batch that has not ended: none of its requests is executed."""
        batch = _find(self.batches, identity)
        with self._lock:
            if batch["status"] in ("validating", "in_progress"):
                batch |= {"status": "cancelling", "_results": ([], [])}
        return shown(batch)

    def list_batches(self, after: str | None, limit: int) -> dict[str, Any]:
        """Return a page of batches, newest first."""
        with self._lock:
            rows = [shown(batch) for batch in reversed(self.batches.values())]
        ids = [row["id"] for row in rows]
        start = ids.index(after) + 1 if after in ids else 0
        page = rows[start : start + limit]
        return {"object": "list", "data": page, "has_more": start + limit < len(rows)}


def shown(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch as the endpoint shows it, without its results."""
    return {name: value for name, value in batch.items() if not name.startswith("_")}


def _find(objects: dict[str, T], identity: str) -> T:
    if identity not in objects:
        raise UnknownObjectError(identity)
    return objects[identity]


def _read_form(content_type: str, form: bytes) -> dict[str, tuple[str, bytes]]:
    """Return the file name and the content of every part of a multipart form, by the part's name."""
    header = f"Content-Type: {content_type}\r\n\r\n".encode()
    message = email.message_from_bytes(header + form, policy=email.policy.HTTP)
    parts = {}
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        if isinstance(content, bytes):
            parts[str(name)] = (part.get_filename() or "", content)
    return parts


def _read_lines(content: bytes) -> list[dict[str, Any]]:
    """Return the requests of an input file.

    Raises:
        ValueError: it has too many, a line is no request, or two have one id.
    """
    lines = [json.loads(line) for line in content.splitlines() if line.strip()]
    ids = [line["custom_id"] for line in lines if line.get("method") == "POST" and isinstance(line.get("body"), dict)]
    if not lines or len(lines) > MAX_REQUESTS or len(set(ids)) != len(lines):
        raise ValueError(f"A batch has 1 to {MAX_REQUESTS} requests, each with a custom_id of its own and a body.")
    return lines
