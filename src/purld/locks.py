"""Locks between processes on a file or a folder, which end with their process in whatever way it ends.

They are the kernel's (flock), taken by filelock. A file system without such locks, as some network file systems are,
refuses them. Two things are done by hand: a folder is locked through a descriptor, so that nothing is written into it,
and whether a file is locked is tried with a shared lock, so that two that look at the same time do not see each other.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import IO

POLL_SECONDS = 0.01


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder for whoever holds the descriptor, and return whether that was possible.

    Raises:
        OSError: the file system has no locks.
    """
    from filelock import lock_descriptor

    return lock_descriptor(descriptor, blocking=False)


def open_locked(path: Path, wait: float = 0.0) -> IO[str] | None:
    """Open a lock file, lock it, and write into it who holds it; None if another process holds it all the time.

    Closing the file gives the lock back.

    Args:
        path: the lock file; created if it is not there.
        wait: seconds for which the lock is tried.

    Raises:
        OSError: the file cannot be opened for writing, or its file system has no locks.
    """
    deadline = time.monotonic() + wait
    handle = path.open("a+", encoding="utf-8")  # not "w": it would wipe out who holds the lock
    try:
        while not try_lock(handle.fileno()):
            if time.monotonic() >= deadline:
                handle.close()
                return None
            time.sleep(POLL_SECONDS)
        with contextlib.suppress(OSError):  # the lock holds without a note, as on a full disk
            os.truncate(handle.fileno(), 0)
            os.write(handle.fileno(), f"{os.getpid()} {socket.gethostname()}\n".encode())
    except BaseException:
        handle.close()
        raise
    return handle


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a lock file; nothing is written."""
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def describe_holder(path: Path) -> str:
    """Return who holds a lock file, as the subject of a sentence."""
    try:
        process, _, host = path.read_text(encoding="utf-8").strip().partition(" ")
    except (OSError, UnicodeDecodeError):
        process = host = ""
    if not process.isdigit() or not host.isprintable():
        return "another purld process"
    return f"another purld process ({process}" + ("" if host == socket.gethostname() else f" on {host}") + ")"
