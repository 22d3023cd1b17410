"""Encoded pictures without what their files say besides the pixels: place, time, camera, comments, hidden pictures.

The compressed pixels are copied, not decoded, so the result is the same bytes whatever library is installed. Knows
the containers of JPEG, PNG and WebP; whether a file of theirs decodes is `purld.data.images`' business.
"""

from __future__ import annotations

import re

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_WEBP_KEPT = (b"VP8 ", b"VP8L")
# Inside a scan, 0xff is followed by 0 or by a restart's number; any other byte there begins the next segment.
_SEGMENT = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
_SCAN, _END = 0xDA, 0xD9
_JFIF = b"\0\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"  # of version 1.1, square pixels, without a preview
_ADOBE = b"Adobe"  # says how colours are coded


def strip_metadata(data: bytes) -> bytes | None:
    """`data` with its pixels and what is needed to decode them; None if it is none of the three or malformed."""
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data.startswith(_PNG):
            return _png(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp(data)
    except ValueError:
        pass
    return None


def _jpeg(data: bytes) -> bytes:
    """The segments that decode the picture, up to the first end of image."""
    kept = [data[:2]]
    place = 2
    while True:
        found = _SEGMENT.match(data, place)
        if found is None:
            raise ValueError("there is no marker where a segment should begin")
        marker, start = data[found.end() - 1], found.end()
        if marker == _END:
            return b"".join([*kept, b"\xff\xd9"])
        end = start + int.from_bytes(data[start : start + 2])
        if marker == _SCAN:
            following = _SEGMENT.search(data, end)
            if following is None:
                raise ValueError("the scan has no end")
            end = following.start()
        if marker == 0xE0 and data[start + 2 : start + 7] == b"JFIF\0":
            kept.append(b"\xff\xe0" + _JFIF)
        elif not _tells(marker) or (marker == 0xEE and data[start + 2 : start + 7] == _ADOBE):
            kept.append(bytes((0xFF, marker)) + data[start:end])
        place = end


def _tells(marker: int) -> bool:
    """Whether a segment is an application's or a comment."""
    return 0xE0 <= marker <= 0xEF or marker == 0xFE


def _png(data: bytes) -> bytes:
    """The chunks that decode the still picture."""
    kept = [_PNG]
    place = len(_PNG)
    while True:
        length, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        end = place + 12 + length
        if end > len(data):
            raise ValueError("the chunk has no end")
        if kind in _PNG_KEPT:
            kept.append(data[place:end])
        if kind == b"IEND":
            return b"".join(kept)
        place = end


def _webp(data: bytes) -> bytes:
    """The simple form of the file: the chunk with the pixels alone."""
    place = 12
    while True:
        kind, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if not kind:
            raise ValueError("there is no chunk with pixels")
        end = place + 8 + length + length % 2
        if kind in _WEBP_KEPT:
            chunk = data[place : place + 8 + length] + b"\0" * (length % 2)
            return b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk
        place = end
