"""The ledger: states, bookings, caps, reopening, and refused files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purld.clients.ledger import (
    BookedSpend,
    CallResult,
    CapReachedError,
    Caps,
    Ledger,
    LedgerView,
    Request,
    Usage,
    is_blank,
)
from purld.errors import UserError


def request(text: str = "q", base_url: str = "http://a/v1") -> Request:
    return Request(base_url, "m", json.dumps({"model": "m", "messages": text}), prompt_id=text)


def answered(tokens: int = 15, cost: float = 0.1) -> CallResult:
    return CallResult("answered", "An answer.", "stop", usage=Usage(tokens - 5, 5, cost))


def test_the_key_tells_endpoint_and_content_apart():
    keys = {request().key, request("r").key, request(base_url="http://b/v1").key}
    assert len(keys) == 3
    assert request().key == Request("http://a/v1", "m", request().body, prompt_id="another").key


def test_the_worst_case_is_booked_until_settled(ledger):
    call = ledger.reserve(request(), "teacher", 100, 2.0, Caps())
    assert ledger.booked_spend("teacher") == BookedSpend(1, 100, 2.0)
    ledger.mark_sent(call)
    assert ledger.find_result(request().key) is None, "a call under way is no result"
    ledger.settle(call, answered())
    assert ledger.booked_spend("teacher") == BookedSpend(1, 15, pytest.approx(0.1))
    assert ledger.find_result(request().key) == answered()


@pytest.mark.parametrize(
    ("result", "booked"),
    [
        (CallResult("unknown", error="timeout"), BookedSpend(1, 100, 2.0)),
        (CallResult("failed", error="invalid_response"), BookedSpend(1, 100, 2.0)),
        (CallResult("failed", error="http_503", billable=False), BookedSpend(1, 0, 0.0)),
        (CallResult("failed", error="no_connection", billable=False, left=False), BookedSpend(0, 0, 0.0)),
        (CallResult("answered", "text"), BookedSpend(1, 100, 2.0)),
    ],
)
def test_what_may_have_been_billed_stays_booked_here_and_after_reopening(tmp_path, result, booked):
    with Ledger(tmp_path / "l.sqlite") as ledger:
        call = ledger.reserve(request(), "teacher", 100, 2.0, Caps())
        ledger.mark_sent(call)
        ledger.settle(call, result)
        assert ledger.booked_spend("teacher") == booked
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert ledger.booked_spend("teacher") == booked
        assert ledger.totals("teacher")["unsettled_cost"] == booked.cost


def test_what_a_dead_process_left_behind(tmp_path):
    code = """
import os, sys
from purld.clients.ledger import CallResult, Caps, Ledger, Request
ledger = Ledger(sys.argv[1])
for text in ("reserved", "sent", "answered"):
    call = ledger.reserve(Request("u", "m", '"%s"' % text, text), "teacher", 10, 1.0, Caps())
    if text != "reserved":
        ledger.mark_sent(call)
    if text == "answered":
        ledger.settle(call, CallResult("answered", "yes"))
