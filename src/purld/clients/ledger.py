"""The ledger: every request that may leave, what came back, and what it cost, safe against a kill at any point.

SQLite in WAL mode with full sync: when a method returns, what it wrote survives a power cut. One row of `calls`
is one attempt:

    reserved ──► sent ──► answered | failed | unknown

`reserved` books the worst case against the caps before anything leaves. `sent` is written before the first
byte leaves, so a call that a kill interrupts is known to be lost: whether it was billed cannot be known, and
it becomes `unknown` on the next open. Settling replaces the booking by the reported usage; without one (lost
calls, servers that report none) the worst case stays booked, so a cap is never passed.

A full disk costs no answer: room for the answers under way is held on disk before anything leaves, and given up
when it is needed. From then on nothing is reserved.

The ledger holds no headers and no keys, waits for nobody and decides no policy: retries, pacing and waiting
for room under a cap are its callers' business.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

from purld.errors import UserError

Role = Literal["teacher", "scorer", "opponent", "judge"]
# Roles that spend from one purse share its caps: the scorer is the teacher, asked about candidates, and so is the
# opponent, asked about held-out prompts.
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
# A request stands where its answered call stands, or else its last one.
CURRENT = """
SELECT * FROM (
    SELECT *, ROW_NUMBER() OVER (PARTITION BY key ORDER BY state = 'answered' DESC, id DESC) AS place FROM calls
) WHERE place = 1
"""


# For the answers under way: 64 of them, of 200 KB each, with the pages that SQLite writes around them.
ROOM = 16 * 2**20
_WORTH = {"failed": 0, "unknown": 1, "answered": 2}  # of what is known of a request
_REQUEST = ("key", "prompt_id", "base_url", "model", "body")
_ADOPTED = ("state", "text", "finish_reason", "error", "raw", "reserved_at", "ended_at")


_FULL = "{}: the disk is full; make room, and the same command goes on from here."


class CapReachedError(Exception):
    """A call would pass a hard cap; the message names it. Nothing was booked."""


@dataclass(frozen=True)
class Request:
    """A question to a model: equal `base_url` and `body` are the same question.

    `body` is the JSON exactly as sent, so it holds the model, the messages (bytes of images included) and the
    sampling settings.
    """

    base_url: str
    model: str
    body: str
    prompt_id: str

    @property
    def key(self) -> str:
        """SHA-256 of where the request goes and what it says."""
        return hashlib.sha256(f"{self.base_url}\n{self.body}".encode()).hexdigest()


@dataclass(frozen=True)
class Caps:
    """Hard limits of one purse over the ledger's whole life; `None` is no limit."""

    max_calls: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None


@dataclass(frozen=True)
class BookedSpend:
    """What counts towards the caps: calls that left or may leave, tokens, and cost in the prices' currency."""

    calls: int = 0
    tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: BookedSpend) -> BookedSpend:
        return BookedSpend(self.calls + other.calls, self.tokens + other.tokens, self.cost + other.cost)

    def __sub__(self, other: BookedSpend) -> BookedSpend:
        return BookedSpend(self.calls - other.calls, self.tokens - other.tokens, self.cost - other.cost)

    def passes(self, caps: Caps) -> str | None:
        """The name of the first cap that this passes."""
        limits = {"max_calls": self.calls, "max_tokens": self.tokens, "max_cost": self.cost}
        for name, value in limits.items():
            limit = getattr(caps, name)
            # The sum of many costs is off by parts in 10^15; a cap that is met exactly is not passed.
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
    """How a call ended. `billable` False says that it cannot have been billed."""

    state: Literal["answered", "failed", "unknown"]
    text: str | None = None
    finish_reason: str | None = None
    error: str | None = None
    raw: str | None = None
    usage: Usage | None = None
    billable: bool = True
    left: bool = True  # False: nothing left this machine


