"""Decode encoded images with Pillow, check them, and convert them to upright 8-bit sRGB.

An image is shown as a viewer shows it: upright, on white where it is transparent, in sRGB, eight bits a channel. The
content of a file decides its format, never its name. Knows nothing of paths or of `purld.records`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from PIL.ImageCms import ImageCmsTransform
    from PIL.ImageFile import ImageFile

MAX_PIXELS = 80_000_000  # 240 MB when decoded; below the count at which Pillow itself starts to warn
MAX_ASPECT = 200  # longer side to shorter side; Qwen-VL's image processors accept no more
LOSSY_FORMATS = ("JPEG", "MPO", "WEBP", "AVIF")
QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap width and height

# The formats of Pillow that hold only pixels: Pillow hands PostScript to another program, and opens any file as TGA.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_ORIENTATION_TAG = 0x0112  # of EXIF
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262


class UnusableImageError(ValueError):
    """A problem with an image; the message is the end of a sentence, without a full stop."""


def open_encoded(data: bytes) -> ImageFile:
    """Open an encoded image, reading only its header.

    Raises:
        UnusableImageError: it is not one image of a usable format and size.
    """
    import PIL.Image
    from PIL import UnidentifiedImageError

    if not data:
        raise UnusableImageError("is empty")
    with _decoding():
        try:
            pil_image = PIL.Image.open(io.BytesIO(data), formats=_supported_formats())
        except PIL.Image.DecompressionBombError:
            raise UnusableImageError(f"has more than {MAX_PIXELS:,} pixels; scale it down") from None
        except UnidentifiedImageError:
            raise UnusableImageError(_describe_other_file(data)) from None
        check_shape(pil_image)
        # An MPO file is a camera's photograph, followed by extra images such as a preview.
        if pil_image.format != "MPO" and getattr(pil_image, "is_animated", False):
            frames = getattr(pil_image, "n_frames", "several")
            raise UnusableImageError(f"has {frames} frames or pages; save the one you need as a separate image")
    return pil_image


def check_shape(pil_image: PILImage) -> None:
    """Raise UnusableImageError if the image is empty, too large, or too long for its width."""
    width, height = pil_image.size
    if width * height > MAX_PIXELS:
        raise UnusableImageError(
            f"has {width:,} x {height:,} pixels; at most {MAX_PIXELS:,} are accepted: scale it down"
        )
    if min(width, height) < 1:
        raise UnusableImageError("has no pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnusableImageError(
            f"is {width:,} x {height:,} pixels; models take no image with one side more than {MAX_ASPECT} times "
            "the other"
        )


def measure_upright_size(data: bytes) -> tuple[int, int]:
    """Decode an encoded image to its end and return its (width, height) in pixels after rotation to upright.

    A JPEG is decoded at an eighth of its size.

    Raises:
        UnusableImageError: it is not one usable image, or it is truncated or damaged.
    """
    pil_image = open_encoded(data)
    width, height = pil_image.size
    _check_mode(pil_image)
    with _decoding():
        pil_image.draft(None, (max(1, width // 8), max(1, height // 8)))
        pil_image.load()
        swapped = exif_orientation(pil_image) in QUARTER_TURNS
    return (height, width) if swapped else (width, height)


def convert_to_rgb(pil_image: PILImage) -> PILImage:
    """Convert an image to upright 8-bit sRGB.

    Raises:
        UnusableImageError: it cannot be decoded, or the range of its colours is not known.
    """
    from PIL.Image import Transpose

    _check_mode(pil_image)
    with _decoding():
        pil_image.load()
        transpose = {
            2: Transpose.FLIP_LEFT_RIGHT,
            3: Transpose.ROTATE_180,
            4: Transpose.FLIP_TOP_BOTTOM,
            5: Transpose.TRANSPOSE,
            6: Transpose.ROTATE_270,
            7: Transpose.TRANSVERSE,
            8: Transpose.ROTATE_90,
        }.get(exif_orientation(pil_image))
        rgb = _to_srgb(_on_white(pil_image), pil_image.info.get("icc_profile"))
        return rgb.transpose(transpose) if transpose is not None else rgb


def exif_orientation(pil_image: PILImage) -> int:
    """Return the EXIF orientation, or 1 (upright) if there is none or the EXIF block is damaged."""
    try:
        orientation = pil_image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # Pillow's parser raises many types on a damaged block
        return 1
    return orientation if isinstance(orientation, int) else 1


@functools.lru_cache(maxsize=16)
def srgb_transform(profile: bytes, mode: str) -> ImageCmsTransform | None:
    """Return the transform from a colour profile to sRGB, or None if the profile is sRGB already."""
    from PIL import ImageCms

    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
        return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def save_to_bytes(pil_image: PILImage, **options: Any) -> bytes:
    """Encode an image without metadata; `options` are those of Pillow's `save`."""
    target = io.BytesIO()
    pil_image.info.clear()  # Pillow would write some of it
    pil_image.save(target, **options)
    return target.getvalue()


