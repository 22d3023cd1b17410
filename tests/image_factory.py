"""Small pictures of every kind that users have, made where they are needed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    """A smooth picture whose upper left corner is dark and whose lower right one is bright."""
    noise = np.random.default_rng(seed).integers(0, 40, 3)
    ramp = np.add.outer(np.arange(height) / height, np.arange(width) / width) / 2
    return Image.fromarray((ramp[..., None] * 200 + noise).astype(np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The picture in a file's bytes."""
    target = io.BytesIO()
    image.save(target, format=form, **options)
    return target.getvalue()


def save_picture(path: Path, seed: int = 0, **options: Any) -> Path:
    """Write a picture in the format that the path's name ends in."""
    picture(seed=seed).save(path, **options)
    return path


def corners(image: Image.Image) -> tuple[float, float]:
    """The brightness of the upper left corner, and of the lower right one."""
    grey = image.convert("L")
    return float(grey.getpixel((0, 0))), float(grey.getpixel((grey.width - 1, grey.height - 1)))
