"""Open files that users name without reading more of them than is reasonable, whatever they turn out to be.

A device or a pipe is refused, since reading it may never end. A line has a largest length, and what a compressed file
expands to is limited by the size of the file: text that expands 200-fold is no text.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from purld.errors import UserError

MAX_LINE = 64 * 2**20  # bytes of one row in a text file, with images as data URLs
MAX_JSON = 2**30  # bytes of a file that is one JSON value, which is read as a whole
_FREE = 2**25  # bytes that any file may expand to
_MAX_EXPANSION = 200  # text compresses to a tenth, and rows that repeat each other to a fiftieth
_LINE = 64  # bytes that a line counts for besides its own, so that blank lines are no way to use up time
_GZIP = b"\x1f\x8b"
_OTHER_COMPRESSION = {b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}


class Budget:
    """The bytes that a file may still expand to.

    Args:
        path: the file; messages name it.
        size: its size on disk, in bytes.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._allowed = max(_FREE, size * _MAX_EXPANSION)
        self._size = size

    def spend(self, count: int) -> None:
        """Count `count` bytes of content.

        Raises:
            UserError: the file expands to more than is allowed.
        """
        self._allowed -= count
        if self._allowed < 0:
            raise UserError(
                f"{self._path}: expands to more than {_MAX_EXPANSION} times its {self._size:,} bytes; "
                "it cannot be a file of prompts."
            )


def check_regular_file(path: Path) -> int:
    """Return the size of a file in bytes.

    Raises:
        UserError: there is no file, or it is a device, a pipe or a socket.
    """
    with reading(path):
        try:
            status = path.stat()
        except FileNotFoundError:
            raise UserError(f"{path}: no such file.") from None
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path}: is a folder, not a file.")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: is not a regular file; a device or a pipe is not read, because it may never end.")
    return status.st_size


def first_bytes(path: Path, count: int = 4096) -> bytes:
    """Return the first bytes of a regular file, decompressed if it is in gzip.

    Raises:
        UserError: it cannot be read.
    """
    check_regular_file(path)
    with reading(path), _open(path) as handle:
        return handle.read(count)


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a text file, decompressed if it is in gzip, with their line ends.

    Raises:
        UserError: it is not a regular file, a line is longer than `MAX_LINE`, or it expands to too much.
    """
    budget = Budget(path, check_regular_file(path))
    number = 0
    with reading(path), _open(path) as handle:
        while line := handle.readline(MAX_LINE + 1):
            number += 1
            budget.spend(len(line) + _LINE)
            if len(line) > MAX_LINE:
                raise UserError(f"{path}, line {number}: has more than {MAX_LINE:,} bytes; no row is as long as that.")
            yield without_byte_order_mark(line, path) if number == 1 else line


def read_whole(path: Path) -> bytes:
    """Return the content of a file that is one JSON value, decompressed if it is in gzip.

    Raises:
        UserError: it is not a regular file, is larger than `MAX_JSON`, or expands to too much.
    """
    size = check_regular_file(path)
    budget = Budget(path, size)
    parts: list[bytes] = []
    with reading(path), _open(path) as handle:
        while size <= MAX_JSON and (part := handle.read(2**20)):
            budget.spend(len(part))
            parts.append(part)
            size = max(size, len(parts) * 2**20)
    if size > MAX_JSON:
        raise UserError(f"{path}: has more than {MAX_JSON:,} bytes in one JSON value; save it as JSONL.")
    return without_byte_order_mark(b"".join(parts), path)


def without_byte_order_mark(data: bytes, path: Path) -> bytes:
    """Return the start of a file without UTF-8's byte order mark.

    Raises:
        UserError: the file is UTF-16 or UTF-32.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        raise UserError(f"{path}, line 1: the file is UTF-16; save it as UTF-8.")
    return data.removeprefix(b"\xef\xbb\xbf")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert the errors of reading a broken file to a UserError of one sentence."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError, EOFError, zlib.error) as error:  # also those of pyarrow and gzip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason[:200]}).") from None


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as handle:
        start = handle.read(6)
    for magic, name in _OTHER_COMPRESSION.items():
        if start.startswith(magic):
            raise UserError(f"{path}: is compressed with {name}, which is not read; decompress it, or use gzip.")
    return cast(BinaryIO, io.BufferedReader(gzip.open(path), 2**20)) if start.startswith(_GZIP) else path.open("rb")
