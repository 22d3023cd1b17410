"""Tell which process holds a lock file, without touching the lock."""

from __future__ import annotations

import os
from pathlib import Path

_LOCKS = Path("/proc/locks")


def find_lock_holder(path: Path) -> int | None:
    """Return the id of the process that holds a lock on a file, 0 if none does, or None if it cannot be known.

    Linux lists the locks of this machine's processes; a process on another machine that shares the disk is not among
    them. Other systems have no such list.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        rows = [line.split() for line in _LOCKS.read_text().splitlines()]
    except OSError:
        return None
    # "1: FLOCK ADVISORY WRITE 12698 fe:00:2154626 0 EOF"; a process that waits for a lock has "->" after the number.
    holders = [row[4] for row in rows if len(row) > 5 and row[5] == file and row[1] != "->"]
    return abs(int(holders[0])) if holders else 0
