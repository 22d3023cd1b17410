"""The ledger: a record of every request, its result and its cost that survives a kill at any point.

SQLite in WAL mode with full sync: when a method returns, what it wrote survives a power cut. One row of `calls`
is one attempt:

    reserved ──► sent ──► answered | failed | unknown

`reserved` books the worst case against the caps before anything is sent. `sent` is written before the first byte is
sent. If a kill interrupts a sent call, it may have been billed, so it becomes `unknown` when the ledger is opened
again. Settling replaces the booking by the reported usage; without one (lost calls, servers that report none) the
worst case stays booked, so a cap is never exceeded.

The calls of a batch stay `sent` when the process ends, because the endpoint goes on with them; see `batch_records`.

A full disk loses no answer: before anything is sent, a reserve file holds disk space for the answers in flight. It is
deleted when the space is needed, and from then on no call is reserved.

Beside the ledger, a small file holds the number of calls that it has recorded. A ledger with fewer is refused: it was
emptied, or replaced by an older copy, so it would buy answers again and forget what was spent.

The ledger stores no headers and no API keys. It does not retry, limit rates or wait at a cap; its callers do. What runs
in one folder share is in `folder`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from purld.clients import batch_records
from purld.clients.batch_records import BatchRecord
from purld.clients.ledger_files import (
    CallMark,
    allocate_reserve,
    lock_ledger,
    lock_path,
    mark_path,
    read_mark,
)
from purld.errors import UserError
from purld.locks import is_locked
from purld.runs.files import atomic_write

if TYPE_CHECKING:
    from purld.clients.folder import FolderLedgers

Role = Literal["teacher", "scorer", "opponent", "judge"]
# Roles with the same budget share its caps: the scorer is the teacher asked about candidates, and the opponent is the
# teacher asked about held-out prompts.
BUDGETS: dict[Role, str] = {"teacher": "teacher", "scorer": "teacher", "opponent": "teacher", "judge": "judge"}
SCHEMA_VERSION = 1
SCHEMA = f"""
CREATE TABLE requests (
    key TEXT PRIMARY KEY,
    prompt_id TEXT NOT NULL,
    base_url TEXT NOT NULL,
    model TEXT NOT NULL,
    body TEXT NOT NULL               -- the request's JSON exactly as sent
) WITHOUT ROWID;
CREATE TABLE calls (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL REFERENCES requests,
    role TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'sent', 'answered', 'failed', 'unknown')),
    booked_tokens INTEGER NOT NULL,  -- what counts towards the caps: the worst case until settled
    booked_cost REAL NOT NULL,
    text TEXT,
    finish_reason TEXT,
    error TEXT,                      -- the class of a failure, such as http_503
    raw TEXT,                        -- the body that came with a failure
    input_tokens INTEGER,            -- as reported; NULL: not reported
    output_tokens INTEGER,
    cost REAL,
    reserved_at REAL NOT NULL,       -- seconds since 1970
    sent_at REAL,                    -- NULL: nothing left this machine
    ended_at REAL
);
CREATE INDEX calls_of_request ON calls (key, id);
PRAGMA user_version = {SCHEMA_VERSION};
"""
# The state of a request is that of its answered call, or else of its last call.
CURRENT_CALLS = """
SELECT * FROM (
    SELECT *, ROW_NUMBER() OVER (PARTITION BY key ORDER BY state = 'answered' DESC, id DESC) AS rank FROM calls
) WHERE rank = 1
"""

_REQUEST_COLUMNS = ("key", "prompt_id", "base_url", "model", "body")
_COPIED_COLUMNS = ("state", "text", "finish_reason", "error", "raw", "reserved_at", "ended_at")
_IMPORTED_AT_ONCE = 64  # calls
_SETTLE = (
    "UPDATE calls SET state = ?, text = ?, finish_reason = ?, error = ?, raw = ?,"
    " input_tokens = ?, output_tokens = ?, cost = ?, booked_tokens = ?, booked_cost = ?,"
    " ended_at = ?, sent_at = CASE WHEN ? THEN sent_at END WHERE id = ?"
)
# How long the ledger waits for another program that has locked it. A backup or a query takes less; whoever takes more
# has been forgotten. It is less than other runs wait for the folder's lock, which may be held meanwhile.
BUSY_SECONDS = 30.0
BUSY_AGAIN_SECONDS = 0.1  # how long it waits once that was in vain: for every call in flight, twice
_DISK_FULL = "{}: the disk is full; make room, then run the same command again to continue."

_LOCKED = (
    "{}: is locked by another program, such as a backup or a database browser; close it, then run the same command "
    "again to continue."
)


class CapReachedError(Exception):
    """A call would exceed a cap, which the message names; nothing was booked."""


class UnderWayElsewhereError(Exception):
    """Another run is asking this question, in the ledger that the message names; nothing was booked."""


@dataclass(frozen=True)
class Request:
    """A request to a model; two with equal `base_url` and `body` are the same request.

    `body` is the JSON exactly as sent: the model, the messages with encoded images, and the sampling settings.
    """

    base_url: str
    model: str
    body: str
    prompt_id: str

    @property
    def key(self) -> str:
        """Return the SHA-256 of the request's address and body."""
        return hashlib.sha256(f"{self.base_url}\n{self.body}".encode()).hexdigest()


