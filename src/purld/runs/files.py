"""Read and write the JSON and JSONL files of a run so that a kill at any point leaves them usable.

A file is either replaced atomically or appended to and synced. A last row that a kill cut short is ignored by readers
and removed before the next append. Appended rows end in a checksum (`crc32`), because a file that still grows has no
other; readers check it and leave it out.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from purld.errors import UserError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[str]]:
    """Open a text file that replaces `path` when the block ends without an error; until then `path` is unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_path(path)
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write; it replaces `path` when the block ends without an error, with its files synced."""
    partial = _partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            sync_folder(file)
        sync_folder(partial)  # the names in it
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def nearest_folder(path: Path) -> Path:
    """Return `path` or its nearest parent that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _partial_path(path: Path) -> Path:
    """Return where this process writes `path`, after removing what killed processes have left of theirs."""
    start = f".{path.name[:40]}"  # cut: a file name has at most 255 bytes
    _remove_stale(list(path.parent.glob(f"{glob.escape(start)}.*.partial")))
    return path.with_name(f"{start}.{os.getpid()}.partial")


def remove_stale_partials(folder: Path) -> None:
    """Remove the partial files that killed processes have left in a folder and its subfolders.

    Call it under the run's lock: safetensors' partial files do not say whose they are.
    """
    _remove_stale(list(folder.rglob(".*.partial*")))  # SQLite adds -journal
    for partial in list(folder.rglob(".tmp??????")):
        partial.unlink(missing_ok=True)


def _remove_stale(partials: Iterable[Path]) -> None:
    for partial in partials:
        owner = partial.suffixes[-2].removeprefix(".") if len(partial.suffixes) > 1 else ""
        if owner.isdigit() and not _is_running(int(owner)):
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def sync_folder(path: Path) -> None:
    """Sync a folder or file, so that it survives a power cut; a folder with the files created or renamed in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_new_folder(out: Path) -> None:
    """Check that a folder named by --out can be written without mixing its files with others.

    Raises:
        UserError: it is a file, or it is not empty.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder to write.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: is not empty; give a new folder, or remove what is in it.")


def check_new_file(out: Path) -> None:
    """Check that a file named by --out can be written.

    Raises:
        UserError: it is a folder.
    """
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; give a file, such as {out / 'report.html'}.")


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically. Text is escaped to ASCII, which preserves lone surrogates."""
    with atomic_write(path) as handle:
        json.dump(value, handle, indent=2)
        handle.write("\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that purld wrote.

    Raises:
        UserError: the file is missing or is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; the run is incomplete.") from None
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}).") from None


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSONL file atomically."""
    with atomic_write(path) as handle:
        for row in rows:
            handle.write(json.dumps(row) + "\n")


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows with checksums to a JSONL file and sync it, after removing an incomplete last row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(_with_checksum(row) + "\n" for row in rows).encode()
    with path.open("ab+") as handle:
        _cut_incomplete_row(handle)
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _cut_incomplete_row(handle: IO[bytes]) -> None:
    end = handle.seek(0, os.SEEK_END)
    if end == 0:
        return
    handle.seek(end - 1)
    if handle.read(1) == b"\n":
        return
    position = end
    while position > 0:
        start = max(0, position - 4096)
        handle.seek(start)
        newline = handle.read(position - start).rfind(b"\n")
        if newline >= 0:
            handle.truncate(start + newline + 1)
            return
        position = start
    handle.truncate(0)


def cut_rows(path: Path, count: int) -> None:
    """Keep the first `count` rows of a JSONL file and remove the others."""
    with path.open("rb+") as handle:
        for _ in range(count):
            handle.readline()
        handle.truncate(handle.tell())
        os.fsync(handle.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the complete rows of a JSONL file that purld wrote, or no rows if there is no file.

    A last row without a newline was cut short by a kill and is left out.

    Raises:
        UserError: a complete row is not valid JSON, or not what its checksum says.
    """
    rows, problem = _parse_rows(path)
    if problem is not None:
        raise UserError(f"{path}, line {len(rows) + 1}: {problem}; restore the file from a backup, or start again.")
    return rows


def read_intact_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file up to the first damaged one, for a stage that can make the others again."""
    return _parse_rows(path)[0]


def read_last_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """Return the last `count` complete rows of a JSONL file that may grow meanwhile, without reading the whole file.

    A damaged row is left out, as is a last one that is still being written.
    """
    try:
        data = _read_end(path, count)
    except FileNotFoundError:
        return []
    lines = data.split(b"\n")[:-1]
    rows = (_parse_row(line) for line in lines[-count:])
    return [row for row in rows if row is not None]


def _read_end(path: Path, lines: int) -> bytes:
    """Return the end of a file, with at least `lines` complete lines if it has so many."""
    with path.open("rb") as handle:
        position = handle.seek(0, os.SEEK_END)
        data = b""
        while position > 0 and data.count(b"\n") <= lines:
            start = max(0, position - 65536)
            handle.seek(start)
            data = handle.read(position - start) + data
            position = start
    return data


def _parse_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    checksum = row.pop("crc32", None)
    return row if checksum in (None, _checksum(row)) else None


def _with_checksum(row: Mapping[str, Any]) -> str:
    """Return a row as JSON whose last key is the checksum of the others."""
    return json.dumps({**row, "crc32": _checksum(row)})


def _checksum(row: Mapping[str, Any]) -> str:
    """Return the CRC-32 of a row as JSON; parsing purld's JSON and writing it again gives the same text."""
    return f"{zlib.crc32(json.dumps(row).encode()):08x}"


def _parse_rows(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Return the rows up to the first damaged one, and what is wrong with that one; None if all are intact."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows, None
    summed = False
    with path.open("rb") as handle:
        for line in handle:
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
            except ValueError as error:
                return rows, f"is not valid JSON ({error})"
            if not isinstance(row, dict):
                return rows, "is not a JSON object"
            checksum = row.pop("crc32", None)
            # Rows of an older version have none; a file that was begun with them goes on with checksums.
            if (checksum is None and summed) or (checksum is not None and checksum != _checksum(row)):
                return rows, "is damaged; its checksum is that of another row"
            summed = summed or checksum is not None
            rows.append(row)
    return rows, None
