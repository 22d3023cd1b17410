"""The files beside a ledger: its lock, the mark that counts its calls, and the disk space held for answers."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import IO

from purld.errors import UserError
from purld.locks import describe_holder, open_locked

# Bytes for the answers in flight: 64 answers of 200 KB each, and the pages that SQLite writes with them.
RESERVED_BYTES = 16 * 2**20
_LOCK_SECONDS = 0.5  # others lock a ledger for microseconds, to see whether it is open


class CallMark:
    """The file beside a ledger that holds the number of calls recorded in it, so that a loss is noticed.

    It is written after the ledger, in place and without a sync: it may hold fewer calls than the ledger, never more.
    Errors are ignored, because a mark that is behind does no harm.
    """

    def __init__(self, ledger: Path, count: int) -> None:
        self._descriptor = -1
        with contextlib.suppress(OSError):
            self._descriptor = os.open(mark_path(ledger), os.O_RDWR | os.O_CREAT, 0o666)
        self.write(count)

    def write(self, count: int) -> None:
        """Replace the number."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, f"{count:019d}\n".encode(), 0)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def mark_path(ledger: Path) -> Path:
    """Return the path of a ledger's mark."""
    return ledger.with_name(f".{ledger.name}.calls")


def read_mark(ledger: Path) -> int:
    """Return the number of calls by the mark; 0 if there is none, or a power cut garbled it."""
    try:
        text = mark_path(ledger).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return 0
    return int(text) if len(text) == 20 and text[:-1].isdigit() else 0


def lock_path(ledger: Path) -> Path:
    """Return the path of the file that is locked while a process has the ledger open."""
    return ledger.with_name(ledger.name + ".lock")


def lock_ledger(path: Path) -> IO[str]:
    """Lock the lock file `path` for this process.

    Raises:
        UserError: another process holds the lock, or the file system has no locks or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open_locked(path, _LOCK_SECONDS)
    except OSError as error:
        raise UserError(f"{path}: cannot be locked ({error.strerror}).") from None
    if handle is None:
        raise UserError(f"{path.with_suffix('')}: {describe_holder(path)} is using this ledger.")
    return handle


def allocate_reserve(path: Path) -> None:
    """Allocate `RESERVED_BYTES` of disk space in a file that can be deleted when the space is needed.

    Raises:
        UserError: there is too little space, or the file cannot be written.
    """
    try:
        with path.open("ab") as handle:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, RESERVED_BYTES)
            else:  # macOS
                handle.write(bytes(max(0, RESERVED_BYTES - handle.tell())))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot reserve {RESERVED_BYTES // 2**20} MiB of disk space for answers ({error.strerror})."
        ) from None