@dataclass(frozen=True)
class Caps:
    """Hard limits of one budget over the whole life of the ledger; `None` means no limit."""

    max_calls: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None


@dataclass(frozen=True)
class BookedSpend:
    """The spending that counts towards the caps: calls sent or reserved, tokens, and cost in the prices' currency."""

    calls: int = 0
    tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: BookedSpend) -> BookedSpend:
        return BookedSpend(self.calls + other.calls, self.tokens + other.tokens, self.cost + other.cost)

    def __sub__(self, other: BookedSpend) -> BookedSpend:
        return BookedSpend(self.calls - other.calls, self.tokens - other.tokens, self.cost - other.cost)

    def exceeded_cap(self, caps: Caps) -> str | None:
        """Return the first cap that is exceeded, as its name and limit, or None."""
        limits = {"max_calls": self.calls, "max_tokens": self.tokens, "max_cost": self.cost}
        for name, value in limits.items():
            limit = getattr(caps, name)
            # Sums of many costs have relative errors of about 1e-15; a cap that is met exactly is not exceeded.
            if limit is not None and value > limit and not math.isclose(value, limit, rel_tol=1e-12):
                return f"{name} ({limit})"
        return None


@dataclass(frozen=True)
class Usage:
    """Tokens and cost as the endpoint reported them."""

    input_tokens: int
    output_tokens: int
    cost: float


@dataclass(frozen=True)
class CallResult:
    """The result of a call; `billable` is False if it cannot have been billed."""

    state: Literal["answered", "failed", "unknown"]
    text: str | None = None
    finish_reason: str | None = None
    error: str | None = None
    raw: str | None = None
    usage: Usage | None = None
    billable: bool = True
    left: bool = True  # False: nothing was sent

    @property
    def unusable(self) -> bool:
        """Return whether the reply may have been billed and holds no answer that can be used."""
        return self.state == "answered" and self.error is not None


@dataclass(frozen=True)
class WorstCase:
    """A request with the upper bounds of what its call may take."""

    request: Request
    tokens: int
    cost: float


@dataclass
class ReservedBatch:
    """What became of requests that were to be put into a batch.

    Attributes:
        batch: the batch's id in the ledger; None if it has no calls.
        token: marks the batch at the endpoint.
        calls: the reserved calls by request key, in the batch's order.
        known: the keys of requests of which this ledger now has another run's result.
        elsewhere: the ledgers in which other runs are asking the same, by request key.
        capped: the caps that keep requests out, by request key.
    """

    batch: int | None = None
    token: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    known: list[str] = field(default_factory=list)
    elsewhere: dict[str, str] = field(default_factory=dict)
    capped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FoundCall:
    """The call that counts for a request in one ledger.

    `row` is the call joined with its request. `interrupted` says that its process died after it had sent the call.
    `batched` is a call of a batch that the endpoint may be working on, while no process waits for it.
    """

    state: Literal["answered", "failed", "unknown", "under way", "batched"]
    row: sqlite3.Row
    path: Path
    interrupted: bool = False

    @property
    def value(self) -> int:
        """Return a number that is higher for a call that says more about its request."""
        ranks = {"failed": 0, "unknown": 1, "batched": 2, "under way": 3, "answered": 4}
        return ranks[self.state] + (self.state == "answered" and self.row["error"] is None)

    def result(self) -> CallResult | None:
        """Return the result of the call; None while it is under way or in a batch."""
        if self.state in ("under way", "batched"):
            return None
        result = _to_result(self.row)
        return replace(result, state="unknown", error="interrupted") if self.interrupted else result


