"""Read the images that users bring, check them once, and open them for models.

A file that is not one image of usable size is refused with a ValueError whose text ends a sentence. Nothing is
downloaded. Encoding for sending is in `purld.data.image_encoding`.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from purld.data.pil_images import (
    UnusableImageError,
    check_shape,
    convert_to_rgb,
    measure_upright_size,
    open_encoded,
    save_to_bytes,
    short_error,
)
from purld.errors import UserError
from purld.records import Image

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

MAX_BYTES = 100 * 2**20  # of one file


class ImageFolders:
    """The folders that the images of a file may lie in.

    A file of rows comes from anywhere, and a path in it could send any image of this machine to a remote model. So a
    path must lead into the folder of the file or into the one that the configuration names, symbolic links resolved;
    a relative one may also lead into the working directory.

    Args:
        folder: the folder of the file.
        named: the folder that `image_folder` names, if any.
    """

    def __init__(self, folder: Path, named: str | None = None) -> None:
        self._folders = (folder, Path(named)) if named is not None else (folder,)
        self._roots = [os.path.realpath(root) for root in self._folders]
        self._named = named

    def resolve(self, text: str, name: str) -> Path:
        """Return the file that a path names, or the place in the first folder where it is missing.

        Raises:
            ValueError: the path leads out of the folders; the message starts with `name`.
        """
        candidates = [(folder / text, self._roots) for folder in self._folders]
        if not os.path.isabs(text):
            candidates.append((Path(text), [os.path.realpath("")]))
        existing = [(path, roots) for path, roots in candidates if os.path.lexists(path)]
        for path, roots in existing or candidates[:1]:
            if any(_is_within(path, root) for root in roots):
                return path
        where = f"data.image_folder ({self._named})" if self._named is not None else "data.image_folder"
        raise ValueError(
            f"{name} leads out of the data's folder {self._folders[0]}; move the image there, or name its folder by "
            f"{where}"
        )


def read_image(cell: object, folder: Path | ImageFolders, name: str = "the image") -> Image:
    """Read and check the image in a cell: a path, a data URL, bytes, an object with `bytes` or `path`, or a PIL image.

    The whole file is decoded once, so that a truncated one is refused here and not during training.

    Args:
        cell: the cell of the row.
        folder: paths are relative to this folder, or else to the working directory, and lead nowhere else.
        name: how error messages name the image.

    Raises:
        ValueError: the image cannot be used; the message starts with `name` and has no full stop.
    """
    if isinstance(cell, Mapping):
        stored = cell.get("bytes")
        if isinstance(stored, str):
            raise ValueError(f"{name} has bytes that are a text; write them as a data URL")
        cell = cell.get("path") if stored is None else stored
    if isinstance(cell, bytes | bytearray | memoryview):
        return _image_from_bytes(bytes(cell), name)
    if isinstance(cell, str | os.PathLike):
        text = os.fspath(cell)
        if not isinstance(text, str) or not text or "\0" in text:
            raise ValueError(f"{name} has no valid path")
        if text.startswith("data:"):
            return _image_from_bytes(_decode_data_url(text, name), name)
        if "://" in text[:12]:
            raise ValueError(
                f"{name} is a web address ({text[:80]}); purld does not download: save the file and give its path"
            )
        folders = folder if isinstance(folder, ImageFolders) else ImageFolders(folder)
        described = f"{name} ({text[:200]})"
        return _image_from_file(folders.resolve(text, described), described)
    if _is_pil_image(cell):
        return _image_from_bytes(_encode_as_png(cell, name), name)
    raise ValueError(f"{name} is {'missing or null' if cell is None else 'neither a path nor bytes'}")


def open_image(image: Image) -> PILImage:
    """Open an image in upright RGB.

    Raises:
        UserError: the image's file is missing or has changed since it was read.
    """
    with unusable_as_user_error(image):
        return convert_to_rgb(open_encoded(read_encoded(image)))


def read_encoded(image: Image) -> bytes:
    """Return the encoded bytes of an image that was checked before.

    Raises:
        UserError: the image's file is missing or has changed since it was read.
    """
    if image.data is not None:
        return image.data
    try:
        data = Path(image.path or "").read_bytes()
    except OSError as error:
        raise UserError(f"{image.path}: the image cannot be read any more ({short_error(error)}).") from None
    if _hash_bytes(data) != image.digest:
        raise UserError(f"{image.path}: the image has changed since the prompts were read; start the command again.")
    return data


@contextlib.contextmanager
def unusable_as_user_error(image: Image) -> Iterator[None]:
    """Convert UnusableImageError to a UserError that names the image's file."""
    try:
        yield
    except UnusableImageError as problem:
        raise UserError(f"{image.path or 'an image'}: {problem}.") from None


def _decode_data_url(text: str, name: str) -> bytes:
    header, comma, body = text.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ValueError(f"{name} is a data URL that is not in base64")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name} is a data URL whose base64 is damaged") from None


def _is_within(path: Path, root: str) -> bool:
    real = os.path.realpath(path)
    return real == root or real.startswith(root.rstrip(os.sep) + os.sep)


def _image_from_file(path: Path, name: str) -> Image:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ValueError(f"{name} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read ({short_error(error)})") from None
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{name} is a folder")
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
        raise ValueError(f"{name} is not a regular file")
    try:
        digest, size = _check_file(path.absolute(), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({short_error(error)})") from None
    except UnusableImageError as problem:
        raise ValueError(f"{name} {problem}") from None
    return Image(digest, size, path=str(path))


@functools.lru_cache(maxsize=100_000)  # several prompts often share one image
def _check_file(path: Path, byte_count: int, modified: int) -> tuple[str, tuple[int, int]]:
    """Return the digest and upright size of a file; its byte count and modification time are part of the cache key."""
    if byte_count > MAX_BYTES:
        raise UnusableImageError(f"has {byte_count:,} bytes; at most {MAX_BYTES:,} are accepted")
    data = path.read_bytes()
    return _hash_bytes(data), measure_upright_size(data)


def _image_from_bytes(data: bytes, name: str) -> Image:
    try:
        if len(data) > MAX_BYTES:
            raise UnusableImageError(f"has {len(data):,} bytes; at most {MAX_BYTES:,} are accepted")
        return Image(_hash_bytes(data), measure_upright_size(data), data=data)
    except UnusableImageError as problem:
        raise ValueError(f"{name} {problem}") from None


def _is_pil_image(cell: object) -> TypeGuard[PILImage]:
    from PIL.Image import Image as PILImage

    return isinstance(cell, PILImage)


def _encode_as_png(pil_image: PILImage, name: str) -> bytes:
    try:
        check_shape(pil_image)
        return save_to_bytes(convert_to_rgb(pil_image), format="PNG")
    except UnusableImageError as problem:
        raise ValueError(f"{name} {problem}") from None


def _hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
