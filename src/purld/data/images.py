"""Picture files that users bring: checked once when they are read, opened for models, encoded for sending and showing.

What is inside a file counts, never its name. A picture is what a viewer shows of it: upright, on white where it is
transparent, in sRGB, eight bits a channel. What is no single picture of usable size is refused by a ValueError
whose text ends a sentence. Nothing is fetched, and no text of a file is trusted.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import hashlib
import io
import logging
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from purld.data.image_metadata import strip_metadata
from purld.errors import UserError
from purld.records import Image

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from PIL.ImageCms import ImageCmsTransform
    from PIL.ImageFile import ImageFile

MAX_PIXELS = 80_000_000  # decoded, 240 MB; below the count from which Pillow itself begins to warn
MAX_BYTES = 100 * 2**20  # of one file
MAX_ASPECT = 200  # of the longer to the shorter side; Qwen-VL's image processors take no more
PIXEL_ART = 96  # a picture whose sides are no longer than this is shown and kept pixel by pixel

# Of the formats that Pillow reads, those that are pictures and nothing but pictures: it hands PostScript to another
# program, and takes any file for a TGA.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF")
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_ORIENTATION = 0x0112  # the EXIF tag
_WIDER = (5, 6, 7, 8)  # its values that turn a picture by a quarter
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262
_QUALITIES = (90, 80, 70)  # of JPEG, until the picture is small enough
_JPEG: Mapping[str, Any] = {"format": "JPEG", "subsampling": 0}  # Pillow's `optimize` fails on noise


class _UnusableError(ValueError):
    """What is wrong with a picture, as the end of a sentence."""


@dataclass(frozen=True)
class ImageBounds:
    """How large a picture may be where it is sent: `side` in pixels, the longer one, and `size` in bytes."""

    side: int
    size: int


def read_image(cell: object, folder: Path, name: str = "the image") -> Image:
    """The picture in a cell: a path, a data URL, bytes, an object with `bytes` or `path`, or a PIL image.

    The whole file is decoded once, a JPEG at an eighth of its size, so that a torn one is found now.

    Args:
        cell: what the row holds.
        folder: what paths are relative to; else to the folder that purld was started in.
        name: what to call the picture where something is wrong with it.

    Raises:
        ValueError: begins with `name`, says what is wrong, and ends a sentence that has no full stop yet.
    """
    if isinstance(cell, Mapping):
        held = cell.get("bytes")
        if isinstance(held, str):
            raise ValueError(f"{name} has bytes that are a text; write them as a data URL")
        cell = cell.get("path") if held is None else held
    if isinstance(cell, bytes | bytearray | memoryview):
        return _from_bytes(bytes(cell), name)
    if isinstance(cell, str | os.PathLike):
        text = os.fspath(cell)
        if not isinstance(text, str) or not text or "\0" in text:
            raise ValueError(f"{name} has no path that a file can have")
        if text.startswith("data:"):
            return _from_bytes(_data_url(text, name), name)
        if "://" in text[:12]:
            raise ValueError(
                f"{name} is an address ({text[:80]}); purld fetches nothing: download it and give its path"
            )
        return _from_file(_found(text, folder), f"{name} ({text[:200]})")
    if _is_picture(cell):
        return _from_bytes(_as_png(cell, name), name)
    raise ValueError(f"{name} is {'missing or null' if cell is None else 'no path and no bytes'}")


def open_image(image: Image) -> Picture:
    """The picture in RGB, upright.

    Raises:
        UserError: its file is gone, or is another one than was read.
    """
    with _reopening(image):
        return _converted(_decoder(_read(image)))


def encode_for_sending(image: Image, bounds: ImageBounds) -> tuple[str, bytes]:
    """The picture as it leaves this machine: its MIME type and its bytes, within `bounds` and without metadata.

    A file that every model understands and that is within bounds keeps its compressed pixels, so that its bytes do
    not depend on a library's version. Anything else is encoded anew.

    Raises:
        UserError: its file is gone, or is another one than was read.
    """
    with _reopening(image):
        data = _read(image)
        picture = _decoder(data)
        if max(picture.size) <= bounds.side and _is_plain(picture, data):
            stripped = strip_metadata(data)
            if stripped is not None and len(stripped) <= bounds.size:
                return f"image/{'jpeg' if picture.format == 'MPO' else str(picture.format).lower()}", stripped
        return _encoded(_scaled(picture, bounds.side), bounds.size, picture.format in _LOSSY)


def bounded_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The (width, height) that a picture of `size` has at most once its longer side is no longer than `side`."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def make_thumbnail(image: Image, side: int) -> tuple[str, bytes]:
    """The picture no larger than `side`, for a page: its MIME type and its bytes.

    Raises:
        UserError: its file is gone, or is another one than was read.
    """
    with _reopening(image):
        picture = _decoder(_read(image))
        small = _scaled(picture, side)
    if max(image.size) <= PIXEL_ART:
        return "image/png", _save(small, format="PNG", optimize=True)
    jpeg = _save(small, format="JPEG", quality=78)
    if picture.format not in _LOSSY and len(png := _save(small, format="PNG")) <= len(jpeg):
        return "image/png", png
    return "image/jpeg", jpeg


def _data_url(text: str, name: str) -> bytes:
    head, comma, body = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(f"{name} is a data URL that is not in base64")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name} is a data URL whose base64 is damaged") from None


def _found(text: str, folder: Path) -> Path:
    """Where the file is: in the folder, or only where purld was started."""
    beside = folder / text
    return beside if os.path.exists(beside) or not os.path.exists(text) else Path(text)


def _from_file(path: Path, name: str) -> Image:
    try:
        found = path.stat()
    except FileNotFoundError:
        raise ValueError(f"{name} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read ({_reason(error)})") from None
    if stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{name} is a folder")
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
        raise ValueError(f"{name} is no ordinary file")
    try:
        digest, size = _of_file(path.absolute(), found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({_reason(error)})") from None
    except _UnusableError as problem:
        raise ValueError(f"{name} {problem}") from None
    return Image(digest, size, path=str(path))


@functools.lru_cache(maxsize=100_000)  # several questions about one picture are common
def _of_file(path: Path, size: int, changed: int) -> tuple[str, tuple[int, int]]:
    """Digest and upright size of a file, whose own size and time of change tell one version from another."""
    if size > MAX_BYTES:
        raise _UnusableError(f"has {size:,} bytes; at most {MAX_BYTES:,} are accepted")
    data = path.read_bytes()
    return _digest(data), _measured(data)


def _from_bytes(data: bytes, name: str) -> Image:
    try:
        if len(data) > MAX_BYTES:
            raise _UnusableError(f"has {len(data):,} bytes; at most {MAX_BYTES:,} are accepted")
        return Image(_digest(data), _measured(data), data=data)
    except _UnusableError as problem:
        raise ValueError(f"{name} {problem}") from None


def _is_picture(cell: object) -> bool:
    from PIL.Image import Image as Picture

    return isinstance(cell, Picture)


def _as_png(picture: Any, name: str) -> bytes:
    try:
        _check_shape(picture)
        return _save(_converted(picture), format="PNG")
    except _UnusableError as problem:
        raise ValueError(f"{name} {problem}") from None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _measured(data: bytes) -> tuple[int, int]:
    """The upright (width, height) of an encoded picture that decodes to its end."""
    picture = _decoder(data)
    width, height = picture.size
    _check_mode(picture)
    with _decoding():
        picture.draft(None, (max(1, width // 8), max(1, height // 8)))
        picture.load()
        turned = _orientation(picture) in _WIDER
    return (height, width) if turned else (width, height)


def _decoder(data: bytes) -> ImageFile:
    """The picture of an encoded file with only its header read, if it is one of usable size."""
    import PIL.Image
    from PIL import UnidentifiedImageError

    if not data:
        raise _UnusableError("is empty")
    with _decoding():
        try:
            picture = PIL.Image.open(io.BytesIO(data), formats=_formats())
        except PIL.Image.DecompressionBombError:
            raise _UnusableError(f"has more than {MAX_PIXELS:,} pixels; scale it down") from None
        except UnidentifiedImageError:
            raise _UnusableError(_what_else(data)) from None
        _check_shape(picture)
        # MPO is a camera's photograph with others behind it, such as its preview.
        if picture.format != "MPO" and getattr(picture, "is_animated", False):
            frames = getattr(picture, "n_frames", "several")
            raise _UnusableError(f"has {frames} frames or pages; save the one that is meant as a picture of its own")
    return picture


def _check_shape(picture: Picture) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise _UnusableError(f"has {width:,} x {height:,} pixels; at most {MAX_PIXELS:,} are accepted: scale it down")
    if min(width, height) < 1:
        raise _UnusableError("has no pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _UnusableError(
            f"is {width:,} x {height:,} pixels; models take no picture with one side more than {MAX_ASPECT} times "
            "the other"
        )


def _check_mode(picture: Picture) -> None:
    if picture.mode not in _MODES and not _is_deep(picture):
        raise _UnusableError(f"has the colour mode {picture.mode}, whose range is not known; save it as RGB or grey")


def _is_deep(picture: Picture) -> bool:
    """Whether it is grey in 16 bits; a PNG or PGM in Pillow's mode of 32 bits is, too."""
    return picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that Pillow was built with; its warnings are silenced on the way.

    What it warns of or logs (odd tags, sizes) is checked here or of no consequence.
    """
    import PIL.Image

    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    PIL.Image.init()
    return tuple(name for name in _FORMATS if name in PIL.Image.OPEN)


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Turns what Pillow raises on a damaged file into one error; its parsers' own have no common base."""
    try:
        yield
    except _UnusableError:
        raise
    except Exception as error:
        torn = "truncated" in str(error).lower()
        raise _UnusableError("is truncated" if torn else f"is truncated or damaged ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:100] or type(error).__name__


def _what_else(data: bytes) -> str:
    """What a file is that no decoder takes."""
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"\xff\xd8\xff", b"\x89png", b"gif8", b"riff", b"bm", b"ii*\0", b"mm\0*")):
        return "is truncated or damaged"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "is truncated or damaged, or in AVIF, which this Pillow does not read"
    if b"<svg" in head:
        return "is a drawing in SVG; convert it to PNG"
    if head.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<script")):
        return "is a web page, which failed downloads leave, and no picture"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"mif1", b"msf1", b"hevc"):
        return "is in HEIC, which is not read; convert it to JPEG or PNG"
    if head.startswith(b"%pdf"):
        return "is a PDF; save the page that is meant as a picture"
    return "is no picture in a format that is read (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PNM)"


