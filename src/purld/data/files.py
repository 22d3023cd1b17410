"""Read rows from the files that users bring: JSONL, parquet, or a folder saved by `datasets`.

Every row carries its location in words ("pool.jsonl, line 7"). The columns of a row are not interpreted here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from purld.errors import UserError
from purld.records import IMAGE

MAX_CHARACTERS = 1_000_000  # of one text; far above any context window


class BadRowError(ValueError):
    """A row that cannot be used; the message names its location and the problem, without a full stop."""


@dataclass(frozen=True)
class FileRow:
    """One row and its location in words; if it could not be read, `values` is None and `problem` says why."""

    location: str
    values: Mapping[str, Any] | None
    problem: str = ""

    def cells(self) -> Mapping[str, Any]:
        """Return the row's values.

        Raises:
            BadRowError: the row could not be read.
        """
        if self.values is None:
            raise BadRowError(f"{self.location}: {self.problem}")
        return self.values


def iter_rows(path: str | Path) -> Iterator[FileRow]:
    """Iterate over the rows of a `.jsonl` or `.parquet` file, or of a folder written by `datasets`' save_to_disk.

    Raises:
        UserError: the file is missing, has another format, or cannot be read at all.
    """
    path = Path(path)
    if path.is_dir():
        return _dataset_rows(path)
    if not path.exists():
        raise UserError(f"{path}: no such file.")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        return _json_rows(path)
    raise UserError(f"{path}: is neither .jsonl nor .parquet nor a folder saved by the datasets library.")


def parse_json_file(path: str | Path) -> Any:
    """Parse a file that holds one JSON value.

    Raises:
        BadRowError: it is not JSON in UTF-8; the location is the file.
        UserError: the file cannot be read at all.
    """
    path = Path(path)
    with _reading(path):
        data = path.read_bytes()
    try:
        return _parse_json(_without_byte_order_mark(data, path))
    except ValueError as problem:
        raise BadRowError(f"{path}: {problem}") from None


def check_text(cell: object, name: str) -> str:
    """Return `cell` if it is a text that a model can be shown, with every IMAGE character replaced by a space.

    Converted documents contain that character in place of their images.

    Raises:
        ValueError: it is not a text, is blank, holds a NUL or a lone surrogate, or is longer than MAX_CHARACTERS.
    """
    if not isinstance(cell, str):
        raise ValueError(f"{name} is {json_type_name(cell)}, not a text")
    cell = cell.replace(IMAGE, " ")
    if not cell.strip():
        raise ValueError(f"{name} is empty")
    if "\0" in cell:
        raise ValueError(f"{name} contains a NUL character")
    if len(cell) > MAX_CHARACTERS:
        raise ValueError(f"{name} has {len(cell):,} characters; at most {MAX_CHARACTERS:,} are accepted")
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} contains a lone surrogate at character {error.start + 1}") from None
    return cell


def json_type_name(value: object) -> str:
    """Return the JSON name of a value's type, for use in a sentence."""
    match value:
        case None:
            return "missing or null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case list() | tuple():
            return "a list"
        case Mapping():
            return "an object"
        case _:
            return f"a {type(value).__name__}"


def _json_rows(path: Path) -> Iterator[FileRow]:
    with _reading(path), path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if number == 1:
                line = _without_byte_order_mark(line, path)
            if line.strip():
                yield _json_row(line, f"{path}, line {number}")


def _without_byte_order_mark(line: bytes, path: Path) -> bytes:
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}, line 1: the file is UTF-16; save it as UTF-8.")
    return line.removeprefix(b"\xef\xbb\xbf")


def _json_row(line: bytes, location: str) -> FileRow:
    try:
        values = _parse_json(line)
    except ValueError as problem:
        return FileRow(location, None, str(problem))
    if not isinstance(values, dict):
        return FileRow(location, None, f"is {json_type_name(values)}; a row is one JSON object on one line")
    return FileRow(location, values)


def _parse_json(data: bytes) -> Any:
    """Parse JSON; the message of a ValueError is the end of a sentence."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte 0x{data[error.start]:02x} at position {error.start + 1})") from None
    except RecursionError:
        raise ValueError("is nested too deeply to be read as JSON") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({error})") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _parquet_rows(path: Path) -> Iterator[FileRow]:
    import pyarrow.parquet

    number = 0
    with _reading(path), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=128):  # rows may hold images
            for index in range(batch.num_rows):
                number += 1
                yield _arrow_row(batch.slice(index, 1), f"{path}, row {number}")


def _arrow_row(batch: Any, location: str) -> FileRow:
    try:
        return FileRow(location, batch.to_pylist()[0])
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, or a date outside Python's range
        return FileRow(location, None, f"cannot be read ({error})")


def _dataset_rows(path: Path) -> Iterator[FileRow]:
    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise UserError(f"{path}: is a folder, but not one saved by the datasets library.")
    import datasets

    with _reading(path):
        table = datasets.load_from_disk(str(path))
        if isinstance(table, datasets.DatasetDict):
            splits = ", ".join(sorted(table))
            raise UserError(f"{path}: holds several splits ({splits}); name the folder of one of them.")
        number = 0
        for batch in table.with_format("arrow").iter(batch_size=128):  # "arrow" leaves images encoded
            for index in range(batch.num_rows):
                number += 1
                yield _arrow_row(batch.slice(index, 1), f"{path}, row {number}")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Convert the errors of reading a broken file to a UserError of one sentence."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError) as error:  # base classes of pyarrow's errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason}).") from None
