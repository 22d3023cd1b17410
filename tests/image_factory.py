"""Small images for tests, and their encoded forms."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def make_image(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    """Return a smooth image with a dark upper left corner and a bright lower right one."""
    noise = np.random.default_rng(seed).integers(0, 40, 3)
    ramp = np.add.outer(np.arange(height) / height, np.arange(width) / width) / 2
    return Image.fromarray((ramp[..., None] * 200 + noise).astype(np.uint8))


def encode_image(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """Return the encoded image."""
    target = io.BytesIO()
    image.save(target, format=form, **options)
    return target.getvalue()


def save_image(path: Path, seed: int = 0, **options: Any) -> Path:
    """Write an image in the format of the path's ending."""
    make_image(seed=seed).save(path, **options)
    return path


def corner_brightness(image: Image.Image) -> tuple[float, float]:
    """Return the brightness (0 to 255) of the upper left and of the lower right corner."""
    grey = image.convert("L")
    return float(grey.getpixel((0, 0))), float(grey.getpixel((grey.width - 1, grey.height - 1)))


def exif_block(orientation: int = 1) -> bytes:
    """Return an EXIF block with an orientation, a description and a GPS tag."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010E] = "patient 4711"
    tags.get_ifd(0x8825)[1] = "N"  # GPS latitude reference
    return tags.tobytes()


def solid_image(colour: tuple[int, int, int, int], mode: str = "RGBA") -> Image.Image:
    """Return an image of one colour."""
    return Image.new("RGBA", (24, 16), colour).convert(mode)


def linear_grey_profile() -> bytes:
    """Return a grey profile whose values are proportional to light."""
    white = b"XYZ \0\0\0\0" + b"".join(int(v * 65536).to_bytes(4) for v in (0.9642, 1.0, 0.8249))
    curve = b"curv\0\0\0\0\0\0\0\0"  # no entries: the identity
    start = 128 + 4 + 2 * 12
    table = b"\0\0\0\2" + b"wtpt" + start.to_bytes(4) + len(white).to_bytes(4)
    table += b"kTRC" + (start + len(white)).to_bytes(4) + len(curve).to_bytes(4)
    size = start + len(white) + len(curve)
    header = (
        size.to_bytes(4) + bytes(4) + b"\x02\x10\0\0" + b"mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28) + white[8:]
    )
    return header.ljust(128, b"\0") + table + white + curve


RAMP = np.add.outer(np.arange(16) * 1800, np.arange(24) * 1600).astype(np.uint16)  # up to 63,800 of 65,535

STILL_IMAGES = {
    "JPEG": lambda: encode_image(make_image(), "JPEG"),
    "a progressive JPEG": lambda: encode_image(make_image(), "JPEG", progressive=True),
    "a JPEG with a preview": lambda: encode_image(make_image(), "MPO", save_all=True, append_images=[make_image(8, 8)]),
    "a JPEG in CMYK": lambda: encode_image(make_image().convert("CMYK"), "JPEG"),
    "PNG": lambda: encode_image(make_image()),
    "a PNG with a palette": lambda: encode_image(make_image().quantize(64)),
    "a PNG of 16 bits": lambda: encode_image(Image.fromarray(RAMP)),
    "a PGM of 16 bits": lambda: encode_image(Image.fromarray(RAMP), "PPM"),
    "a TIFF of 16 bits": lambda: encode_image(Image.fromarray(RAMP), "TIFF"),
    "a TIFF in CMYK": lambda: encode_image(make_image().convert("CMYK"), "TIFF"),
    "grey": lambda: encode_image(make_image().convert("L")),
    "GIF": lambda: encode_image(make_image(), "GIF"),
    "BMP": lambda: encode_image(make_image(), "BMP"),
    "WebP": lambda: encode_image(make_image(), "WEBP"),
    "JPEG 2000": lambda: encode_image(make_image(), "JPEG2000"),
}
