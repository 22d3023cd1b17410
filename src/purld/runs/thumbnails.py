"""Fields of logged rows that describe a prompt: the question, and thumbnails of its images.

The report is written from run directories alone, when the original images may no longer exist. Every thumbnail is a
separate file named by the image's digest, written before the first row that refers to it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from purld.data.image_encoding import make_thumbnail
from purld.records import Image, Prompt
from purld.runs.files import sync_folder

SIDE = 360  # pixels of the longer side at most
ENDINGS = {"image/png": ".png", "image/jpeg": ".jpg"}


def thumbnail_folder(rows: Path) -> Path:
    """Return the folder with the thumbnails for a file of rows."""
    return rows.parent / "images"


def prompt_fields(prompt: Prompt, rows: Path) -> dict[str, Any]:
    """Return the fields that describe `prompt` in a row of the file `rows`, and save its thumbnails.

    `images` holds the thumbnails' names in `thumbnail_folder(rows)`, without endings.

    Raises:
        UserError: an image's file is missing or has changed since it was read.
    """
    if not prompt.images:
        return {"prompt": prompt.question}
    folder = thumbnail_folder(rows)
    for image in prompt.images:
        _save_thumbnail(image, folder)
    return {"prompt": prompt.question, "images": [image.digest for image in prompt.images]}


def _save_thumbnail(image: Image, folder: Path) -> None:
    if any((folder / f"{image.digest}{ending}").exists() for ending in ENDINGS.values()):
        return
    mime_type, data = make_thumbnail(image, SIDE)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{image.digest}.{os.getpid()}.partial"
    try:
        partial.write_bytes(data)
        sync_folder(partial)
        os.replace(partial, folder / f"{image.digest}{ENDINGS[mime_type]}")
    finally:
        partial.unlink(missing_ok=True)