class LedgerView:
    """A read-only view of a ledger, usable while another process writes to it.

    Raises:
        UserError: there is no ledger at `path`, or the file is not a ledger.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._mutex = threading.RLock()
        if not self.path.exists():
            raise UserError(f"{self.path}: there is no ledger here.")
        with _database_errors_named(self.path):
            self._db = _connect_read_only(self.path)
            self._db.row_factory = sqlite3.Row
            _check_version(self._db, self.path)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        with self._mutex:
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def copy(self, path: str | Path, roles: Collection[Role] = tuple(BUDGETS)) -> None:
        """Copy this ledger to `path`, completely or not at all.

        Args:
            path: the file to write.
            roles: the roles whose calls, with their answers and what they booked, are in the copy.
        """
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with self._mutex, _database_errors_named(self.path), contextlib.closing(sqlite3.connect(partial)) as target:
                self._db.backup(target)
                _keep_roles(target, roles)
                target.execute("PRAGMA journal_mode = DELETE")  # puts the whole copy into one file
            os.replace(partial, path)
        finally:
            # SQLite ignores it if a file that it keeps beside a database cannot be removed.
            for beside in ("", "-wal", "-shm", "-journal"):
                Path(f"{partial}{beside}").unlink(missing_ok=True)

    def find_result(self, key: str) -> CallResult | None:
        """Return the result of a request: its answer, or else its last ended call; None if there is none."""
        call = self.find_call(key)
        return call.result() if call else None

    def find_call(self, key: str) -> FoundCall | None:
        """Return the call that counts for a request: the answered one, or else the last; None if there is none.

        Of a dead process, a sent call is `unknown` unless it is in a batch, and a reserved one does not count.
        """
        rows = self._read_calls(key)
        open_rows = [row for row in rows if row["ended_at"] is None]
        if open_rows and not self._is_open():
            rows = self._read_calls(key)  # as the process left them, which may have settled a call since
            return self._last_call_of_dead_process(rows)
        if answered := [row for row in rows if row["state"] == "answered"]:
            return FoundCall("answered", answered[-1], self.path)
        if open_rows:
            return FoundCall("under way", open_rows[-1], self.path)
        return FoundCall(rows[-1]["state"], rows[-1], self.path) if rows else None

    def result_times(self, key: str) -> set[float]:
        """Return when the calls of a request were sent that came back, with an answer or without.

        The time tells a call from others in every copy of this ledger.
        """
        query = "SELECT sent_at FROM calls WHERE key = ? AND state IN ('failed', 'answered') AND sent_at IS NOT NULL"
        with self._mutex, _database_errors_named(self.path):
            return {sent_at for (sent_at,) in self._db.execute(query, (key,))}

    def _last_call_of_dead_process(self, rows: Sequence[sqlite3.Row]) -> FoundCall | None:
        counting = [row for row in rows if row["state"] != "reserved"]
        last = next((row for row in counting if row["state"] == "answered"), counting[-1] if counting else None)
        if last is None:
            return None
        if last["state"] == "sent" and self._is_batched(last["id"]):
            return FoundCall("batched", last, self.path)
        if last["state"] == "sent":
            return FoundCall("unknown", last, self.path, interrupted=True)
        return FoundCall(last["state"], last, self.path)

    def open_batches(self) -> list[BatchRecord]:
        """Return the batches of this ledger that have not ended, oldest first."""
        with self._mutex, _database_errors_named(self.path):
            return batch_records.find_open_batches(self._db)

    def _is_batched(self, call: int) -> bool:
        with self._mutex, _database_errors_named(self.path):
            return batch_records.is_batched(self._db, call)

    def _is_open(self) -> bool:
        """Return whether a process has this ledger open for writing."""
        return is_locked(lock_path(self.path))

    def was_lost(self, key: str) -> bool:
        """Return whether a call of a request became `unknown`."""
        return any(row["state"] == "unknown" for row in self._read_calls(key))

    def _read_calls(self, key: str) -> list[sqlite3.Row]:
        with self._mutex, _database_errors_named(self.path):
            return self._db.execute(
                "SELECT * FROM calls JOIN requests USING (key) WHERE key = ? ORDER BY id", (key,)
            ).fetchall()

    def _find_request(self, key: str) -> sqlite3.Row:
        with self._mutex, _database_errors_named(self.path):
            row: sqlite3.Row = self._db.execute("SELECT * FROM requests WHERE key = ?", (key,)).fetchone()
        return row

    def totals(self, role: Role) -> dict[str, float]:
        """Return counts, tokens and cost of the role's requests.

        `prompts`, `answered`, `failed`, `unknown` and `under_way` count requests; `calls` counts every attempt that was
        sent. Tokens and `cost` are as reported. `unsettled_cost` is the worst case of the calls that may have been
        billed but for which nothing was reported.
        """
        query = """
        SELECT (SELECT COUNT(*) FROM requests_now) AS prompts,
               (SELECT COUNT(*) FROM requests_now WHERE state = 'answered') AS answered,
               (SELECT COUNT(*) FROM requests_now WHERE state = 'failed') AS failed,
               (SELECT COUNT(*) FROM requests_now WHERE state = 'unknown') AS unknown,
               (SELECT COUNT(*) FROM requests_now WHERE state IN ('reserved', 'sent')) AS under_way,
               COUNT(sent_at) AS calls,
               COALESCE(SUM(input_tokens), 0) AS input_tokens,
               COALESCE(SUM(output_tokens), 0) AS output_tokens,
               COALESCE(SUM(cost), 0.0) AS cost,
               COALESCE(SUM(booked_cost) FILTER (WHERE cost IS NULL), 0.0) AS unsettled_cost
        FROM calls WHERE role = :role
        """
        current = f"WITH requests_now AS (SELECT * FROM ({CURRENT_CALLS}) WHERE role = :role)"
        with self._mutex, _database_errors_named(self.path):
            return dict(self._db.execute(current + query, {"role": role}).fetchone())

    def iter_requests(self) -> Iterator[dict[str, Any]]:
        """Iterate over all requests, oldest first, with the state and all calls of each."""
        with self._mutex, _database_errors_named(self.path):
            keys = self._db.execute("SELECT key FROM calls GROUP BY key ORDER BY MIN(id)").fetchall()
        for (key,) in keys:
            with self._mutex, _database_errors_named(self.path):
                request = self._find_request(key)
                calls = self._db.execute("SELECT * FROM calls WHERE key = ? ORDER BY id", (key,)).fetchall()
            yield _export_row(dict(request), [dict(call) for call in calls])

    def export(self, path: str | Path) -> int:
        """Write all requests as JSONL, completely or not at all, and return their number."""
        count = 0
        try:
            with atomic_write(Path(path)) as handle:
                for row in self.iter_requests():
                    handle.write(json.dumps(row) + "\n")
                    count += 1
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}).") from None
        return count


class Ledger(LedgerView):
    """A writable ledger, open in only one process at a time; threads may share it.

    On opening, calls that a dead process had sent become `unknown`, and those it had only reserved are deleted. Calls
    of a batch that was submitted stay in flight; those of one that was only prepared become `failed`.

    While it is open, it tells the calls that it has sent from those of earlier commands (`sent_here`).

    Args:
        path: the ledger; created if this run has none yet.
        others: the ledgers of the other runs in the folder, with which this one shares results; closed with it.

    Raises:
        UserError: another process has the ledger open, the file is not a ledger, calls are missing from it, or the
            disk is full.
    """

    def __init__(self, path: str | Path, others: FolderLedgers | None = None) -> None:
        self.path = Path(path)
        self._mutex = threading.RLock()
        self._others = others
        self._booked: dict[str, BookedSpend] = {}
        self._in_flight: dict[int, tuple[Role, BookedSpend]] = {}  # worst case by call id
        self._sent: set[int] = set()  # calls in flight that the mark counts
        self._lock = lock_ledger(lock_path(self.path))
        self._reserve_file = self.path.with_name(self.path.name + ".room")
        try:
            if is_blank(self.path):
                _check_recorded(self.path, 0)
            allocate_reserve(self._reserve_file)
            with self._folder_locked(), _database_errors_named(self.path):
                self._db = _connect(self.path)
                self._recorded = _count_recorded(self._db)
                _check_recorded(self.path, self._recorded)
                self._recover()
                self._last_before = self._find_last_call()
            self._mark = CallMark(self.path, self._recorded)
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        """Close the file and release its lock; closing twice is harmless."""
        super().close()
        if self._others:
            self._others.close()
        if not self._lock.closed:  # once unlocked, these files may belong to another process
            self._mark.close()
            self._reserve_file.unlink(missing_ok=True)
        self._lock.close()

    @property
    def unreadable_ledgers(self) -> list[Path]:
        """The other ledgers that could not be read, so that what they hold may be bought again."""
        return sorted(self._others.unreadable) if self._others else []

    def sent_here(self, key: str) -> bool:
        """Return whether a call of a request was sent since this ledger was opened."""
        query = "SELECT 1 FROM calls WHERE key = ? AND id > ? AND sent_at IS NOT NULL"
        with self._mutex, _database_errors_named(self.path):
            return self._db.execute(query, (key, self._last_before)).fetchone() is not None

    def _find_last_call(self) -> int:
        return int(self._db.execute("SELECT COALESCE(MAX(id), 0) FROM calls").fetchone()[0])

    def import_results(self, keys: Iterable[str], role: Role) -> None:
        """Copy the answers and lost calls of these requests from the other ledgers.

        The copies count as calls that were not sent: they cost this run nothing and count towards no cap.
        """
        if not self._others:
            return
        remaining = iter(keys)
        # A part at a time: one transaction for each takes long, and all calls at once take much memory.
        while part := list(itertools.islice(remaining, _IMPORTED_AT_ONCE)):
            found = [(key, call) for key in part if (call := self._others.find_call(key))]
            with self._mutex, self._transaction():
                for key, call in found:
                    self._copy_call(key, role, call)
        self._note_recorded(_count_recorded(self._db))

    def _copy_call(self, key: str, role: Role, call: FoundCall) -> None:
        """Copy an answer or a lost call if it is better than what this ledger has."""
        own = self.find_call(key)
        if call.state not in ("answered", "unknown") or (own and own.value >= call.value):
            return
        values = dict(call.row)
        if call.interrupted:
            values |= {"state": "unknown", "error": "interrupted", "ended_at": time.time()}
        self._db.execute(
            "INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, ?)", tuple(values[name] for name in _REQUEST_COLUMNS)
        )
        self._db.execute(
            "INSERT INTO calls (key, role, state, booked_tokens, booked_cost, text, finish_reason, error, raw,"
            " reserved_at, ended_at) VALUES (?, ?, ?, 0, 0.0, ?, ?, ?, ?, ?, ?)",
            (key, role, *(values[name] for name in _COPIED_COLUMNS)),
        )

    def claim(
        self,
        request: Request,
        role: Role,
        tokens: int,
        cost: float,
        caps: Caps,
        settles: Callable[[CallResult], bool] = lambda result: result.state != "failed",
        wait: bool = True,
    ) -> int | None:
        """Book a call as `reserve` does, unless another run makes the same call or knows its result.

        Args:
            request: the request.
            role: the role that asks.
            tokens: the worst case of the call's tokens.
            cost: the worst case of its cost.
            caps: the caps of the role's budget.
            settles: tells whether a result of another run makes the call needless.
            wait: wait while another process holds the folder's lock.

        Returns:
            The call's id; None if this ledger now has a copy of another run's result.

        Raises:
            UnderWayElsewhereError: another run is making this call.
            CapReachedError: this call might make the role's budget exceed a cap.
            FolderLockedError: the folder is locked, or stays so.
            UserError: the disk is full, or another run has put this question into a batch and does not wait for it.
        """
        with self._folder_locked(wait):
            if self._copied_from_others(request.key, role, settles):
                return None
            return self.reserve(request, role, tokens, cost, caps)

    def _copied_from_others(self, key: str, role: Role, settles: Callable[[CallResult], bool]) -> bool:
        """Copy another run's result that makes a call needless, and return whether there is one."""
        call = self._others.find_call(key) if self._others else None
        if call and call.state == "under way":
            raise UnderWayElsewhereError(str(call.path))
        if call and call.state == "batched":
            raise UserError(_describe_batched_elsewhere(call.path))
        result = call.result() if call else None
        if not (call and result and settles(result)):
            return False
        with self._mutex, self._transaction():
            self._copy_call(key, role, call)
        self._note_recorded(_count_recorded(self._db))
        own = self.find_result(key)
        return own is not None and settles(own)

    def count_results(self, key: str) -> int:
        """Return how many calls of a request the folder's runs sent and got back, with an answer or without.

        A call that is in several ledgers, because one is a copy of another, counts once.
        """
        return len(self.result_times(key) | (self._others.result_times(key) if self._others else set()))

    def _folder_locked(self, wait: bool = True) -> contextlib.AbstractContextManager[None]:
        if self._others is None:
            return contextlib.nullcontext()
        return self._others.locked() if wait else self._others.locked(seconds=0.0)

    def _is_open(self) -> bool:
        return True

    def reserve(self, request: Request, role: Role, tokens: int, cost: float, caps: Caps) -> int:
        """Book the worst case of one call and return the call's id.

        Raises:
            CapReachedError: this call might make the role's budget exceed a cap.
            UserError: the disk is full.
        """
        self._check_room()
        worst = BookedSpend(1, tokens, cost)
        with self._mutex:
            total = self.booked_spend(role) + worst
            if cap := total.exceeded_cap(caps):
                raise CapReachedError(cap)
            with self._transaction():
                call = self._insert_reserved(request, role, worst)
            self._booked[BUDGETS[role]] = total
            self._in_flight[call] = (role, worst)
            return call

    def _check_room(self) -> None:
        if not self._reserve_file.exists():
            raise UserError(_DISK_FULL.format(self.path))

    def _insert_reserved(self, request: Request, role: Role, worst: BookedSpend) -> int:
        self._db.execute(
            "INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, ?)",
            (request.key, request.prompt_id, request.base_url, request.model, request.body),
        )
        cursor = self._db.execute(
            "INSERT INTO calls (key, role, state, booked_tokens, booked_cost, reserved_at)"
            " VALUES (?, ?, 'reserved', ?, ?, ?)",
            (request.key, role, worst.tokens, worst.cost, time.time()),
        )
        return int(cursor.lastrowid or 0)

    def reserve_batch(
        self,
        wanted: Sequence[WorstCase],
        role: Role,
        base_url: str,
        caps: Caps,
        settles: Callable[[CallResult], bool],
    ) -> ReservedBatch:
        """Book the worst case of one call for each request, as `claim` does, and record them as a prepared batch.

        Raises:
            UserError: the disk is full, the folder stays locked, or another run has put one of the questions into a
                batch and does not wait for it.
        """
        self._check_room()
        reserved = ReservedBatch(token=secrets.token_hex(16))
        with self._folder_locked(), self._mutex:
            chosen = []
            for case in wanted:
                key = case.request.key
                try:
                    if self._copied_from_others(key, role, settles):
                        reserved.known.append(key)
                    else:
                        chosen.append(case)
                except UnderWayElsewhereError as other:
                    reserved.elsewhere[key] = str(other)
            self._book_batch(chosen, role, base_url, caps, reserved)
        return reserved

    def _book_batch(
        self, wanted: Sequence[WorstCase], role: Role, base_url: str, caps: Caps, reserved: ReservedBatch
    ) -> None:
        """Reserve a call for each request that the caps leave room for, all in one transaction."""
        total, fitting = self.booked_spend(role), list[tuple[Request, BookedSpend]]()
        for case in wanted:
            worst = BookedSpend(1, case.tokens, case.cost)
            if cap := (total + worst).exceeded_cap(caps):
                reserved.capped[case.request.key] = cap
            else:
                total += worst
                fitting.append((case.request, worst))
        if not fitting:
            return
        with self._transaction():
            for request, worst in fitting:
                reserved.calls[request.key] = self._insert_reserved(request, role, worst)
            reserved.batch = batch_records.insert_batch(
                self._db, reserved.token, base_url, role, reserved.calls.values()
            )
        self._booked[BUDGETS[role]] = total
        for request, worst in fitting:
            self._in_flight[reserved.calls[request.key]] = (role, worst)

    def open_calls(self, batch: int) -> dict[str, int]:
        """Return the calls of a batch that have no result yet, by request key."""
        with self._mutex, _database_errors_named(self.path):
            return batch_records.open_calls(self._db, batch)

    def mark_batch_sent(self, batch: int, file_id: str) -> None:
        """Record that a batch is about to be created at the endpoint, from the input file that was uploaded."""
        now = time.time()
        calls = list(self.open_calls(batch).values())
        with self._mutex:
            with self._transaction():
                self._db.execute(
                    "UPDATE batches SET state = 'submitting', file_id = ?, submitted_at = ? WHERE id = ?",
                    (file_id, now, batch),
                )
                self._db.executemany(
                    "UPDATE calls SET state = 'sent', sent_at = ? WHERE id = ?", ((now, call) for call in calls)
                )
            self._note_recorded(self._recorded + len(set(calls) - self._sent))
            self._sent.update(calls)

    def note_batch(self, batch: int, batch_id: str, status: str) -> None:
        """Record the id by which the endpoint knows a batch, and what it said of it."""
        self._write(
            "UPDATE batches SET state = 'submitted', batch_id = ?, status = ? WHERE id = ?", (batch_id, status, batch)
        )

    def end_batch(self, batch: int, status: str, rest: CallResult) -> list[str]:
        """Record the end of a batch; calls without a result get `rest`. Return the keys of these calls."""
        left = self.open_calls(batch)
        with self._mutex:
            freed = [self._freed(call, rest) for call in left.values()]
            with self._transaction():
                for call in left.values():
                    self._db.execute(_SETTLE, self._settled_values(call, rest))
                self._db.execute(
                    "UPDATE batches SET state = 'ended', status = ?, ended_at = ? WHERE id = ?",
                    (status, time.time(), batch),
                )
            self._note_recorded(self._recorded + len(set(left.values()) - self._sent))
            for call, (role, spend) in zip(left.values(), freed, strict=True):
                self._close_call(call, role, spend)
        return list(left)

    def mark_sent(self, call: int) -> None:
        """Record that the call is about to be sent."""
        with self._mutex:
            self._write("UPDATE calls SET state = 'sent', sent_at = ? WHERE id = ?", (time.time(), call))
            self._sent.add(call)
            self._note_recorded(self._recorded + 1)

    def settle(self, call: int, result: CallResult) -> None:
        """Record the result of the call and replace its booking by the actual usage."""
        with self._mutex:
            role, freed = self._freed(call, result)
            self._write(_SETTLE, self._settled_values(call, result))
            if call not in self._sent:  # a local model's call, which is never sent
                self._note_recorded(self._recorded + 1)
            self._close_call(call, role, freed)

    def _freed(self, call: int, result: CallResult) -> tuple[Role, BookedSpend]:
        """Return the role of a call, and what of its booking its result frees."""
        role, worst = self._in_flight[call]
        return role, worst - _actual_spend(result, worst)

    def _settled_values(self, call: int, result: CallResult) -> tuple[Any, ...]:
        """Return the values of `_SETTLE`."""
        actual, usage = _actual_spend(result, self._in_flight[call][1]), result.usage
        return (
            *(result.state, result.text, result.finish_reason, result.error, result.raw),
            *((usage.input_tokens, usage.output_tokens, usage.cost) if usage else (None, None, None)),
            *(actual.tokens, actual.cost, time.time(), result.left, call),
        )

    def release(self, call: int) -> None:
        """Cancel a reserved call that was not sent."""
        with self._mutex:
            role, worst = self._in_flight[call]
            self._write("DELETE FROM calls WHERE id = ? AND state = 'reserved'", (call,))
            self._close_call(call, role, worst)

    def booked_spend(self, role: Role) -> BookedSpend:
        """Return the spending that counts towards the role's caps, with calls in flight at their worst case."""
        with self._mutex:
            return self._booked.get(BUDGETS[role], BookedSpend())

    def settled_spend(self, role: Role) -> BookedSpend:
        """Return the part of `booked_spend` that belongs to ended calls."""
        with self._mutex:
            in_flight = [worst for other, worst in self._in_flight.values() if BUDGETS[other] == BUDGETS[role]]
            return self.booked_spend(role) - sum(in_flight, BookedSpend())

    def calls_in_flight(self, role: Role) -> int:
        """Return the number of calls that are reserved or sent and not yet settled."""
        with self._mutex:
            return sum(other == role for other, _ in self._in_flight.values())

    def _write(self, statement: str, values: Sequence[Any]) -> None:
        """Write a change of a reserved call; on a full disk, delete the reserve file to make room for it."""
        with self._mutex, _database_errors_named(self.path):
            try:
                self._commit(statement, values)
            except sqlite3.OperationalError as error:
                if not (_may_lack_room(error) and self._reserve_file.exists()):
                    raise
                self._reserve_file.unlink()
                self._commit(statement, values)

    def _commit(self, statement: str, values: Sequence[Any]) -> None:
        with self._sql_transaction():
            self._db.execute(statement, values)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with _database_errors_named(self.path), self._sql_transaction():
            yield

    @contextlib.contextmanager
    def _sql_transaction(self) -> Iterator[None]:
        self._begin()
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    def _begin(self) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if _is_busy(error):
                self._db.execute(f"PRAGMA busy_timeout = {round(1000 * BUSY_AGAIN_SECONDS)}")
            raise

    def _note_recorded(self, count: int) -> None:
        self._recorded = count
        self._mark.write(count)

    def _recover(self) -> None:
        now = time.time()
        with self._transaction():
            for batch in batch_records.find_open_batches(self._db):
                if batch.state == "prepared":
                    self._give_up_prepared(batch.id)
                elif not batch.calls:  # a kill came after its last answer
                    self._db.execute("UPDATE batches SET state = 'ended', ended_at = ? WHERE id = ?", (now, batch.id))
            self._db.execute("DELETE FROM calls WHERE state = 'reserved'")
            self._db.execute("DELETE FROM requests WHERE key NOT IN (SELECT key FROM calls)")
            self._db.execute(
                "UPDATE calls SET state = 'unknown', error = 'interrupted', ended_at = ? WHERE state = 'sent'"
                " AND id NOT IN (SELECT call FROM batched_calls)",
                (now,),
            )
        in_flight = self._db.execute("SELECT id, role, booked_tokens, booked_cost FROM calls WHERE ended_at IS NULL")
        self._in_flight = {call: (role, BookedSpend(1, *worst)) for call, role, *worst in in_flight}
        self._sent = set(self._in_flight)
        rows = self._db.execute(
            "SELECT role, COUNT(sent_at), SUM(booked_tokens), SUM(booked_cost) FROM calls GROUP BY role"
        )
        self._booked = {}
        for role, *sums in rows:
            budget = BUDGETS[role]
            self._booked[budget] = self._booked.get(budget, BookedSpend()) + BookedSpend(*sums)

    def _give_up_prepared(self, batch: int) -> None:
        """Record that a batch was never created at the endpoint; its requests may have been uploaded all the same."""
        self._db.execute(
            "UPDATE calls SET state = 'failed', error = 'not_submitted', booked_tokens = 0, booked_cost = 0.0,"
            " ended_at = ? WHERE id IN (SELECT call FROM batched_calls WHERE batch = ?)",
            (time.time(), batch),
        )
        self._db.execute("UPDATE batches SET state = 'ended', ended_at = ? WHERE id = ?", (time.time(), batch))

    def _close_call(self, call: int, role: Role, freed: BookedSpend) -> None:
        del self._in_flight[call]
        self._sent.discard(call)
        self._booked[BUDGETS[role]] = self._booked[BUDGETS[role]] - freed


