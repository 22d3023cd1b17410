"""Standard streams that cannot stop the work: what a dead terminal does not take is dropped."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import IO, Any, TextIO, cast


class UnfailingStream:
    """A text stream whose writes never raise.

    Text is dropped if it cannot be written: the terminal is closed (EIO), the reader of a pipe has left (EPIPE), the
    disk is full. A character that the stream's encoding lacks is written as an escape.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` or drop it; return its length in characters."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = getattr(self._stream, "encoding", None) or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write every line or drop it."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream if it takes what is buffered."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_unfailing(stream: IO[str]) -> IO[str]:
    """Return a stream that writes to `stream` and never raises."""
    return stream if isinstance(stream, UnfailingStream) else cast(IO[str], UnfailingStream(stream))


@contextlib.contextmanager
def protected_streams() -> Iterator[None]:
    """Make sys.stderr unfailing in this block, and replace standard streams that the process was started without.

    At the end, what the streams cannot write is dropped, so that the interpreter does not fail on it when it exits.
    """
    _fill_standard_descriptors()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as null:
        sys.stdout, sys.stderr = sys.stdout or null, cast(TextIO, make_unfailing(sys.stderr or null))
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stream in before:
                _discard_unwritable(stream)


def _fill_standard_descriptors() -> None:
    """Open /dev/null for every standard descriptor that is closed.

    Otherwise the next file to be opened gets its number, and with it all that libraries print there.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _discard_unwritable(stream: TextIO | None) -> None:
    """Flush a stream; if that fails, redirect its descriptor to /dev/null."""
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