class LedgerView:
    """A ledger to look at, also while another process writes it.

    `beside` are the ledgers of other runs: what one of them holds need not be bought again. One that cannot be
    read is passed over, and `passed_over` names it.

    Raises:
        UserError: there is no ledger at `path`, or the file is something else.
    """

    def __init__(self, path: str | Path, beside: Sequence[Path] = ()) -> None:
        self.path = Path(path)
        self._mutex = threading.RLock()
        self._open_beside(beside)
        if not self.path.exists():
            raise UserError(f"{self.path}: there is no ledger here.")
        with _readable(self.path):
            self._db = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
            )
            self._db.row_factory = sqlite3.Row
            _check_version(self._db, self.path)

    def close(self) -> None:
        """Give the file back; closing twice is harmless."""
        with self._mutex:
            self._db.close()
        for other in self._beside:
            other.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def copy(self, path: str | Path) -> None:
        """Write this ledger to `path`, whole or not at all: whoever opens the copy need not buy anything again."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with self._mutex, _readable(self.path), contextlib.closing(sqlite3.connect(partial)) as target:
                self._db.backup(target)
                target.execute("PRAGMA journal_mode = DELETE")  # the whole copy in one file
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def find(self, key: str) -> CallResult | None:
        """How the request stands, if it was ever sent, here or beside: its answer, or the end of its last call."""
        _, call = self._best(key)
        return _result(call) if call else None

    def _open_beside(self, paths: Sequence[Path]) -> None:
        self.passed_over: list[Path] = []
        self._beside: list[LedgerView] = []
        for path in paths:
            try:
                self._beside.append(LedgerView(path))
            except UserError:
                self.passed_over.append(path)

    def _best(self, key: str) -> tuple[LedgerView, sqlite3.Row | None]:
        """Where most is known of a request, and its call there."""
        calls: list[tuple[LedgerView, sqlite3.Row | None]] = [(self, self._last(key))]
        for other in tuple(self._beside):
            try:
                calls.append((other, other._last(key)))
            except UserError:  # damaged further in than its first page, or locked
                self._beside.remove(other)
                self.passed_over.append(other.path)
                other.close()
        return max(calls, key=lambda found: _WORTH[found[1]["state"]] if found[1] else -1)

    def _last(self, key: str) -> sqlite3.Row | None:
        """The request and its answered call, or else the last that ended."""
        with self._mutex, _readable(self.path):
            row: sqlite3.Row | None = self._db.execute(
                "SELECT * FROM calls JOIN requests USING (key) WHERE key = ? AND ended_at IS NOT NULL"
                " ORDER BY state = 'answered' DESC, id DESC LIMIT 1",
                (key,),
            ).fetchone()
        return row

    def _request(self, key: str) -> sqlite3.Row:
        with self._mutex, _readable(self.path):
            row: sqlite3.Row = self._db.execute("SELECT * FROM requests WHERE key = ?", (key,)).fetchone()
        return row

    def totals(self, role: Role) -> dict[str, float]:
        """What the role's requests came to.

        `prompts`, `answered`, `failed`, `unknown` and `under_way` count requests; `calls` every attempt that left
        this machine. Tokens and `cost` are as reported; `unsettled_cost` is the worst case of the calls for which
        nothing was reported and which may have been billed.
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
        now = f"WITH requests_now AS (SELECT * FROM ({CURRENT}) WHERE role = :role)"
        with self._mutex, _readable(self.path):
            return dict(self._db.execute(now + query, {"role": role}).fetchone())

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every request that ever left, oldest first, with where it stands and all its calls."""
        with self._mutex, _readable(self.path):
            keys = self._db.execute("SELECT key FROM calls GROUP BY key ORDER BY MIN(id)").fetchall()
        for (key,) in keys:
            with self._mutex, _readable(self.path):
                request = self._request(key)
                calls = self._db.execute("SELECT * FROM calls WHERE key = ? ORDER BY id", (key,)).fetchall()
            yield _export_row(dict(request), [dict(call) for call in calls])

    def export(self, path: str | Path) -> int:
        """Write `rows` as JSONL, whole or not at all, and return how many there are."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        count = 0
        try:
            with partial.open("w", encoding="utf-8") as handle:
                for row in self.rows():
                    handle.write(json.dumps(row) + "\n")
                    count += 1
            os.replace(partial, path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}).") from None
        finally:
            partial.unlink(missing_ok=True)
        return count


