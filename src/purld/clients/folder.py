"""The ledgers of all runs in one folder: a run shares what the others bought and never buys what they are buying.

A call that has not ended is under way if the process that made it still has its ledger open, which the ledger's lock
tells. If that process is dead, a sent call may have been billed, so it counts as `unknown`; a reserved one was never
sent, so it does not count. A call in a batch that was submitted is neither: the endpoint goes on with it.

To claim a question, a run locks the folder, finds no call for it in any other ledger, and reserves one in its own.
`FolderLedgers` does the first two; `Ledger.claim` is the whole. The lock is one of the kernel on the folder itself: it
writes no file and ends with its process. Where a file system has no such locks, two runs that claim the same question
within milliseconds may both buy it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from purld.clients.ledger import CallResult, FoundCall, LedgerView
from purld.errors import UserError
from purld.locks import try_lock

LOCK_SECONDS = 60.0  # how long a claim waits for the lock; another one takes milliseconds
LOCK_POLL_SECONDS = 0.002

Found = TypeVar("Found")


class FolderLockedError(UserError):
    """Another process has locked the folder."""


@dataclass(frozen=True)
class _OpenView:
    view: LedgerView
    file: tuple[int, int]  # device and inode: a file that was replaced is opened again


class FolderLedgers:
    """The ledgers `*/<name>` in the folder that holds the run of the ledger `own`.

    Args:
        own: the path of a run's ledger, which need not exist.
        with_own: look into the run's own ledger as well.

    Attributes:
        unreadable: the ledgers that could not be read at the last look, and are ignored.
    """

    def __init__(self, own: Path, with_own: bool = False) -> None:
        self._own = own.absolute()
        self._with_own = with_own
        self._folder = self._own.parent.parent
        self._views: dict[Path, _OpenView] = {}
        self._locks = 0
        self.unreadable: set[Path] = set()

    def close(self) -> None:
        """Close all files; closing twice is harmless."""
        for path in list(self._views):
            self._close_view(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def find_result(self, key: str) -> CallResult | None:
        """Return the best result of a request in all ledgers, or None."""
        call = self.find_call(key)
        return call.result() if call else None

    def find_call(self, key: str) -> FoundCall | None:
        """Return the call that counts for a request: an answered one, else one under way, a lost or a failed one.

        A call of a dead process is looked up again under the folder's lock, under which no process can begin a call.
        """
        call = self._look_up(key)
        if call and call.interrupted and not self._locks:
            with self.locked():
                call = self._look_up(key)
        return call

    def result_times(self, key: str) -> set[float]:
        """Return when the calls of a request were sent by these runs that came back, with an answer or without."""
        return set().union(*self._read_all(lambda view: view.result_times(key)))

    @contextlib.contextmanager
    def locked(self, seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """Lock the folder against claims by other processes; the locks of one object may be nested.

        Whoever holds this and the mutex of a `Ledger` takes this one first.

        Args:
            seconds: how long to wait for another process; 0 for one attempt.

        Raises:
            FolderLockedError: another process held the lock all the time.
        """
        if self._locks:
            yield
            return
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # no permission, or a file system without such locks
                descriptor = os.open(self._folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                self._wait_for_lock(descriptor, seconds)
            self._locks += 1
            stack.callback(self._unlocked)
            yield

    def _unlocked(self) -> None:
        self._locks -= 1

    def _wait_for_lock(self, descriptor: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not try_lock(descriptor):
            if time.monotonic() >= deadline:
                raise FolderLockedError(
                    f"{self._folder}: another purld process has locked this folder for {LOCK_SECONDS:g} s; "
                    "if it is suspended, continue or end it."
                )
            time.sleep(LOCK_POLL_SECONDS)

    def _look_up(self, key: str) -> FoundCall | None:
        calls = [call for call in self._read_all(lambda view: view.find_call(key)) if call]
        return max(calls, key=lambda call: call.value, default=None)

    def _read_all(self, read: Callable[[LedgerView], Found]) -> Iterator[Found]:
        """Yield what is found in each ledger that can be read."""
        for view in self._open_views():
            try:
                yield read(view)
            except UserError:  # locked, or damaged after its first page
                self.unreadable.add(view.path)
                self._close_view(view.path)

    def _open_views(self) -> list[LedgerView]:
        """Return a view of every ledger that is in the folder now."""
        present = {path: file for path in self._paths() if (file := _identity(path))}
        for path, opened in list(self._views.items()):
            if present.get(path) != opened.file:
                self._close_view(path)
        self.unreadable &= set(present)
        for path in sorted(present.keys() - self._views.keys()):
            try:
                self._views[path] = _OpenView(LedgerView(path), present[path])
                self.unreadable.discard(path)
            except UserError:
                self.unreadable.add(path)
        return [opened.view for opened in self._views.values()]

    def _paths(self) -> list[Path]:
        try:
            with os.scandir(self._folder) as entries:
                paths = [self._folder / entry.name / self._own.name for entry in entries]
        except OSError:
            paths = []
        others = [path for path in paths if path != self._own]
        return [*others, self._own] if self._with_own else others

    def _close_view(self, path: Path) -> None:
        self._views.pop(path).view.close()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
