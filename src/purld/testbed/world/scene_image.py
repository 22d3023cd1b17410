"""Render a scene as an image and recognise the scene of an image.

Edges are not smoothed and every colour is exactly one of the palette's, so recognition is exact: a cell's shape is the
one that, rendered at the size and position found in the cell, gives the same pixels. This survives any lossless
encoding. An image that was scaled or blurred, or that was made elsewhere, is not recognised.
"""

from __future__ import annotations

import functools
import io
import random

import numpy as np
from PIL import Image, ImageDraw

from purld.testbed.world.scenes import COLOURS, COLUMNS, PLACES, SHAPES, Scene, Thing

CELL = 64
SIDE = CELL * len(COLUMNS)
PAPER, LINE, FRAME = (250, 250, 250), (215, 215, 215), (90, 90, 90)
# The frame tells the cells apart for a tower that sees one cell at a time: a corner has two thick sides.
_FRAME_WIDTH = 4
_PALETTE = {
    "red": (215, 40, 40),
    "blue": (40, 80, 220),
    "green": (30, 150, 60),
    "yellow": (240, 200, 30),
    "purple": (150, 60, 190),
    "black": (25, 25, 25),
}
_SIZES, _MARGIN = range(34, 47), 6


def render_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """Render a scene as an RGB image of SIDE by SIDE pixels, with random sizes and positions inside the cells."""
    image = Image.new("RGB", (SIDE, SIDE), PAPER)
    pen = ImageDraw.Draw(image)
    for offset in range(CELL, SIDE, CELL):
        pen.line((offset, 0, offset, SIDE), LINE)
        pen.line((0, offset, SIDE, offset), LINE)
    pen.rectangle((0, 0, SIDE - 1, SIDE - 1), outline=FRAME, width=_FRAME_WIDTH)
    for thing in scene.things:
        size = rng.choice(_SIZES)
        left, top = (rng.randint(_MARGIN, CELL - _MARGIN - size) for _ in range(2))
        x, y = _corner(PLACES.index(thing.place))
        image.paste(_PALETTE[thing.colour], (x + left, y + top), Image.fromarray(_mask(thing.shape, size)))
    return image


def recognise_scene(image: Image.Image) -> Scene | None:
    """Return the scene of an image, or None if the image is not one of the testbed's."""
    if image.size != (SIDE, SIDE):
        return None
    pixels = np.asarray(image.convert("RGB"))
    things = []
    for index, place in enumerate(PLACES):
        x, y = _corner(index)
        inner = pixels[y + _MARGIN : y + CELL - _MARGIN, x + _MARGIN : x + CELL - _MARGIN]
        if (inner == PAPER).all():
            continue
        seen = _recognise_cell(inner)
        if seen is None:
            return None
        things.append(Thing(*seen, place))
    return Scene(tuple(things)) if things else None


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _recognise_cell(inner: np.ndarray) -> tuple[str, str] | None:
    """Return colour and shape of the thing in the inner pixels (height, width, 3) of a cell, or None."""
    inked = (inner != PAPER).any(-1)
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    top, left = rows[0], columns[0]
    height, width = rows[-1] - top + 1, columns[-1] - left + 1
    colour = next((c for c in COLOURS if (inner[inked] == _PALETTE[c]).all()), None)
    if colour is None or height != width or height not in _SIZES:
        return None
    seen = inked[top : top + height, left : left + width]
    shape = next((s for s in SHAPES if np.array_equal(seen, _mask(s, int(height)) > 0)), None)
    return (colour, shape) if shape else None


@functools.cache
def _mask(shape: str, size: int) -> np.ndarray:
    """Return the ink of a shape, (size, size) of 0 and 255; it touches all four sides."""
    mask = Image.new("L", (size, size), 0)
    pen, last, third = ImageDraw.Draw(mask), size - 1, size // 3
    match shape:
        case "circle":
            pen.ellipse((0, 0, last, last), 255)
        case "square":
            pen.rectangle((0, 0, last, last), 255)
        case "triangle":
            pen.polygon(((0, last), (last, last), (last // 2, 0)), 255)
        case "cross":
            pen.rectangle((third, 0, last - third, last), 255)
            pen.rectangle((0, third, last, last - third), 255)
        case _:
            pen.ellipse((0, 0, last, last), 255)
            pen.ellipse((size // 4, size // 4, last - size // 4, last - size // 4), 0)
    return np.array(mask)


def _corner(index: int) -> tuple[int, int]:
    """Return x and y of a cell's top left pixel."""
    row, column = divmod(index, len(COLUMNS))
    return column * CELL, row * CELL
