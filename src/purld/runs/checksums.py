"""Checksums of files: what a file held when it was recorded, and whether it still holds it.

Files are read in pieces, so that weights of any size take no memory. Recording a file also syncs it to disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_PIECE = 1 << 20  # bytes


@dataclass(frozen=True)
class FileRecord:
    """The content of a file when it was recorded.

    Attributes:
        bytes: its size.
        sha256: the SHA-256 of its content, in hex.
        rows: the number of its lines; None for a file that is not JSONL.
    """

    bytes: int
    sha256: str
    rows: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set, for a JSON file."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> FileRecord:
        """Return the record in a JSON object, which may hold other fields too."""
        return cls(fields["bytes"], fields["sha256"], fields.get("rows"))


def record_file(path: Path) -> FileRecord:
    """Sync a file to disk and return its record.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
        size, digest, rows = _digest(handle, None)
    return FileRecord(size, digest, rows if path.suffix == ".jsonl" else None)


def find_damage(path: Path, record: FileRecord, grows: bool = False) -> str | None:
    """Return what is wrong with a file, as the end of a sentence that begins with its path; None if nothing is.

    Args:
        path: the file.
        record: what it held.
        grows: rows may have been added since; only its beginning is compared.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_file():
        return f"is missing; {_amount(record.bytes, record.rows)} were recorded"
    size = path.stat().st_size
    if size < record.bytes or (size > record.bytes and not grows):
        rows = None
        if record.rows is not None:
            with path.open("rb") as handle:
                rows = _digest(handle, None)[2]
        different_rows = rows is not None and rows != record.rows
        if different_rows:
            return f"is damaged: it has {rows:,} rows, and {record.rows:,} were recorded"
        return f"is damaged: it has {size:,} bytes, and {record.bytes:,} were recorded"
    with path.open("rb") as handle:
        digest = _digest(handle, record.bytes)[1]
    if digest != record.sha256:
        return f"is damaged: its content (SHA-256 {digest[:12]}…) is not what was recorded ({record.sha256[:12]}…)"
    return None


def _amount(size: int, rows: int | None) -> str:
    return f"{size:,} bytes" if rows is None else f"{rows:,} rows"


def _digest(handle: Any, limit: int | None) -> tuple[int, str, int]:
    """Return the size, the SHA-256 and the number of newlines of a file, or of its first `limit` bytes."""
    size, rows, digest = 0, 0, hashlib.sha256()
    while piece := handle.read(_PIECE if limit is None else min(_PIECE, limit - size)):
        size += len(piece)
        rows += piece.count(b"\n")
        digest.update(piece)
    return size, digest.hexdigest(), rows