def _actual_spend(result: CallResult, worst: BookedSpend) -> BookedSpend:
    """Return what an ended call counts towards the caps."""
    calls = 1 if result.left else 0
    if result.usage:
        return BookedSpend(calls, result.usage.input_tokens + result.usage.output_tokens, result.usage.cost)
    return BookedSpend(calls, worst.tokens, worst.cost) if result.left and result.billable else BookedSpend(calls)


def _to_result(row: sqlite3.Row) -> CallResult:
    usage = None if row["cost"] is None else Usage(row["input_tokens"], row["output_tokens"], row["cost"])
    return CallResult(row["state"], row["text"], row["finish_reason"], row["error"], row["raw"], usage)


def _export_row(request: dict[str, Any], calls: list[dict[str, Any]]) -> dict[str, Any]:
    current = max(calls, key=lambda call: (call["state"] == "answered", call["id"]))
    body = request.pop("body")
    return {
        **request,
        "role": current["role"],
        "state": current["state"],
        "request": json.loads(body),
        "bytes": len(body.encode()),
        "answer": current["text"],
        "calls": [{name: value for name, value in call.items() if name not in ("id", "key")} for call in calls],
    }


def _describe_batched_elsewhere(path: Path) -> str:
    return (
        f"{path}: its run has put questions of this one into a batch and does not wait for it; continue that run to "
        f"collect the answers, or give the batch up with `purld ledger {path.parent} --cancel-batches`."
    )


