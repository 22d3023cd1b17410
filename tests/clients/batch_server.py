"""A batch API on 127.0.0.1 that shows scripted faults, and a process that asks it and can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from faulty_server import SECRET, Handler, Server, completion, serving

from purld.clients import batch, batch_submit, rate_limit
from purld.clients.batch import BatchClient
from purld.clients.folder import FolderLedgers
from purld.clients.ledger import Ledger
from purld.config.clients import OpenAIEndpoint
from purld.records import Prompt
from purld.testbed.batches import BadBatchError, BatchStore, UnknownObjectError, shown

EXPIRED = {"code": "batch_expired", "message": "This request could not be executed before the window expired."}


class Store(BatchStore):
    """Batches that end as a test wants: `ending` is called when one would be completed."""

    def __init__(self, complete: Callable[[bytes], tuple[int, dict[str, Any]]]) -> None:
        super().__init__(complete)
        self.ending: Callable[[dict[str, Any]], None] = lambda made: self.finish(made, "completed")
        self.held = False
        self.listed = True

    def retrieve(self, identity: str) -> dict[str, Any]:
        if identity in self.batches:
            made = self.batches[identity]
            if self.held and made["status"] in ("validating", "in_progress"):
                made["status"] = "in_progress"
            elif made["status"] == "in_progress":
                self.ending(made)
            else:
                super().retrieve(identity)
            return shown(made)
        raise UnknownObjectError(identity)

    def expire(self, done: int) -> Callable[[dict[str, Any]], None]:
        """Return an ending in which only so many requests were executed."""

        def ending(made: dict[str, Any]) -> None:
            executed, failed = made["_results"]
            lines = [
                {"id": "x", "custom_id": r["custom_id"], "response": None, "error": EXPIRED} for r in executed[done:]
            ]
            made["_results"] = (executed[:done], [*failed, *lines])
            self.finish(made, "expired")

        return ending


class BatchServer(Server):
    """Serves files and batches; `faults[route]` handles the first arrivals at a route, `answers[prompt]` a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = BatchHandler
        self.faults: dict[str, list[Callable[[BatchHandler], None]]] = {}
        self.answers: dict[str, list[tuple[int, Any]]] = {}
        self.executed: Counter[str] = Counter()
        self.routes: list[str] = []
        self.sent: list[tuple[str, dict[str, str], bytes]] = []
        self.store = Store(self.complete)
        self.key = SECRET

    def complete(self, body: bytes) -> tuple[int, Any]:
        prompt = json.loads(body)["messages"][-1]["content"]
        scripted = self.answers.get(prompt, [])
        number = self.executed[prompt]
        self.executed[prompt] += 1
        said = "T" if "=== Response A" in prompt else f"To {prompt}."
        return scripted[number] if number < len(scripted) else (200, completion(said))


class BatchHandler(Handler):
    server: BatchServer

    def do_GET(self) -> None:  # noqa: N802
        self.handle_call()

    def do_POST(self) -> None:  # noqa: N802
        if self.path.endswith("/chat/completions"):
            super().do_POST()
        else:
            self.handle_call()

    def handle_call(self) -> None:
        path, _, query = self.path.removeprefix("/v1/").partition("?")
        self.parts, self.query = path.split("/"), dict(parse_qsl(query))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.route = self.route_of()
        with self.server.mutex:
            arrival = self.server.routes.count(self.route)
            self.server.routes.append(self.route)
            self.server.sent.append((self.route, dict(self.headers), self.body))
        faults = self.server.faults.get(self.route, [])
        if arrival < len(faults):
            faults[arrival](self)
        else:
            self.reply(*self.served())

    def route_of(self) -> str:
        kind = {"files": {1: "upload", 2: "file", 3: "content"}, "batches": {1: "create", 2: "retrieve", 3: "cancel"}}
        route = kind[self.parts[0]][len(self.parts)]
        return "list" if route == "create" and self.command == "GET" else route

    def served(self) -> tuple[Any, int]:
        """Do what is asked for, and return the response."""
        store = self.server.store
        if self.headers.get("Authorization") != f"Bearer {self.server.key}":
            return {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}}, 401
        try:
            match self.route:
                case "upload":
                    return store.upload(self.headers["Content-Type"], self.body), 200
                case "create":
                    return store.create(json.loads(self.body)), 200
                case "list":
                    listed = store.list_batches(self.query.get("after"), int(self.query.get("limit", "20")))
                    return (listed, 200) if store.listed else ({"error": "no"}, 404)
                case "content":
                    return store.read_file(self.parts[1]), 200
                case "file":
                    return store.describe_file(self.parts[1]), 200
                case "cancel":
                    return store.cancel(self.parts[1]), 200
            return store.retrieve(self.parts[1]), 200
        except UnknownObjectError as missing:
            return {"error": {"message": f"No such object: {missing}"}}, 404
        except BadBatchError as bad:
            return {"error": {"message": str(bad)}}, 400


def lost_after(handler: BatchHandler) -> None:
    """Do what is asked for and send no response."""
    handler.served()
    handler.close_connection = True


def lost_before(handler: BatchHandler) -> None:
    """Do nothing and send no response."""
    handler.close_connection = True


def running_batch_server() -> contextlib.AbstractContextManager[BatchServer]:
    return serving(BatchServer())


def hurry() -> None:
    """Make all waits short, in this process."""
    batch.FIRST_POLL, batch.LONGEST_POLL = 0.01, 0.05
    batch_submit.LOOKS = (0.01, 0.02)
    rate_limit.FIRST_WAIT = 0.01


def ask_in_process(url: str, ledger_path: Path, count: int, log: Path, killed_in: str = "") -> None:
    """Ask for answers to questions by batch, and log each; `killed_in` is a method of the ledger that kills instead."""
    os.environ["TEST_KEY"] = SECRET
    hurry()
    if killed_in:
        setattr(Ledger, killed_in, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    config = OpenAIEndpoint(kind="openai", base_url=url, model="m", api_key_env="TEST_KEY", batch=True, max_calls=99)
    prompts = [Prompt.from_text(f"question {n}") for n in range(count)]
    with Ledger(ledger_path, FolderLedgers(ledger_path)) as ledger:
        client = BatchClient(config, ledger, "teacher")
        replies = client.ask(prompts, lambda index, reply: log.open("a").write(f"{index} {reply.text}\n"))
    log.open("a").write(f"end {sum(reply.state == 'answered' for reply in replies)}\n")


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "what was waited for never came"
        time.sleep(0.002)
