"""Read rows from text files: JSONL, an array of JSON objects, CSV or TSV with a header, and prompts line by line.

Memory is bounded by one row, except for a JSON array, whose text is held as a whole.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from purld.data.limits import MAX_LINE, read_lines, read_whole
from purld.data.rows import FileRow, json_type_name
from purld.errors import UserError

_SPACE = " \t\r\n"
TEXT_COLUMN = "prompt"  # of a text file, which names none


def jsonl_rows(path: Path) -> Iterator[FileRow]:
    """Yield the rows of a file with one JSON object per line; blank lines are skipped."""
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            yield _json_row(line, f"{path}, line {number}")


def json_array_rows(path: Path) -> Iterator[FileRow]:
    """Yield the objects of a file that is one JSON array, on one line or many.

    An entry that is not JSON is the last one, as there is no telling where the next begins.
    """
    data = read_whole(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: is not UTF-8 (byte 0x{data[error.start]:02x}).") from None
    position = _skip_space(text, text.find("[") + 1)
    number, line, counted = 0, 1, 0  # entries and lines so far, and up to where lines are counted
    while text[position : position + 1] != "]":
        number += 1
        line, counted = line + text.count("\n", counted, position), position
        location = f"{path}, entry {number}, line {line}"
        try:
            value, position = _DECODER.raw_decode(text, position)
            position = _next_entry(text, position)
        except RecursionError:
            yield FileRow(location, None, "is nested too deeply to be read as JSON")
            return
        except ValueError as error:
            yield FileRow(location, None, f"is not valid JSON ({error})")
            return
        yield _as_row(value, location, "each entry is one JSON object")
    if text[position + 1 :].strip(_SPACE):
        line += text.count("\n", counted, position)
        yield FileRow(f"{path}, line {line}", None, "has text after the end of the JSON array")


def csv_rows(path: Path, delimiter: str | None) -> Iterator[FileRow]:
    """Yield the rows of a table whose first line names the columns; an empty cell is a missing value.

    Args:
        path: the file.
        delimiter: what separates the cells; None: a comma, or what the header has in its place, a semicolon or a tab.

    Raises:
        UserError: the header has no names, or one twice.
    """
    csv.field_size_limit(MAX_LINE)  # quoted cells may have line breaks, so that the lines alone do not bound them
    # Bytes that are not UTF-8 become lone surrogates, and are found in the row that has them.
    lines = (line.decode("utf-8", "surrogateescape") for line in read_lines(path))
    header_line = next(lines, "")
    delimiter = delimiter or next((mark for mark in ",;\t" if mark in header_line), ",")
    reader = csv.reader(_chain(header_line, lines), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise UserError(f"{path}, line 1: is not a header of column names ({error}).") from None
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"{path}, line 1: the header names the column {twice!r} twice.")
    while True:
        location = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield FileRow(location, None, f"cannot be read as CSV ({error})")
            return
        if cells is None:
            return
        if cells:
            yield _csv_row(header, cells, location)


def text_rows(path: Path) -> Iterator[FileRow]:
    """Yield a row with the column `prompt` for every line of a text file that is not blank."""
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            location = f"{path}, line {number}"
            try:
                yield FileRow(location, {TEXT_COLUMN: _decode(line).strip()})
            except ValueError as problem:
                yield FileRow(location, None, str(problem))


def parse_json(data: bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON in UTF-8; the message is the end of a sentence.
    """
    text = _decode(data)
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("is nested too deeply to be read as JSON") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({error})") from None


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte 0x{data[error.start]:02x} at position {error.start + 1})") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; Python's parser would take the last of two equal keys and say nothing."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_each_key_once, parse_constant=_refuse_constant)


def _json_row(line: bytes, location: str) -> FileRow:
    try:
        return _as_row(parse_json(line), location, "a row is one JSON object on one line")
    except ValueError as problem:
        return FileRow(location, None, str(problem))


def _as_row(value: Any, location: str, rule: str) -> FileRow:
    if not isinstance(value, dict):
        return FileRow(location, None, f"is {json_type_name(value)}; {rule}")
    return FileRow(location, value)


def _next_entry(text: str, position: int) -> int:
    """Return the position of the next entry, or of the bracket that closes the array."""
    position = _skip_space(text, position)
    if text[position : position + 1] == ",":
        position = _skip_space(text, position + 1)
        if text[position : position + 1] != "]":
            return position
    elif text[position : position + 1] == "]":
        return position
    raise ValueError("a comma and an entry, or the end of the array, is missing after it")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


def _csv_row(header: list[str], cells: list[str], location: str) -> FileRow:
    if len(cells) != len(header):
        return FileRow(location, None, f"has {len(cells)} cells, and the header names {len(header)} columns")
    for name, cell in zip(header, cells):
        if any("\udc80" <= character <= "\udcff" for character in cell):
            return FileRow(location, None, f"is not UTF-8 in column {name!r}")
    return FileRow(location, {name: cell or None for name, cell in zip(header, cells)})


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
