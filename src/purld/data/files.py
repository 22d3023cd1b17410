"""Read rows from the files that users bring, whatever their kind.

Every row carries its location in words ("pool.jsonl, line 7"). What the columns of a row mean is decided in
`purld.data.formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from purld.data.limits import first_bytes, read_whole, without_byte_order_mark
from purld.data.rows import BadRowError, FileRow, check_text, json_type_name
from purld.data.tables import dataset_rows, parquet_rows
from purld.data.text_files import csv_rows, json_array_rows, jsonl_rows, parse_json, text_rows
from purld.errors import UserError

__all__ = ["BadRowError", "FileRow", "check_text", "file_kind", "iter_rows", "json_type_name", "parse_json_file"]

FILE_KINDS: dict[str, Callable[[Path], Iterator[FileRow]]] = {
    "jsonl": jsonl_rows,
    "json": json_array_rows,
    "csv": partial(csv_rows, delimiter=None),
    "tsv": partial(csv_rows, delimiter="\t"),
    "text": text_rows,
    "parquet": parquet_rows,
    "dataset": dataset_rows,
}
"""The kinds of files, by the name that `data.format` gives them, and what reads their rows."""

KIND_NAMES = {
    "jsonl": "JSONL",
    "json": "a JSON array",
    "csv": "CSV",
    "tsv": "TSV",
    "text": "text with one prompt per line",
    "parquet": "parquet",
    "dataset": "a folder saved by datasets",
}
_ENDINGS = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet"}
_JSON_ENDINGS = (".jsonl", ".ndjson", ".json")


def iter_rows(path: str | Path, kind: str | None = None) -> Iterator[FileRow]:
    """Iterate over the rows of a file, or of a folder written by `datasets`' save_to_disk.

    Args:
        path: the file or folder; a text file may be in gzip.
        kind: a key of `FILE_KINDS`; None: what name and content say.

    Raises:
        UserError: the file is missing, has another format, or cannot be read at all.
    """
    path = Path(path)
    return FILE_KINDS[kind or file_kind(path)](path)


def file_kind(path: Path) -> str:
    """Return the kind of a file, a key of `FILE_KINDS`: by its name, or else by its content.

    Raises:
        UserError: it is none of them, or cannot be read at all.
    """
    if path.is_dir():
        return "dataset"
    start = first_bytes(path)
    ending = (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    if start.startswith(b"PAR1"):
        return "parquet"
    text = without_byte_order_mark(start, path).lstrip()
    if text.startswith(b"["):
        return "json"
    if ending in _JSON_ENDINGS or text.startswith(b"{"):
        return "jsonl"
    if ending == ".txt":
        return "text"
    raise UserError(
        f"{path}: is neither .jsonl nor .json nor .csv nor .tsv nor .txt nor .parquet nor a folder saved by the "
        "datasets library; say what it is by data.format, for example csv."
    )


def parse_json_file(path: str | Path) -> Any:
    """Parse a file that holds one JSON value.

    Raises:
        BadRowError: it is not JSON in UTF-8; the location is the file.
        UserError: the file cannot be read at all.
    """
    data = read_whole(Path(path))
    try:
        return parse_json(data)
    except ValueError as problem:
        raise BadRowError(f"{path}: {problem}") from None