os.kill(os.getpid(), 9)
"""
    path = tmp_path / "l.sqlite"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    view = LedgerView(path)  # as a dry run sees it, before the ledger is opened again
    assert [getattr(view.find_result(Request("u", "m", f'"{text}"', text).key), "state", None) for text in
            ("reserved", "sent", "answered")] == [None, "unknown", "answered"]  # fmt: skip
    view.close()
    with Ledger(path) as ledger:
        rows = {row["prompt_id"]: row for row in ledger.iter_requests()}
        assert {name: row["state"] for name, row in rows.items()} == {"sent": "unknown", "answered": "answered"}
        assert rows["sent"]["calls"][0]["error"] == "interrupted"
        assert ledger.booked_spend("teacher") == BookedSpend(2, 20, 2.0)
        assert ledger.totals("teacher")["prompts"] == 2


def test_an_answer_outlives_a_later_failure_of_the_same_request(ledger):
    for result in (answered(), CallResult("failed", error="x")):
        ledger.settle(ledger.reserve(request(), "teacher", 1, 0.0, Caps()), result)
    assert ledger.find_result(request().key) == answered()
    assert ledger.totals("teacher")["answered"] == 1
    assert next(iter(ledger.iter_requests()))["state"] == "answered"


def test_one_process_at_a_time_but_any_number_of_readers(tmp_path, ledger):
    code = "import sys; from purld.clients.ledger import Ledger; Ledger(sys.argv[1])"
    other = subprocess.run([sys.executable, "-c", code, str(ledger.path)], capture_output=True, text=True)
    assert f"ledger.sqlite: another purld process ({os.getpid()}) is using this ledger." in other.stderr
    call = ledger.reserve(request(), "teacher", 1, 0.0, Caps())
    assert (ledger.calls_in_flight("teacher"), ledger.calls_in_flight("judge")) == (1, 0)
    with LedgerView(ledger.path) as view:
        assert view.totals("teacher")["prompts"] == 1
        ledger.settle(call, answered())
        assert view.totals("teacher")["answered"] == 1


def test_a_view_makes_nothing(tmp_path):
    with pytest.raises(UserError, match="there is no ledger here"):
        LedgerView(tmp_path / "none.sqlite")
    assert os.listdir(tmp_path) == []
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(UserError, match="is not a ledger"):
        LedgerView(tmp_path / "empty.sqlite")
    assert (tmp_path / "empty.sqlite").stat().st_size == 0


def test_a_kill_while_a_ledger_is_created_stops_no_later_run(tmp_path):
    """SQLite creates a file with a rollback journal; only a connection that may write can take it back."""
    source = tmp_path / "ledger.sqlite"
    with contextlib.closing(sqlite3.connect(source, isolation_level=None)) as db:
        db.execute("PRAGMA cache_size = 1")  # so that the file is written before the commit
        db.execute("BEGIN")
        db.execute("CREATE TABLE pages AS SELECT zeroblob(100000) AS data")
        killed = tmp_path / "killed"
        killed.mkdir()
        for file in (source, source.with_name("ledger.sqlite-journal")):
            shutil.copy(file, killed)
    path = killed / source.name
    assert path.stat().st_size
    assert is_blank(path)
    assert not path.with_name("ledger.sqlite-journal").exists()
    with Ledger(path) as ledger:
        assert ledger.totals("teacher")["calls"] == 0


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be locked"):
        Ledger(tmp_path / "file" / "l.sqlite")


@pytest.mark.parametrize(
    "content", [b"not a database, only some text of some length" * 50, b"SQLite format 3\0" + b"x" * 5000]
)
def test_a_file_that_is_no_ledger(tmp_path, content):
    path = tmp_path / "l.sqlite"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"l\.sqlite: the ledger cannot be used"):
        Ledger(path)


def test_a_ledger_of_another_version(tmp_path):
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger._db.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="found 99"):
        Ledger(tmp_path / "l.sqlite")


def test_a_copy_leaves_nothing_that_sqlite_could_not_remove(ledger, tmp_path, monkeypatch):
    replace = os.replace

    def replace_beside_a_log(partial, path):
        replace(partial, path)
        os.close(os.open(f"{partial}-wal", os.O_CREAT))

    monkeypatch.setattr(os, "replace", replace_beside_a_log)
    (folder := tmp_path / "copies").mkdir()
    ledger.copy(folder / "copy")
    assert [file.name for file in folder.iterdir()] == ["copy"]


def test_commits_are_synced_in_write_ahead_mode(ledger):
    assert ledger._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert ledger._db.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_the_export_holds_every_call(ledger, tmp_path):
    for result in (CallResult("failed", error="http_503", raw="busy", billable=False), answered()):
        call = ledger.reserve(request("ä"), "judge", 10, 1.0, Caps())
        ledger.mark_sent(call)
        ledger.settle(call, result)
    assert ledger.export(tmp_path / "audit.jsonl") == 1
    [row] = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
    assert row["request"] == {"model": "m", "messages": "ä"}
    assert (row["role"], row["state"], row["answer"], row["base_url"]) == (
        "judge",
        "answered",
        "An answer.",
        "http://a/v1",
    )
    assert [(call["state"], call["raw"]) for call in row["calls"]] == [("failed", "busy"), ("answered", None)]
    assert all(call["sent_at"] <= call["ended_at"] for call in row["calls"])
    with pytest.raises(UserError, match="cannot be written"):
        ledger.export(tmp_path / "audit.jsonl" / "no-folder.jsonl")


def test_threads_share_a_cap_without_passing_it(ledger):
    caps, reserved, refused = Caps(max_tokens=1000), [], []

    def spend(worker: int) -> None:
        for n in range(20):
            try:
                call = ledger.reserve(request(f"{worker}/{n}"), "teacher", 70, 0.0, caps)
            except CapReachedError as error:
                refused.append(str(error))
                continue
            reserved.append(ledger.booked_spend("teacher").tokens)
            ledger.mark_sent(call)
            ledger.settle(call, answered(tokens=30))

    threads = [threading.Thread(target=spend, args=(worker,)) for worker in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(reserved) <= 1000
    assert ledger.booked_spend("teacher").tokens == 30 * len(reserved)
    assert set(refused) == {"max_tokens (1000)"}


def test_the_opponent_spends_from_the_teachers_purse_and_the_judge_from_its_own(tmp_path):
    caps = Caps(max_calls=3, max_tokens=250, max_cost=5.0)
    with Ledger(tmp_path / "l.sqlite") as ledger:
        for n, role in enumerate(("teacher", "opponent")):
            call = ledger.reserve(request(str(n)), role, 100, 2.0, caps)
            ledger.mark_sent(call)
            ledger.settle(call, CallResult("unknown"))
        for role in ("teacher", "opponent"):
            assert ledger.booked_spend(role) == BookedSpend(2, 200, 4.0)
            with pytest.raises(CapReachedError, match="max_tokens"):
                ledger.reserve(request("more"), role, 100, 0.5, caps)
        assert ledger.booked_spend("judge") == BookedSpend()
        ledger.release(ledger.reserve(request("more"), "judge", 100, 2.0, caps))
    with Ledger(tmp_path / "l.sqlite") as again:
        assert again.booked_spend("teacher") == again.booked_spend("opponent") == BookedSpend(2, 200, 4.0)
        again.release(again.reserve(request("last"), "opponent", 50, 1.0, caps))
        with pytest.raises(CapReachedError, match="max_cost"):
            again.reserve(request("last"), "opponent", 50, 1.1, caps)
        assert [again.totals(role)["prompts"] for role in ("teacher", "opponent")] == [1, 1], "told apart all the same"


def test_what_is_settled_leaves_out_the_calls_in_flight(ledger):
    ledger.settle(ledger.reserve(request("a"), "teacher", 100, 2.0, Caps()), answered())
    ledger.mark_sent(ledger.reserve(request("b"), "teacher", 100, 2.0, Caps()))
    ledger.reserve(request("c"), "opponent", 100, 2.0, Caps())
    assert ledger.settled_spend("teacher") == BookedSpend(1, 15, pytest.approx(0.1))
    assert ledger.booked_spend("teacher") == BookedSpend(3, 215, pytest.approx(4.1))
    with LedgerView(ledger.path) as view:
        totals = view.totals("teacher")
    assert (totals["prompts"], totals["answered"], totals["under_way"]) == (2, 1, 1)


events = st.lists(
    st.tuples(
        st.sampled_from(["answer", "lose", "turn away", "release", "nothing"]),
        st.integers(1, 50),
        st.floats(0, 3),
        st.floats(0, 1),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(events=events, caps=st.builds(Caps, st.integers(0, 10), st.integers(0, 300), st.floats(0, 20)))
def test_the_books_balance_whatever_happens(tmp_path_factory, events, caps):
    """The booked spend is always the sum over the calls, within the caps, and unchanged after reopening."""
    path = tmp_path_factory.mktemp("books") / "l.sqlite"
    with Ledger(path) as ledger:
        for n, (event, tokens, cost, used) in enumerate(events):
            try:
                call = ledger.reserve(request(str(n)), "teacher", tokens, cost, caps)
            except CapReachedError:
                continue
            if event == "release":
                ledger.release(call)
                continue
            ledger.mark_sent(call)
            if event == "answer":
                spent = int(tokens * used)
                ledger.settle(call, CallResult("answered", "x", usage=Usage(spent, 0, cost * used)))
            elif event == "lose":
                ledger.settle(call, CallResult("unknown"))
            elif event == "turn away":
                ledger.settle(call, CallResult("failed", billable=False))
            booked = ledger.booked_spend("teacher")
            assert booked.exceeded_cap(caps) is None
            assert booked.calls <= caps.max_calls and booked.tokens <= caps.max_tokens
    with Ledger(path) as again:
        after = again.booked_spend("teacher")
    booked = ledger.booked_spend("teacher")
    assert (after.calls, after.tokens) == (booked.calls, booked.tokens)
    assert after.cost == pytest.approx(booked.cost, abs=1e-9)


def lose_whole_file(path):
    path.unlink()


def empty_file(path):
    path.write_bytes(b"")


def lose_last_commits(path):
    """As if only the database had been copied and not the write-ahead log beside it."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("DELETE FROM calls WHERE id = (SELECT MAX(id) FROM calls)")
        db.commit()