def _read(image: Image) -> bytes:
    """The encoded bytes, if they are still those that were checked."""
    if image.data is not None:
        return image.data
    try:
        data = Path(image.path or "").read_bytes()
    except OSError as error:
        raise UserError(f"{image.path}: the image cannot be read any more ({_reason(error)}).") from None
    if _digest(data) != image.digest:
        raise UserError(f"{image.path}: the image has changed since the prompts were read; start the command again.")
    return data


@contextlib.contextmanager
def _reopening(image: Image) -> Iterator[None]:
    """Names the file where a picture that was checked cannot be used after all."""
    try:
        yield
    except _UnusableError as problem:
        raise UserError(f"{image.path or 'an image'}: {problem}.") from None


def _converted(picture: Picture) -> Picture:
    """A picture in RGB and upright, as a viewer shows it.

    Raises:
        _UnusableError: it cannot be decoded, or its colours have no known range.
    """
    from PIL.Image import Transpose

    _check_mode(picture)
    with _decoding():
        picture.load()
        turn = {
            2: Transpose.FLIP_LEFT_RIGHT,
            3: Transpose.ROTATE_180,
            4: Transpose.FLIP_TOP_BOTTOM,
            5: Transpose.TRANSPOSE,
            6: Transpose.ROTATE_270,
            7: Transpose.TRANSVERSE,
            8: Transpose.ROTATE_90,
        }.get(_orientation(picture))
        flat = _srgb(_opaque(picture), picture.info.get("icc_profile"))
        return flat.transpose(turn) if turn is not None else flat


