"""Read rows from tables of Arrow: parquet files and folders saved by `datasets`.

A parquet file of kilobytes can hold gigabytes: a text once, and a billion rows that repeat it. Columns of texts and
bytes are therefore read as dictionaries, and rows and the bytes that they expand to are limited by the file's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from purld.data.limits import Budget, check_regular_file, reading
from purld.data.rows import FileRow
from purld.errors import UserError

_FREE_ROWS = 1_000_000  # a file with more rows has at least one byte for each, or its rows repeat each other
_BATCH = 128


def parquet_rows(path: Path) -> Iterator[FileRow]:
    """Yield the rows of a parquet file.

    Raises:
        UserError: it is not parquet, is damaged, or expands to too much.
    """
    import pyarrow.parquet

    size = check_regular_file(path)
    budget = Budget(path, size)
    with reading(path):
        texts = _columns_of_bytes(pyarrow.parquet.read_metadata(path), path, size, budget)
        number = 0
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(batch_size=_BATCH):  # rows may hold images
                for index in range(batch.num_rows):
                    number += 1
                    row = _arrow_row(batch.slice(index, 1), f"{path}, row {number}")
                    budget.spend(_content_size(row.values))
                    yield row


def dataset_rows(path: Path) -> Iterator[FileRow]:
    """Yield the rows of a folder that `datasets`' save_to_disk wrote: a data set, or several splits if it is one.

    Raises:
        UserError: it is no such folder, holds several splits, or is damaged.
    """
    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise UserError(f"{path}: is a folder, but not one saved by the datasets library.")
    import datasets

    with reading(path):
        table = datasets.load_from_disk(str(path))
        if isinstance(table, datasets.DatasetDict):
            if len(table) != 1:
                splits = ", ".join(sorted(table))
                raise UserError(
                    f"{path}: holds several splits ({splits}); name the folder of one of them, "
                    f"such as {path}/{sorted(table)[-1] if table else 'train'}."
                )
            (table,) = table.values()
        number = 0
        for batch in table.with_format("arrow").iter(batch_size=_BATCH):  # "arrow" leaves images encoded
            for index in range(batch.num_rows):
                number += 1
                yield _arrow_row(batch.slice(index, 1), f"{path}, row {number}")


def _columns_of_bytes(metadata: Any, path: Path, size: int, budget: Budget) -> list[str]:
    """Return the paths of the columns that hold texts or bytes, after checking what the file says of its contents."""
    if metadata.num_rows > max(_FREE_ROWS, size):
        raise UserError(f"{path}: has {metadata.num_rows:,} rows in {size:,} bytes; nearly all of them repeat others.")
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    budget.spend(sum(group.total_byte_size for group in groups))
    columns = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def _arrow_row(batch: Any, location: str) -> FileRow:
    try:
        return FileRow(location, batch.to_pylist()[0])
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, or a date outside Python's range
        return FileRow(location, None, f"cannot be read ({error})")


def _content_size(value: Any) -> int:
    """Return about how many bytes a cell holds."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_content_size, value.values()), 8)
    return sum(map(_content_size, value), 8) if isinstance(value, list) else 8