class Ledger(LedgerView):
    """A ledger to write, open in this process alone; safe to share between threads.

    Calls that a dead process had sent become `unknown`; what it had only reserved is released.

    Raises:
        UserError: another process has the ledger open, the file is no ledger, or the disk is full.
    """

    def __init__(self, path: str | Path, beside: Sequence[Path] = ()) -> None:
        self.path = Path(path)
        self._mutex = threading.RLock()
        self._open_beside(beside)
        self._booked: dict[str, BookedSpend] = {}
        self._open: dict[int, tuple[Role, BookedSpend]] = {}
        self._lock = _exclusive(self.path.with_name(self.path.name + ".lock"))
        self._room = self.path.with_name(self.path.name + ".room")
        try:
            _allocate(self._room)
            with _readable(self.path):
                self._db = _connect(self.path)
                self._recover()
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        """Give the file and its lock back; closing twice is harmless."""
        super().close()
        if not self._lock.closed:  # after that, the room is another process's
            self._room.unlink(missing_ok=True)
        self._lock.close()

    def adopt(self, keys: Iterable[str], role: Role) -> None:
        """Copy what the ledgers beside this one know of these questions: answers, and calls that were lost.

        The copies are calls that never left here: they cost this run nothing and count towards no cap.
        """
        if not self._beside:
            return
        with self._mutex, self._transaction():
            for key in keys:
                ledger, call = self._best(key)
                if ledger is self or call is None or call["state"] == "failed":
                    continue
                self._db.execute(
                    "INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, ?)", tuple(call[name] for name in _REQUEST)
                )
                self._db.execute(
                    "INSERT INTO calls (key, role, state, booked_tokens, booked_cost, text, finish_reason, error, raw,"
                    " reserved_at, ended_at) VALUES (?, ?, ?, 0, 0.0, ?, ?, ?, ?, ?, ?)",
                    (key, role, *(call[name] for name in _ADOPTED)),
                )

    def reserve(self, request: Request, role: Role, tokens: int, cost: float, caps: Caps) -> int:
        """Book the worst case of one call and return the call's number.

        Raises:
            CapReachedError: with this call the role's purse might pass a cap.
            UserError: the disk is full.
        """
        if not self._room.exists():
            raise UserError(_FULL.format(self.path))
        worst = BookedSpend(1, tokens, cost)
        with self._mutex:
            total = self.booked(role) + worst
            if cap := total.passes(caps):
                raise CapReachedError(cap)
            with self._transaction():
                self._db.execute(
                    "INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, ?)",
                    (request.key, request.prompt_id, request.base_url, request.model, request.body),
                )
                cursor = self._db.execute(
                    "INSERT INTO calls (key, role, state, booked_tokens, booked_cost, reserved_at)"
                    " VALUES (?, ?, 'reserved', ?, ?, ?)",
                    (request.key, role, tokens, cost, time.time()),
                )
            call = int(cursor.lastrowid or 0)
            self._booked[BUDGETS[role]] = total
            self._open[call] = (role, worst)
            return call

    def sent(self, call: int) -> None:
        """Say that the call's first byte is about to leave."""
        self._write("UPDATE calls SET state = 'sent', sent_at = ? WHERE id = ?", (time.time(), call))

    def settle(self, call: int, result: CallResult) -> None:
        """Record how the call ended and replace its booking by what it cost."""
        with self._mutex:
            role, worst = self._open[call]
            actual = _actual(result, worst)
            usage = result.usage
            self._write(
                "UPDATE calls SET state = ?, text = ?, finish_reason = ?, error = ?, raw = ?,"
                " input_tokens = ?, output_tokens = ?, cost = ?, booked_tokens = ?, booked_cost = ?,"
                " ended_at = ?, sent_at = CASE WHEN ? THEN sent_at END WHERE id = ?",
                (
                    *(result.state, result.text, result.finish_reason, result.error, result.raw),
                    *((usage.input_tokens, usage.output_tokens, usage.cost) if usage else (None, None, None)),
                    *(actual.tokens, actual.cost, time.time(), result.left, call),
                ),
            )
            self._close_call(call, role, worst - actual)

    def release(self, call: int) -> None:
        """Take back a reservation that was not sent."""
        with self._mutex:
            role, worst = self._open[call]
            self._write("DELETE FROM calls WHERE id = ? AND state = 'reserved'", (call,))
            self._close_call(call, role, worst)

    def booked(self, role: Role) -> BookedSpend:
        """What counts towards the caps of the role's purse now, calls under way at their worst case."""
        with self._mutex:
            return self._booked.get(BUDGETS[role], BookedSpend())

    def settled(self, role: Role) -> BookedSpend:
        """What `booked` counts for calls that have ended."""
        with self._mutex:
            under_way = [worst for of, worst in self._open.values() if BUDGETS[of] == BUDGETS[role]]
            return self.booked(role) - sum(under_way, BookedSpend())

    def under_way(self, role: Role) -> int:
        """How many calls are reserved or sent and not yet settled."""
        with self._mutex:
            return sum(of == role for of, _ in self._open.values())

    def _write(self, statement: str, values: Sequence[Any]) -> None:
        """Write of a call that is reserved. On a full disk, that takes the room that is held for it."""
        with self._mutex, _readable(self.path):
            try:
                self._commit(statement, values)
            except sqlite3.OperationalError:
                if not self._room.exists():
                    raise
                self._room.unlink()
                self._commit(statement, values)

    def _commit(self, statement: str, values: Sequence[Any]) -> None:
        with self._begun():
            self._db.execute(statement, values)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with _readable(self.path), self._begun():
            yield

    @contextlib.contextmanager
    def _begun(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    def _recover(self) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM calls WHERE state = 'reserved'")
            self._db.execute("DELETE FROM requests WHERE key NOT IN (SELECT key FROM calls)")
            self._db.execute(
                "UPDATE calls SET state = 'unknown', error = 'interrupted', ended_at = ? WHERE state = 'sent'",
                (time.time(),),
            )
        rows = self._db.execute(
            "SELECT role, COUNT(sent_at), SUM(booked_tokens), SUM(booked_cost) FROM calls GROUP BY role"
        )
        self._booked = {}
        for role, *sums in rows:
            purse = BUDGETS[role]
            self._booked[purse] = self._booked.get(purse, BookedSpend()) + BookedSpend(*sums)

    def _close_call(self, call: int, role: Role, freed: BookedSpend) -> None:
        del self._open[call]
        self._booked[BUDGETS[role]] = self._booked[BUDGETS[role]] - freed


def _actual(result: CallResult, worst: BookedSpend) -> BookedSpend:
    """What a finished call counts towards the caps."""
    calls = 1 if result.left else 0
    if result.usage:
        return BookedSpend(calls, result.usage.input_tokens + result.usage.output_tokens, result.usage.cost)
    return BookedSpend(calls, worst.tokens, worst.cost) if result.left and result.billable else BookedSpend(calls)


def _result(row: sqlite3.Row) -> CallResult:
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
        "calls": [{k: v for k, v in call.items() if k not in ("id", "key")} for call in calls],
    }


