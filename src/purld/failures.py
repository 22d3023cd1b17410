"""The end of a command that failed: one sentence for the user, an exit status, and a log for what nobody foresaw.

Status 2 is for what the user can mend: wrong input, a full or read-only disk, too little memory. Status 1 is for errors
of purld or its libraries; their traceback goes to a log file, without secrets.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from purld.errors import UserError, reason_of

TRACEBACK_VARIABLE = "PURLD_TRACEBACK"
"""If this environment variable is set, an error that nobody foresaw is raised, with its traceback on stderr."""

_AGAIN = {True: "run the same command again, it continues from here", False: "run the same command again"}
_MENDED_BY_USER = {
    errno.ENOSPC: "the disk is full ({reason}); free some space and {again}",
    errno.EDQUOT: "the disk is full ({reason}); free some space and {again}",
    errno.EIO: "the disk failed ({reason}); check it and its free space, and {again}",
    errno.EROFS: "the disk can only be read ({reason}); give a path on another one",
    errno.EACCES: "access is not allowed ({reason}); change the permissions or give another path",
    errno.EPERM: "access is not allowed ({reason}); change the permissions or give another path",
    errno.ENAMETOOLONG: "the name is too long ({reason}); between two slashes there is room for 255 bytes",
    errno.EISDIR: "is a folder, and a file is needed; give another path",
    errno.ENOTDIR: "a part of this path is a file, and a folder is needed; give another path",
    errno.EEXIST: "is in the way; give another path, or move it away",
    errno.ENOENT: "is missing ({reason}); restore it or give another path",
    errno.EMFILE: "too many files are open ({reason}); raise the limit (ulimit -n)",
    errno.EFBIG: "the file would be too large for its disk ({reason})",
    errno.ESTALE: "the network disk was interrupted ({reason}); {again}",
    errno.ELOOP: "its links lead in a circle ({reason}); give another path",
}
# Code meets these errors all the time and goes on, so they explain a later one only if they are its stated cause.
_OFTEN_HANDLED = {
    *(errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP),
}
# Libraries that write files without Python's own functions report these in their own words.
_IN_WORDS = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "database or disk is full": errno.ENOSPC,
    "Input/output error": errno.EIO,
    "disk I/O error": errno.EIO,
    "PytorchStreamWriter failed": errno.EIO,
    "unexpected pos": errno.EIO,  # of torch's writer, where a write was cut short
    "iostream error": errno.EIO,  # of the same, where the last write failed
    "Read-only file system": errno.EROFS,
    "readonly database": errno.EROFS,
}
_OUT_OF_MEMORY_TYPES = ("MemoryError", "OutOfMemoryError")
# torch raises a plain RuntimeError on the CPU, on Apple's GPUs and for cuBLAS, and the system an OSError.
_OUT_OF_MEMORY_WORDS = re.compile(r"(?i)(can't|cannot|unable to) allocate memory|out of memory|STATUS_ALLOC_FAILED")
_LOOKS_SECRET = re.compile(r"(?i)\b(bearer\s+|sk-|hf_)[\w.~+/-]{6,}")
_NAMES_SECRET = re.compile(r"(?i)key|token|secret|passw|credential")
_secrets: set[str] = set()


def hide_secret(text: str) -> None:
    """Keep a secret out of every log that is written from now on."""
    _secrets.add(text)


def describe_failure(error: Exception, run: Path | None, continues: bool = True) -> tuple[str, int]:
    """Return the sentence about an error that ended a command, and the exit status.

    An error that nobody foresaw is written to a log file first.

    Args:
        error: the error.
        run: the run directory that the command worked on; None if it had none.
        continues: whether the same command goes on where this one ended.
    """
    again = _AGAIN[continues]
    if isinstance(error, UserError):
        return str(error), 2
    if problem := _disk_problem(error, again):
        return problem, 2
    if found := _memory_problem(error):
        return (
            f"the memory is not enough ({_one_line(found)}); lower micro_batch_size, batch_size or candidates, or use "
            f"student.lora, and {again}.",
            2,
        )
    log = _write_log(error, run)
    where = f"the traceback is in {log}" if log else "no log could be written"
    return f"an unexpected error ended this command ({_one_line(error)}); {where}; please report it.", 1


def _disk_problem(error: Exception, again: str) -> str | None:
    """Return the sentence about an error of a file or a disk, wherever in the chain of causes it is."""
    stated = list(_chain(error, with_contexts=False))
    for part in _chain(error):
        if isinstance(part, OSError) and part.errno in _MENDED_BY_USER:
            if part.errno in _OFTEN_HANDLED and part not in stated:
                continue
            return _describe_os_error(part, _MENDED_BY_USER[part.errno], again)
    for part in _chain(error):
        numbers = re.findall(r"\(os error (\d+)\)", str(part))
        numbers += [number for words, number in _IN_WORDS.items() if words in str(part)]
        for number in map(int, numbers):
            if number in _MENDED_BY_USER:
                return _MENDED_BY_USER[number].format(reason=_one_line(part), again=again) + "."
    return None


def _describe_os_error(error: OSError, template: str, again: str) -> str:
    path = error.filename2 or error.filename  # of two, the second is where a file was to go
    if isinstance(path, str | bytes):
        subject = f"{_shortened(os.fsdecode(path))}: "
    else:
        subject = "a file or folder " if template.startswith("is ") else ""
    return subject + template.format(reason=error.strerror, again=again) + "."


def _memory_problem(error: Exception) -> BaseException | None:
    """Return the error in the chain of causes that says that memory could not be allocated, or None."""
    return next((part for part in _chain(error) if says_out_of_memory(part)), None)


def says_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be allocated, by its type or its words."""
    return type(error).__name__ in _OUT_OF_MEMORY_TYPES or bool(_OUT_OF_MEMORY_WORDS.search(str(error)))


def _chain(error: BaseException, with_contexts: bool = True) -> Iterator[BaseException]:
    """Yield an error, its stated causes, and with contexts also the errors that were being handled."""
    seen: set[int] = set()
    part: BaseException | None = error
    while part is not None and id(part) not in seen:
        seen.add(id(part))
        yield part
        implied = part.__context__ if with_contexts and not part.__suppress_context__ else None
        part = part.__cause__ or implied


def _one_line(error: BaseException) -> str:
    return _without_secrets(f"{type(error).__name__}: {reason_of(error)[:200]}")


def _shortened(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:150]}…{path[-20:]}"


def _write_log(error: Exception, run: Path | None) -> Path | None:
    """Write the traceback to the run directory or else to the folder for temporary files; None if neither works."""
    text = "".join(traceback.format_exception(error))
    command = " ".join(["purld", *sys.argv[1:]])
    name = f"purld-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for folder in (run, Path(tempfile.gettempdir())):
        if folder is None or not folder.is_dir():
            continue
        try:
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as handle:
                handle.write(_without_secrets(f"{command}\n\n{text}"))
            return folder / name
        except OSError:
            continue
    return None


def _without_secrets(text: str) -> str:
    named = {value for name, value in os.environ.items() if _NAMES_SECRET.search(name)}
    for secret in sorted(_secrets | {value for value in named if len(value) >= 8}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _LOOKS_SECRET.sub("***", text)