def short_error(error: BaseException) -> str:
    """Return an error's message on one line of at most 100 characters, or its type's name."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:100] or type(error).__name__


def _check_mode(pil_image: PILImage) -> None:
    if pil_image.mode not in _MODES and not _is_16_bit(pil_image):
        raise UnusableImageError(
            f"has the colour mode {pil_image.mode}, whose range is not known; save it as RGB or grey"
        )


def _is_16_bit(pil_image: PILImage) -> bool:
    """Return whether an image is 16-bit grey; Pillow opens some such PNG and PGM files in its 32-bit mode."""
    return pil_image.mode.startswith("I;16") or (pil_image.mode == "I" and pil_image.format in ("PNG", "PPM"))


@functools.cache
def _supported_formats() -> tuple[str, ...]:
    """Return those of `_FORMATS` that this Pillow supports, and silence Pillow.

    Pillow's warnings and log messages (odd tags, sizes) concern what is checked here or does not matter.
    """
    import PIL.Image

    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    PIL.Image.init()
    return tuple(name for name in _FORMATS if name in PIL.Image.OPEN)


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Convert any error that Pillow raises on a damaged file to UnusableImageError; they share no base class."""
    try:
        yield
    except UnusableImageError:
        raise
    except Exception as error:
        truncated = "truncated" in str(error).lower()
        raise UnusableImageError(
            "is truncated" if truncated else f"is truncated or damaged ({short_error(error)})"
        ) from None


def _describe_other_file(data: bytes) -> str:
    """Describe a file that no decoder accepts, as the end of a sentence."""
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"\xff\xd8\xff", b"\x89png", b"gif8", b"riff", b"bm", b"ii*\0", b"mm\0*")):
        return "is truncated or damaged"
    if start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis"):
        return "is truncated or damaged, or in AVIF, which this Pillow does not read"
    if b"<svg" in start:
        return "is a drawing in SVG; convert it to PNG"
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<script")):
        return "is a web page, as failed downloads leave, and not an image"
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"heim", b"mif1", b"msf1", b"hevc"):
        return "is in HEIC, which is not read; convert it to JPEG or PNG"
    if start.startswith(b"%pdf"):
        return "is a PDF; save the page you need as an image"
    return "is not an image in a supported format (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PNM)"


def _on_white(pil_image: PILImage) -> PILImage:
    """Convert an image to L, RGB or CMYK, with white behind transparent pixels."""
    import PIL.Image

    if _is_16_bit(pil_image):
        return _to_8_bits(pil_image)
    if pil_image.has_transparency_data:
        pil_image = pil_image.convert("RGBA")
        white = PIL.Image.new("RGBA", pil_image.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, pil_image).convert("RGB")
    if pil_image.mode == "1":
        return pil_image.convert("L")
    return pil_image if pil_image.mode in ("L", "RGB", "CMYK") else pil_image.convert("RGB")


def _to_8_bits(pil_image: PILImage) -> PILImage:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion would clip all values above 255."""
    import PIL.Image

    values = np.asarray(pil_image).astype(np.uint32)
    tags = getattr(pil_image, "tag_v2", {})
    highest = 2 ** int(tags.get(_TIFF_BITS, (16,))[0]) - 1
    scaled = np.minimum((values * 255 + highest // 2) // highest, 255).astype(np.uint8)
    return PIL.Image.fromarray(255 - scaled if tags.get(_TIFF_PHOTOMETRIC) == 0 else scaled)


def _to_srgb(pil_image: PILImage, profile: bytes | None) -> PILImage:
    """Convert an image to RGB by its colour profile; a damaged or unsuitable profile is ignored."""
    from PIL import ImageCms

    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            transform = srgb_transform(profile, pil_image.mode)
            if transform is not None and (converted := ImageCms.applyTransform(pil_image, transform)) is not None:
                return converted
    return pil_image.convert("RGB")
