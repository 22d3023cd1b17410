"""The ledger's tables of batches: which calls were submitted together, and under which id the endpoint knows them.

    prepared ──► submitting ──► submitted ──► ended

`prepared` is written before the file is uploaded, `submitting` before the batch is created at the endpoint. A batch
that a kill left `submitting` may exist there without an id here; its input file and its token, which is in its
metadata, find it again. The calls of a batch that is neither `prepared` nor `ended` belong to it, whether or not a
process waits for them.

SQL alone; the bookkeeping of caps is in `ledger`.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

BatchState = Literal["prepared", "submitting", "submitted", "ended"]
TABLES = """
CREATE TABLE IF NOT EXISTS batches (
    id INTEGER PRIMARY KEY,
    token TEXT NOT NULL UNIQUE,  -- in the metadata of the batch at the endpoint
    base_url TEXT NOT NULL,
    role TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('prepared', 'submitting', 'submitted', 'ended')),
    file_id TEXT,                -- of the input file at the endpoint
    batch_id TEXT,
    status TEXT,                 -- as the endpoint last reported it
    created_at REAL NOT NULL,
    submitted_at REAL,
    ended_at REAL
);
CREATE TABLE IF NOT EXISTS batched_calls (
    call INTEGER PRIMARY KEY REFERENCES calls,
    batch INTEGER NOT NULL REFERENCES batches
);
CREATE INDEX IF NOT EXISTS calls_of_batch ON batched_calls (batch);
"""
_COLUMNS = "id, token, base_url, role, state, file_id, batch_id, status, submitted_at"


@dataclass(frozen=True)
class BatchRecord:
    """A batch as the ledger knows it."""

    id: int
    token: str
    base_url: str
    role: str
    state: BatchState
    file_id: str | None
    batch_id: str | None
    status: str | None
    submitted_at: float | None
    calls: int  # that have no result yet

    @property
    def name(self) -> str:
        """Return how the batch is named to the user."""
        return batch_name(self.batch_id) if self.batch_id else f"a batch of input file {self.file_id}"


def batch_name(batch_id: str) -> str:
    """Return how a batch of an endpoint's id is named to the user."""
    return batch_id if batch_id.startswith("batch") else f"batch {batch_id}"


def insert_batch(db: sqlite3.Connection, token: str, base_url: str, role: str, calls: Iterable[int]) -> int:
    """Record a prepared batch of reserved calls, and return its id."""
    cursor = db.execute(
        "INSERT INTO batches (token, base_url, role, state, created_at) VALUES (?, ?, ?, 'prepared', ?)",
        (token, base_url, role, time.time()),
    )
    batch = int(cursor.lastrowid or 0)
    db.executemany("INSERT INTO batched_calls VALUES (?, ?)", ((call, batch) for call in calls))
    return batch


def find_open_batches(db: sqlite3.Connection) -> list[BatchRecord]:
    """Return the batches that have not ended, oldest first; none in a ledger that knows no batches."""
    if not _has_tables(db):
        return []
    query = f"""
    SELECT {_COLUMNS}, (
        SELECT COUNT(*) FROM batched_calls JOIN calls ON calls.id = call
        WHERE batch = batches.id AND calls.ended_at IS NULL
    ) AS calls
    FROM batches WHERE state != 'ended' ORDER BY id
    """
    return [BatchRecord(**dict(row)) for row in db.execute(query)]


def is_batched(db: sqlite3.Connection, call: int) -> bool:
    """Return whether a call belongs to a batch that was submitted, or may have been, and has not ended."""
    query = """
    SELECT 1 FROM batched_calls JOIN batches ON batches.id = batch
    WHERE call = ? AND batches.state IN ('submitting', 'submitted')
    """
    return _has_tables(db) and db.execute(query, (call,)).fetchone() is not None


def open_calls(db: sqlite3.Connection, batch: int) -> dict[str, int]:
    """Return the calls of a batch that have no result yet, by request key."""
    query = """
    SELECT key, calls.id FROM calls JOIN batched_calls ON call = calls.id
    WHERE batch = ? AND ended_at IS NULL ORDER BY calls.id
    """
    return {key: call for key, call in db.execute(query, (batch,))}


def delete_batches_of(db: sqlite3.Connection, roles: Iterable[str]) -> None:
    """Delete the batches of some roles, and which calls were in them; the calls themselves stay."""
    if _has_tables(db):
        for role in roles:
            db.execute("DELETE FROM batched_calls WHERE batch IN (SELECT id FROM batches WHERE role = ?)", (role,))
            db.execute("DELETE FROM batches WHERE role = ?", (role,))


def _has_tables(db: sqlite3.Connection) -> bool:
    """Return whether the ledger has these tables; one that was last written before there were batches has not."""
    return db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'batched_calls'").fetchone() is not None
