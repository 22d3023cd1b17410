"""Tell which process holds a lock file, without touching the lock."""

from __future__ import annotations

import os
import socket
from pathlib import Path

_LOCKS = Path("/proc/locks")


def find_lock_holder(path: Path) -> int | None:
    """Return the id of the process that holds a lock on a file, 0 if none does, or None if it cannot be known.

    Linux lists the locks of its own processes. A process on another machine that shares the disk is not among them; its
    name stands in the lock file, which keeps the last holder's after the lock is given back.
    """
    try:
        status = path.stat()
        note = path.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return 0
    except (OSError, UnicodeDecodeError):
        return None
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        rows = [line.split() for line in _LOCKS.read_text().splitlines()]
    except OSError:
        return None
    # "1: FLOCK ADVISORY WRITE 12698 fe:00:2154626 0 EOF"; a process that waits for a lock has "->" after the number.
    holders = [row[4] for row in rows if len(row) > 5 and row[5] == file and row[1] != "->"]
    if holders:
        return abs(int(holders[0]))
    return None if len(note) == 2 and note[1] != socket.gethostname() else 0
