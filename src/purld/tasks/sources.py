"""Find the splits of a published data set: files by name, or a data set of the Hugging Face hub, downloaded before.

Rows are read lazily. The modules of the tasks parse them.
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
"""The rows of each published split, by its usual name: "train", "validation" or "test"."""

_USUAL_NAMES = {
    "train": "train",
    "valid": "validation",
    "val": "validation",
    "validation": "validation",
    "test": "test",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def split_name(stem: str) -> str:
    """Return the usual name of the split in a file or folder called `stem`, or `stem` if it is not a known split."""
    return _USUAL_NAMES.get(stem.lower(), stem)


def find_splits(path: str, pattern: str, read: Callable[[Path], Iterable[FileRow]]) -> dict[str, Iterable[FileRow]]:
    """Read the files of a folder that match `pattern`, or the single file `path`, each as one split.

    Raises:
        UserError: there is nothing at `path`.
    """
    source = Path(path)
    if not source.exists():
        raise UserError(f"{path}: no such file or folder.")
    if not source.is_dir():
        return {split_name(source.stem): read(source)}
    return {split_name(file.stem): read(file) for file in sorted(source.glob(pattern))}


def row_splits(path: str) -> dict[str, Iterable[FileRow]]:
    """Read the JSONL or parquet files of a folder, or the single file `path`, each as one split."""
    return find_splits(path, "*.jsonl", iter_rows) or find_splits(path, "*.parquet", iter_rows)


def is_hub_data(path: str) -> bool:
    """Return whether `path` is a folder laid out as on the hub, or does not exist and has the form of a hub id."""
    folder = Path(path)
    return any(folder.glob("*/*.parquet")) if folder.exists() else _HUB_ID.fullmatch(path) is not None


def hub_splits(name: str) -> dict[str, Iterable[FileRow]]:
    """Load the splits of a hub data set in a folder or the local cache, all its configurations in sequence.

    Raises:
        UserError: the data set cannot be loaded; nothing is downloaded.
    """
    import datasets

    tables: dict[str, list[Iterator[FileRow]]] = {}
    try:
        for config in datasets.get_dataset_config_names(name):
            for split, table in datasets.load_dataset(name, config).items():
                tables.setdefault(split_name(split), []).append(_hub_rows(table, f"{name} ({config}, {split})"))
    # The library passes on the errors of its file formats and transports, which share no base class.
    except Exception as error:
        if not Path(name).exists():
            raise UserError(
                f"{name}: is neither a file or folder here nor a data set in the Hugging Face cache, and purld "
                f"downloads nothing; fetch it before with `hf download --repo-type dataset {name} --local-dir DIR` and "
                "give DIR."
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: cannot be loaded as a data set of the hub ({reason}).") from None
    return {split: chain.from_iterable(parts) for split, parts in tables.items()}


def _hub_rows(table: Iterable[Mapping[str, Any]], source: str) -> Iterator[FileRow]:
    for number, values in enumerate(table, 1):
        yield FileRow(f"{source}, row {number}", values)