def check_not_lost(path: Path) -> None:
    """Check that the calls which a run has made are in its ledger; writes nothing.

    Raises:
        UserError: the ledger is missing, empty or older than its last call, or it cannot be read.
    """
    if is_blank(path):
        _check_recorded(path, 0)
    else:
        with LedgerView(path) as view, _database_errors_named(path):
            _check_recorded(path, _count_recorded(view._db))


def describe_lost_calls(path: Path, recorded: int, made: int, remedy: str = "or") -> str:
    """Return the sentence that refuses a ledger in which calls are missing."""
    if path.exists():
        state = f"holds {recorded:,} of the {made:,} calls that this run has made: it was emptied or is an older copy"
    else:
        state = f"is missing, but this run has made {made:,} calls"
    return (
        f"{path}: {state}; so that no answer is bought again and the caps hold, restore it, {remedy} "
        "start a fresh --run-dir."
    )


def is_blank(path: Path) -> bool:
    """Return whether there is no ledger, or only the beginning of one that a kill interrupted.

    Raises:
        UserError: the file is not a database.
    """
    if not path.exists() or not path.stat().st_size:
        return True
    with _database_errors_named(path), contextlib.closing(_connect_read_only(path)) as db:
        return db.execute("SELECT 1 FROM sqlite_schema").fetchone() is None


