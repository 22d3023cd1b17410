"""What rows of a run keep of their prompts for the report: the question, and its images made small beside the rows.

A report is written from run directories alone, when the images themselves may be gone. An image is a file of its own,
named by its content, written before the first row that refers to it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from purld.data.images import make_thumbnail
from purld.records import Image, Prompt

SIDE = 360  # pixels of the longer side at most
ENDINGS = {"image/png": ".png", "image/jpeg": ".jpg"}


def thumbnail_folder(rows: Path) -> Path:
    """Where the images of a file of rows are."""
    return rows.parent / "images"


def logged_question(prompt: Prompt, rows: Path) -> dict[str, Any]:
    """The fields of a row of the file `rows` that say what was asked; `images` are names in its album.

    Raises:
        UserError: an image of the prompt has gone, or has changed since it was read.
    """
    if not prompt.images:
        return {"prompt": prompt.question}
    album = thumbnail_folder(rows)
    for image in prompt.images:
        _keep(image, album)
    return {"prompt": prompt.question, "images": [image.digest for image in prompt.images]}


def _keep(image: Image, album: Path) -> None:
    if any((album / f"{image.digest}{ending}").exists() for ending in ENDINGS.values()):
        return
    mime, data = make_thumbnail(image, SIDE)
    album.mkdir(parents=True, exist_ok=True)
    partial = album / f".{image.digest}.{os.getpid()}.partial"
    try:
        partial.write_bytes(data)
        os.replace(partial, album / f"{image.digest}{ENDINGS[mime]}")
    finally:
        partial.unlink(missing_ok=True)
