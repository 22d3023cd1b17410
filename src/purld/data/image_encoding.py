"""Encode images for sending and for thumbnails: scaled to bounds, upright and without metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from purld.data.image_metadata import strip_metadata
from purld.data.images import read_encoded, unusable_as_user_error
from purld.data.pil_images import (
    LOSSY_FORMATS,
    QUARTER_TURNS,
    convert_to_rgb,
    exif_orientation,
    open_encoded,
    save_to_bytes,
    srgb_transform,
)
from purld.records import Image

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from PIL.ImageFile import ImageFile

PIXEL_ART = 96  # an image with no side longer than this is displayed and stored without smoothing

_QUALITIES = (90, 80, 70)  # of JPEG, tried in order until the image is small enough
_JPEG: Mapping[str, Any] = {"format": "JPEG", "subsampling": 0}  # Pillow's `optimize` fails on noise


@dataclass(frozen=True)
class ImageBounds:
    """Limits of an image that is sent: `side`, its longer side in pixels, and `size`, its encoded size in bytes."""

    side: int
    size: int


def encode_for_sending(image: Image, bounds: ImageBounds) -> tuple[str, bytes]:
    """Return an image's MIME type and encoded bytes as sent: within `bounds` and without metadata.

    A file in a format that every model reads, and within bounds, keeps its compressed pixels, so its bytes do not
    depend on a library's version. Anything else is encoded again.

    Raises:
        UserError: the image's file is missing or has changed since it was read.
    """
    with unusable_as_user_error(image):
        data = read_encoded(image)
        pil_image = open_encoded(data)
        if max(pil_image.size) <= bounds.side and _is_portable(pil_image, data):
            stripped = strip_metadata(data)
            if stripped is not None and len(stripped) <= bounds.size:
                return f"image/{'jpeg' if pil_image.format == 'MPO' else str(pil_image.format).lower()}", stripped
        return _encode_within(_scale_down(pil_image, bounds.side), bounds.size, pil_image.format in LOSSY_FORMATS)


def bounded_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the (width, height) of an image of `size` after scaling its longer side down to `side` pixels."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def make_thumbnail(image: Image, side: int) -> tuple[str, bytes]:
    """Return the MIME type and encoded bytes of an image scaled down to `side` pixels for a page.

    Raises:
        UserError: the image's file is missing or has changed since it was read.
    """
    with unusable_as_user_error(image):
        pil_image = open_encoded(read_encoded(image))
        small = _scale_down(pil_image, side)
    if max(image.size) <= PIXEL_ART:
        return "image/png", save_to_bytes(small, format="PNG", optimize=True)
    jpeg = save_to_bytes(small, format="JPEG", quality=78)
    if pil_image.format not in LOSSY_FORMATS and len(png := save_to_bytes(small, format="PNG")) <= len(jpeg):
        return "image/png", png
    return "image/jpeg", jpeg


def _is_portable(pil_image: ImageFile, data: bytes) -> bool:
    """Return whether every model sees the same pixels in the file itself as `open_image` returns."""
    if pil_image.format not in ("JPEG", "MPO", "PNG", "WEBP") or pil_image.mode not in ("L", "RGB", "P"):
        return False
    if pil_image.has_transparency_data or (pil_image.format == "PNG" and data[24] > 8):  # more than 8 bits a channel
        return False
    profile = pil_image.info.get("icc_profile")
    if profile and (pil_image.mode != "RGB" or _changes_colours(profile)):
        return False
    return exif_orientation(pil_image) == 1


def _changes_colours(profile: bytes) -> bool:
    try:
        return srgb_transform(profile, "RGB") is not None
    except Exception:  # a damaged profile is ignored
        return False


def _scale_down(pil_image: ImageFile, side: int) -> PILImage:
    """Return an image in upright RGB with no side longer than `side` pixels."""
    from PIL.Image import Resampling

    target = bounded_size(pil_image.size, side)
    if target != pil_image.size:
        pil_image.draft(None, target)  # decodes a JPEG no larger than needed
    rgb = convert_to_rgb(pil_image)
    if exif_orientation(pil_image) in QUARTER_TURNS:
        target = target[1], target[0]
    return rgb if max(rgb.size) <= side else rgb.resize(target, Resampling.LANCZOS)


def _encode_within(pil_image: PILImage, limit: int, lossy: bool) -> tuple[str, bytes]:
    """Encode an image in at most `limit` bytes: as PNG, else as JPEG of falling quality, else scaled down further."""
    if not lossy and len(data := save_to_bytes(pil_image, format="PNG", optimize=True)) <= limit:
        return "image/png", data
    while True:
        for quality in _QUALITIES:
            data = save_to_bytes(pil_image, **_JPEG, quality=quality)
            if len(data) <= limit:
                return "image/jpeg", data
        pil_image = pil_image.resize(bounded_size(pil_image.size, max(1, max(pil_image.size) * 3 // 4)))
