"""Remove metadata from encoded images: location, time, camera, comments and embedded images.

The compressed pixels are copied, not decoded, so the resulting bytes do not depend on installed libraries. Reads the
containers of JPEG, PNG and WebP; `purld.data.pil_images` checks that their pixels decode.
"""

from __future__ import annotations

import re

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_WEBP_KEPT = (b"VP8 ", b"VP8L")
# Inside a scan, 0xff is followed by 0 or by a restart number; any other byte starts the next segment.
_SEGMENT = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
_SCAN, _END = 0xDA, 0xD9
_JFIF = b"\0\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"  # version 1.1, square pixels, no preview
_ADOBE = b"Adobe"  # this segment names the colour coding, so it is needed to decode


def strip_metadata(data: bytes) -> bytes | None:
    """Return the image with only the parts needed to decode it; None if it has another format or is malformed."""
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
    """Return the segments needed to decode the image, up to the first end-of-image marker."""
    kept = [data[:2]]
    position = 2
    while True:
        segment = _SEGMENT.match(data, position)
        if segment is None:
            raise ValueError("there is no marker where a segment should begin")
        marker, start = data[segment.end() - 1], segment.end()
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
        elif not _is_metadata(marker) or (marker == 0xEE and data[start + 2 : start + 7] == _ADOBE):
            kept.append(bytes((0xFF, marker)) + data[start:end])
        position = end


def _is_metadata(marker: int) -> bool:
    """Return whether a segment is an application segment or a comment."""
    return 0xE0 <= marker <= 0xEF or marker == 0xFE


def _png(data: bytes) -> bytes:
    """Return the chunks needed to decode the still image."""
    kept = [_PNG]
    position = len(_PNG)
    while True:
        length, kind = int.from_bytes(data[position : position + 4]), data[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(data):
            raise ValueError("the chunk has no end")
        if kind in _PNG_KEPT:
            kept.append(data[position:end])
        if kind == b"IEND":
            return b"".join(kept)
        position = end


def _webp(data: bytes) -> bytes:
    """Return the simple form of the file, which holds only the chunk with the pixels."""
    position = 12
    while True:
        kind, length = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        if not kind:
            raise ValueError("there is no chunk with pixels")
        end = position + 8 + length + length % 2
        if kind in _WEBP_KEPT:
            chunk = data[position : position + 8 + length] + b"\0" * (length % 2)
            return b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk
        position = end
