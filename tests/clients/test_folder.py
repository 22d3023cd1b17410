"""Runs in one folder: what each sees of the others' calls, and that no question is bought twice."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from faulty_server import completion

from purld.clients import endpoint as endpoint_module
from purld.clients.endpoint import EndpointClient
from purld.clients.folder import FolderLedgers
from purld.clients.ledger import (
    SCHEMA_VERSION,
    CallResult,
    Caps,
    Ledger,
    Request,
    UnderWayElsewhereError,
)
from purld.errors import PlainWarning, UserError
from purld.records import Prompt


def asked(text):
    return Request("u", "m", f'"{text}"', text)


def open_run(folder, name):
    path = folder / name / "ledger.sqlite"
    return Ledger(path, FolderLedgers(path))


def claim(ledger, text, **options):
    return ledger.claim(asked(text), "teacher", 10, 1.0, Caps(), **options)


def answer(ledger, text):
    call = claim(ledger, text)
    ledger.mark_sent(call)
    ledger.settle(call, CallResult("answered", f"to {text}"))


DIE = """
import os, sys
from purld.clients.ledger import CallResult, Caps, Ledger, Request
ledger = Ledger(sys.argv[1])
for text in ("reserved", "sent", "answered", "failed"):
    call = ledger.reserve(Request("u", "m", '"%s"' % text, text), "teacher", 10, 1.0, Caps())
    if text != "reserved":
        ledger.mark_sent(call)
    if text in ("answered", "failed"):
        ledger.settle(call, CallResult(text, "yes" if text == "answered" else None))