def _orientation(picture: Picture) -> int:
    """The EXIF orientation, 1 if there is none; what is no EXIF turns nothing."""
    try:
        found = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # what a damaged block makes Pillow's parser raise
        return 1
    return found if isinstance(found, int) else 1


def _opaque(picture: Picture) -> Picture:
    """The picture in L, RGB or CMYK, on white where it is transparent."""
    import PIL.Image

    if _is_deep(picture):
        return _eight_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, picture).convert("RGB")
    if picture.mode == "1":
        return picture.convert("L")
    return picture if picture.mode in ("L", "RGB", "CMYK") else picture.convert("RGB")


def _eight_bits(picture: Picture) -> Picture:
    """Grey of 16 bits in 8, its range scaled; Pillow's own conversion would cut off what is above 255."""
    import PIL.Image

    values = np.asarray(picture).astype(np.uint32)
    tags = getattr(picture, "tag_v2", {})
    highest = 2 ** int(tags.get(_TIFF_BITS, (16,))[0]) - 1
    scaled = np.minimum((values * 255 + highest // 2) // highest, 255).astype(np.uint8)
    return PIL.Image.fromarray(255 - scaled if tags.get(_TIFF_PHOTOMETRIC) == 0 else scaled)


def _srgb(picture: Picture, profile: bytes | None) -> Picture:
    """The picture in RGB by its colour profile; one that is damaged or of other colours is passed over."""
    from PIL import ImageCms

    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            transform = _transform(profile, picture.mode)
            if transform is not None and (converted := ImageCms.applyTransform(picture, transform)) is not None:
                return converted
    return picture.convert("RGB")


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCmsTransform | None:
    """From a profile's colours to sRGB; None where they are sRGB already."""
    from PIL import ImageCms

    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
        return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def _is_plain(picture: ImageFile, data: bytes) -> bool:
    """Whether every model sees in the file's own pixels what `open_image` shows of it."""
    if picture.format not in ("JPEG", "MPO", "PNG", "WEBP") or picture.mode not in ("L", "RGB", "P"):
        return False
    if picture.has_transparency_data or (picture.format == "PNG" and data[24] > 8):  # more than 8 bits a channel
        return False
    profile = picture.info.get("icc_profile")
    if profile and (picture.mode != "RGB" or _transform_or_none(profile) is not None):
        return False
    return _orientation(picture) == 1


def _transform_or_none(profile: bytes) -> ImageCmsTransform | None:
    try:
        return _transform(profile, "RGB")
    except Exception:  # a damaged profile changes nothing
        return None


def _scaled(picture: ImageFile, side: int) -> Picture:
    """The picture in RGB and upright, no larger than `side`."""
    from PIL.Image import Resampling

    target = bounded_size(picture.size, side)
    if target != picture.size:
        picture.draft(None, target)  # a JPEG is decoded no larger than needed
    flat = _converted(picture)
    if _orientation(picture) in _WIDER:
        target = target[1], target[0]
    return flat if max(flat.size) <= side else flat.resize(target, Resampling.LANCZOS)


def _encoded(picture: Picture, limit: int, lossy: bool) -> tuple[str, bytes]:
    """The picture in so many bytes at most: a PNG, else a JPEG of falling quality, else smaller still."""
    if not lossy and len(data := _save(picture, format="PNG", optimize=True)) <= limit:
        return "image/png", data
    while True:
        for quality in _QUALITIES:
            data = _save(picture, **_JPEG, quality=quality)
            if len(data) <= limit:
                return "image/jpeg", data
        picture = picture.resize(bounded_size(picture.size, max(1, max(picture.size) * 3 // 4)))


def _save(picture: Picture, **options: Any) -> bytes:
    target = io.BytesIO()
    picture.info.clear()  # Pillow writes some of it
    picture.save(target, **options)
    return target.getvalue()