def cut_file(path):
    os.truncate(path, path.stat().st_size - 4096)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_whole_file, "is missing, but this run has made 3 calls"),
        (empty_file, "holds 0 of the 3 calls"),
        (lose_last_commits, "holds 2 of the 3 calls"),
        (cut_file, "malformed"),
    ],
)
def test_a_ledger_in_which_calls_are_missing_is_refused_and_can_be_restored(tmp_path, damage, words):
    path, copy = tmp_path / "l.sqlite", tmp_path / "copy.sqlite"
    with Ledger(path) as ledger:
        for n in range(3):
            call = ledger.reserve(request(str(n)), "teacher", 1, 0.0, Caps())
            ledger.mark_sent(call)
            ledger.settle(call, CallResult("answered", "x" * 3000))
        ledger.copy(copy)
    damage(path)
    damaged = path.read_bytes() if path.exists() else None
    for _ in range(2):
        with pytest.raises(UserError, match=words) as refused:
            Ledger(path)
        assert "restore it" in str(refused.value) and "fresh --run-dir" in str(refused.value)
        assert (path.read_bytes() if path.exists() else None) == damaged, "nothing is written over it"
    copy.rename(path)
    with Ledger(path) as ledger:
        assert ledger.totals("teacher")["answered"] == 3
    if damage is not cut_file:
        damage(path)
        (tmp_path / ".l.sqlite.calls").unlink()  # the stated way to do without
        Ledger(path).close()


def test_the_mark_counts_every_call_that_was_sent_or_ended(tmp_path):
    path, mark = tmp_path / "l.sqlite", tmp_path / ".l.sqlite.calls"
    with Ledger(path) as ledger:
        reserved, sent, local = (ledger.reserve(request(n), "teacher", 1, 0.0, Caps()) for n in "abc")
        ledger.mark_sent(sent)
        assert int(mark.read_text()) == 1, "a call in flight counts, because it may be billed"
        ledger.settle(sent, CallResult("unknown"))
        ledger.settle(local, CallResult("answered", "x", left=False))
        ledger.release(reserved)
        assert int(mark.read_text()) == 2
    mark.write_text("garbled")
    with Ledger(path):
        assert int(mark.read_text()) == 2