os.kill(os.getpid(), 9)
"""


def test_the_calls_of_a_killed_run_count_as_they_were_left(tmp_path):
    """What it had sent may be billed and is lost, which needs nobody to open its ledger again."""
    killed = tmp_path / "killed" / "ledger.sqlite"
    subprocess.run([sys.executable, "-c", DIE, str(killed)], check=False)
    with FolderLedgers(tmp_path / "new" / "ledger.sqlite") as view:
        results = {text: view.find_result(asked(text).key) for text in ("reserved", "sent", "answered", "failed")}
    assert {text: result and result.state for text, result in results.items()} == {
        "reserved": None, "sent": "unknown", "answered": "answered", "failed": "failed",
    }  # fmt: skip
    with open_run(tmp_path, "new") as ledger:
        ledger.import_results([asked(text).key for text in results], "teacher")
        assert ledger.find_result(asked("sent").key).error == "interrupted"
        assert ledger.find_result(asked("answered").key).text == "yes"
        assert ledger.totals("teacher")["calls"] == ledger.booked_spend("teacher").calls == 0
        assert claim(ledger, "reserved") is not None
        assert claim(ledger, "failed") is not None
        assert claim(ledger, "sent", settles=lambda result: result.state == "answered") is not None
    with open_run(tmp_path, "newer") as ledger:
        assert claim(ledger, "sent") is None, "the result is copied instead"
        assert ledger.find_result(asked("sent").key).state == "unknown"


def test_a_question_that_another_run_is_asking_cannot_be_claimed(tmp_path):
    with open_run(tmp_path, "a") as first, open_run(tmp_path, "b") as second:
        call = claim(first, "q")
        for _ in range(2):  # reserved, then sent
            with pytest.raises(UnderWayElsewhereError, match=r"a/ledger\.sqlite"):
                claim(second, "q")
            first.mark_sent(call)
        first.settle(call, CallResult("failed", billable=False))
        retry = claim(second, "q")
        with pytest.raises(UnderWayElsewhereError):
            claim(first, "q")
        second.mark_sent(retry)
        second.settle(retry, CallResult("answered", "yes"))
        assert claim(first, "q") is None
        assert first.find_result(asked("q").key).text == "yes"
        assert first.booked_spend("teacher").calls == 1


def test_runs_that_start_at_the_same_moment_buy_no_question_twice(tmp_path):
    bought, barrier = [], threading.Barrier(4)

    def work(name):
        with open_run(tmp_path, name) as ledger:
            barrier.wait(30)
            for n in range(25):
                with contextlib.suppress(UnderWayElsewhereError):
                    if (call := claim(ledger, str(n))) is not None:
                        bought.append(n)
                        ledger.mark_sent(call)
                        ledger.settle(call, CallResult("answered", "x"))

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(bought) == list(range(25))


def test_a_run_waits_for_the_answer_to_a_question_that_another_one_is_asking(server, endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint_module, "POLL_SECONDS", 0.05)
    server.default = lambda handler: (time.sleep(0.4), handler.reply(completion(f"To {handler.prompt}.")))
    prompts = [Prompt.from_text(f"question {n}") for n in range(6)]
    texts = {}

    def run(name, order):
        with open_run(tmp_path, name) as ledger:
            replies = EndpointClient(endpoint(concurrency=3), ledger, "teacher").ask([prompts[n] for n in order])
            texts[name] = dict(zip(order, (reply.text for reply in replies), strict=True))

    other = threading.Thread(target=run, args=("a", range(6)))
    with pytest.warns(PlainWarning, match="waits for the answer"):
        other.start()
        deadline = time.monotonic() + 30
        while not server.arrived and time.monotonic() < deadline:
            time.sleep(0.005)
        run("b", range(6))
        other.join()
    assert texts["a"] == texts["b"] == {n: f"To question {n}." for n in range(6)}
    assert len(server.arrived) == 6


def test_a_ledger_that_cannot_be_read_is_passed_over_and_named(tmp_path):
    """This includes one whose damage shows only at the first query, and one that is repaired later."""
    odd, text = (tmp_path / name / "ledger.sqlite" for name in ("odd", "text"))
    with open_run(tmp_path, "whole") as ledger:
        answer(ledger, "a")
    odd.parent.mkdir()
    text.parent.mkdir()
    with contextlib.closing(sqlite3.connect(odd)) as db:
        db.execute("CREATE TABLE calls (id)")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    text.write_text("no ledger" * 1000)
    with open_run(tmp_path, "own") as ledger:
        ledger.import_results([asked("a").key], "teacher")
        assert ledger.find_result(asked("a").key).text == "to a"
        assert ledger.unreadable_ledgers == [odd, text]
        with open_run(tmp_path, "fresh") as fresh:
            answer(fresh, "b")
            fresh.copy(tmp_path / "copy")
        os.replace(tmp_path / "copy", text)
        assert claim(ledger, "b") is None
        assert ledger.unreadable_ledgers == [odd]


def test_another_process_that_holds_the_lock_delays_no_call_in_flight(server, endpoint, tmp_path):
    """While the third question waits for the lock, the answer to the second is stored."""
    both_sent, locked, second_stored, in_time = threading.Barrier(2), threading.Event(), threading.Event(), []

    def answer_first(handler):
        both_sent.wait(5)
        with FolderLedgers(tmp_path / "other" / "ledger.sqlite").locked():
            locked.set()
            handler.reply(completion("yes"))
            in_time.append(second_stored.wait(5))

    def answer_second(handler):
        both_sent.wait(5)
        locked.wait(5)
        time.sleep(0.1)  # by now the third question waits
        handler.reply(completion("yes"))

    server.script = {"first": [answer_first], "second": [answer_second]}
    with open_run(tmp_path, "a") as ledger:
        client = EndpointClient(endpoint(concurrency=2, timeout=20), ledger, "teacher")
        prompts = [Prompt.from_text(text) for text in ("first", "second", "third")]
        replies = client.ask(prompts, lambda index, reply: second_stored.set() if index == 1 else None)
    assert [reply.state for reply in replies] == ["answered"] * 3
    assert in_time == [True]


def test_a_lock_that_is_never_given_back_stops_the_run_in_one_sentence(server, endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint_module, "LOCK_SECONDS", 0.05)
    with open_run(tmp_path, "a") as ledger, FolderLedgers(tmp_path / "other" / "ledger.sqlite").locked():
        with pytest.raises(UserError, match="another purld process has locked this folder"):
            EndpointClient(endpoint(), ledger, "teacher").ask([Prompt.from_text("first")])
        assert ledger.calls_in_flight("teacher") == 0
    assert not server.arrived
