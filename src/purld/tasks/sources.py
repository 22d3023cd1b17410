"""Where published data sets keep their splits: files by name, a folder per split, or a data set on the hub.

Gives rows under the names of their splits and reads them only when asked. What a row holds is the tasks'
business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from purld.data.files import FileRow, iter_rows
from purld.errors import UserError

Splits = Mapping[str, Iterable[FileRow]]
"""The rows of each published split; "train", "validation" and "test" are told by their usual names."""

_NAMES = {"train": "train", "valid": "validation", "val": "validation", "validation": "validation", "test": "test"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def split_name(stem: str) -> str:
    """The usual name of a split that a file or folder is named for; another name is its own split."""
    return _NAMES.get(stem.lower(), stem)


def find_splits(path: str, pattern: str, read: Callable[[Path], Iterable[FileRow]]) -> dict[str, Iterable[FileRow]]:
    """The files of a folder that match `pattern`, or the one file that `path` is, by their splits.

    Raises:
        UserError: there is nothing at `path`.
    """
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path}: no such file or folder.")
    if place.is_file():
        return {split_name(place.stem): read(place)}
    return {split_name(file.stem): read(file) for file in sorted(place.glob(pattern))}


def row_splits(path: str) -> dict[str, Iterable[FileRow]]:
    """The JSONL or parquet files of a folder, or the one file that `path` is, by their splits."""
    return find_splits(path, "*.jsonl", iter_rows) or find_splits(path, "*.parquet", iter_rows)


def is_hub_id(path: str) -> bool:
    """Whether `path` names a data set on the hub, which it does only if nothing lies there on this machine."""
    return not Path(path).exists() and _HUB_ID.fullmatch(path) is not None


def hub_splits(name: str) -> dict[str, Iterable[FileRow]]:
    """The splits of a data set on the hub, all its configurations one after another.

    Raises:
        UserError: it cannot be loaded.
    """
    import datasets

    tables: dict[str, list[Iterator[FileRow]]] = {}
    try:
        for config in datasets.get_dataset_config_names(name):
            for split, table in datasets.load_dataset(name, config).items():
                tables.setdefault(split_name(split), []).append(_hub_rows(table, f"{name} ({config}, {split})"))
    # The library raises what its transports raise, without a common base.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: is neither a file nor a data set that the hub gives ({reason}).") from None
    return {split: chain.from_iterable(parts) for split, parts in tables.items()}


def _hub_rows(table: Iterable[Mapping[str, Any]], place: str) -> Iterator[FileRow]:
    for number, values in enumerate(table, 1):
        yield FileRow(f"{place}, row {number}", values)