def _exclusive(path: Path) -> IO[str]:
    """Hold `path` for this process: the kernel lets go of it when the process ends, however it ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("w")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path.with_suffix('')}: another purld process is using this ledger.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}).") from None
    return handle


def _allocate(room: Path) -> None:
    """Hold `ROOM` bytes of disk in a file that can be given up."""
    try:
        with room.open("ab") as handle:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, ROOM)
            else:  # macOS
                handle.write(bytes(max(0, ROOM - handle.tell())))
    except OSError as error:
        room.unlink(missing_ok=True)
        raise UserError(f"{room}: no room of {ROOM // 2**20} MiB for answers under way ({error.strerror}).") from None


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    if not db.execute("SELECT 1 FROM sqlite_schema").fetchone():
        db.executescript(f"BEGIN; {SCHEMA} COMMIT;")
    _check_version(db, path)
    return db


def _check_version(db: sqlite3.Connection, path: Path) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version != SCHEMA_VERSION:
        db.close()
        raise UserError(
            f"{path}: is no ledger of version {SCHEMA_VERSION}, which this purld reads (it says {version})."
        )


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns a damaged file or a full disk into one sentence."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            raise UserError(_FULL.format(path)) from None
        raise UserError(f"{path}: the ledger cannot be used ({error}).") from None