def _connect_read_only(path: Path) -> sqlite3.Connection:
    """Open a ledger for reading; a transaction of its creation that a kill interrupted is rolled back first.

    Only then is there a rollback journal, which a read-only connection may not use.
    """
    try:
        return _connect_in_mode(path, "ro")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
    _connect_in_mode(path, "rw").close()
    return _connect_in_mode(path, "ro")


def _connect_in_mode(path: Path, mode: Literal["ro", "rw"]) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    try:
        db.execute("SELECT 1 FROM sqlite_schema").fetchone()
    except sqlite3.Error:
        db.close()
        raise
    return db


def _check_recorded(path: Path, recorded: int) -> None:
    made = read_mark(path)
    if recorded < made:
        raise UserError(describe_lost_calls(path, recorded, made, f"delete {mark_path(path)} to do without, or"))


def _count_recorded(db: sqlite3.Connection) -> int:
    """Count the calls that were sent or have ended; no such call is ever deleted."""
    (count,) = db.execute("SELECT COUNT(*) FROM calls WHERE state != 'reserved'").fetchone()
    return int(count)


def _keep_roles(db: sqlite3.Connection, roles: Collection[Role]) -> None:
    """Delete the calls of all other roles, and leave nothing of them in the file."""
    if others := [role for role in BUDGETS if role not in roles]:
        with db:
            batch_records.delete_batches_of(db, others)
            db.executemany("DELETE FROM calls WHERE role = ?", ((role,) for role in others))
            db.execute("DELETE FROM requests WHERE key NOT IN (SELECT key FROM calls)")
        db.execute("VACUUM")


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    if not db.execute("SELECT 1 FROM sqlite_schema").fetchone():
        db.executescript(f"BEGIN; {SCHEMA} COMMIT;")
    _check_version(db, path)
    db.executescript(f"BEGIN; {batch_records.TABLES} COMMIT;")
    return db


def _check_version(db: sqlite3.Connection, path: Path) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version != SCHEMA_VERSION:
        db.close()
        raise UserError(
            f"{path}: is not a ledger of version {SCHEMA_VERSION}, which this purld needs (found {version})."
        )


@contextlib.contextmanager
def _database_errors_named(path: Path) -> Iterator[None]:
    """Convert the errors of a damaged or locked database or a full disk to a UserError of one sentence."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if _primary_code(error) == sqlite3.SQLITE_FULL:
            raise UserError(_DISK_FULL.format(path)) from None
        if _is_busy(error):
            raise UserError(_LOCKED.format(path)) from None
        raise UserError(
            f"{path}: the ledger cannot be used ({error}); restore it from a copy, or start a fresh --run-dir."
        ) from None


def _is_busy(error: sqlite3.Error) -> bool:
    """Return whether another program has the database locked."""
    return _primary_code(error) == sqlite3.SQLITE_BUSY


def _may_lack_room(error: sqlite3.Error) -> bool:
    """Return whether a write may have failed for want of disk space, which SQLite also reports as an I/O error."""
    return _primary_code(error) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def _primary_code(error: sqlite3.Error) -> int | None:
    """Return SQLite's code without what tells cases of it apart; None if the error is not SQLite's."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
