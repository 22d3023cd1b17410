"""Where a job's failure is written down for all to read, so that nobody waits for a process that will not come.

It is a key of the key-value store that the ranks met at, which a thread of every rank watches. The rank that fails
first writes its sentence there; the others end their work, and rank 0 prints the sentence. Collectives that hang
because a process is gone end with their process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, cast

from purld.ranks.launch import Place

_POLL = 0.5  # seconds between two looks at the store
_GRACE = 20.0  # seconds until a rank that hangs in a collective is ended, after another one has failed
_PATIENCE = 5.0  # seconds to wait for rank 0 to hear of a failure, and for the others to leave


class Board:
    """The place of one job's failure.

    Args:
        base: the key-value store that the ranks met at.
        place: this process's place.
        interrupt: end the work of this process by SIGTERM when another one has failed.
        works_alone: returns whether this process is in no collective; it is then not ended by force.
    """

    def __init__(self, base: Any, place: Place, interrupt: bool, works_alone: Callable[[], bool]) -> None:
        import torch.distributed

        dist: Any = torch.distributed  # its stubs leave out what it exports
        with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError):
            base = base.clone()  # a connection of its own: a collective that waits may hold the other one
        self._store: Any = dist.PrefixStore("purld/board", base)
        self._place = place
        self._interrupt = interrupt and threading.current_thread() is threading.main_thread()
        self._works_alone = works_alone
        self._failure: tuple[str, int] | None = None
        self._heard = threading.Event()
        self._closed = threading.Event()
        self._lock = threading.Lock()  # the connection is one conversation
        threading.Thread(target=self._watch, name="purld-ranks", daemon=True).start()

    def wait_for_failure(self, seconds: float) -> tuple[str, int] | None:
        """Return the sentence and the status that another rank announced; None if none does in that time."""
        self._heard.wait(seconds)
        return self._failure

    def announce(self, sentence: str, status: int) -> bool:
        """Tell the others how this rank failed; return whether rank 0 knows, which prints it."""
        where = f"process {self._place.rank} of {self._place.world} on {socket.gethostname()}"
        said = sentence if self._place.rank == 0 else f"{where}: {sentence}"
        _write_error_file(sentence)
        with contextlib.suppress(Exception):  # the store may have ended with its process
            with self._lock:
                self._store.compare_set("failure", "", json.dumps([self._place.rank, said, status]))
                if self._place.rank == 0:
                    self._store.set("first knows", "1")
            return self._wait(lambda: bool(self._store.check(["first knows"])))
        return False

    def part(self) -> None:
        """Stop watching; rank 0, whose process may hold the store, is the last to go."""
        self._closed.set()
        with contextlib.suppress(Exception):
            with self._lock:
                self._store.add("left", 1)
            if self._place.rank == 0:
                self._wait(lambda: int(self._store.add("left", 0)) >= self._place.world)

    def _wait(self, condition: Callable[[], bool]) -> bool:
        """Wait until a condition on the store holds; return False if it does not within a few seconds."""
        started = time.monotonic()
        while time.monotonic() - started < _PATIENCE:
            with self._lock:
                if condition():
                    return True
            time.sleep(_POLL / 5)
        return False

    def stop_interrupting(self) -> None:
        """Let the work of this process end undisturbed: it is ending already."""
        self._interrupt = False

    def _watch(self) -> None:
        while not self._closed.wait(_POLL):
            try:
                with self._lock:
                    if not self._store.check(["failure"]):
                        continue
                    rank, sentence, status = json.loads(self._store.get("failure"))
                    if self._place.rank == 0:
                        self._store.set("first knows", "1")
            except Exception:  # the store has ended with its process
                return
            if rank != self._place.rank:
                self._failure = sentence, status
                self._heard.set()
                self._end_work(status)
            return

    def _end_work(self, status: int) -> None:
        """End the work of this process: by a signal, and by force if it hangs in a collective."""
        if self._interrupt:
            signal.pthread_kill(cast(int, threading.main_thread().ident), signal.SIGTERM)
        waited = 0.0
        while not self._closed.wait(_POLL):
            waited = 0.0 if self._works_alone() else waited + _POLL  # it may be paying
            if waited >= _GRACE:
                os._exit(status)


def _write_error_file(sentence: str) -> None:
    """Give torchrun the sentence for its summary of the processes that failed."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as handle:
            json.dump({"message": {"message": sentence, "extraInfo": {"timestamp": int(time.time())}}}, handle)
