"""Encoding images for sending and for thumbnails, and removing metadata."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_factory import (
    STILL_IMAGES,
    corner_brightness,
    encode_image,
    exif_block,
    linear_grey_profile,
    make_image,
    solid_image,
)
from PIL import Image

from purld.data.image_encoding import ImageBounds, bounded_size, encode_for_sending, make_thumbnail
from purld.data.image_metadata import strip_metadata
from purld.data.images import open_image, read_image

WIDE = ImageBounds(side=1536, size=3_500_000)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {"comment": b"patient 4711"}),
        ("JPEG", {"progressive": True}),
        ("PNG", {"pnginfo": True}),
        ("WEBP", {"xmp": b"<x>patient 4711</x>"}),
        ("WEBP", {"lossless": True}),
        ("MPO", {"save_all": True, "append_images": [make_image(8, 8, seed=5)]}),
    ],
)
def test_what_leaves_is_the_users_own_pixels_and_nothing_else_of_the_file(form, options):
    if "pnginfo" in options:
        from PIL.PngImagePlugin import PngInfo

        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_text("Comment", "patient 4711")
    data = (
        encode_image(make_image(200, 150), form, exif=exif_block(), **options)
        + b"patient 4711, in a video behind the picture"
    )
    image = read_image(data, Path())
    assert b"patient 4711" in data
    mime, sent = encode_for_sending(image, WIDE)
    assert mime == {"JPEG": "image/jpeg", "MPO": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}[form]
    assert b"4711" not in sent and b"Exif" not in sent and b"EXIF" not in sent
    assert Image.open(io.BytesIO(sent)).convert("RGB").tobytes() == open_image(image).tobytes()
    assert dict(Image.open(io.BytesIO(sent)).getexif()) == {}
    assert strip_metadata(sent) == sent


@given(st.binary(max_size=60), st.integers(0, 2**16), st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_damaged_containers_end_in_bytes_or_in_none(junk, position, form):
    data = encode_image(make_image(), form, exif=exif_block())
    position %= len(data)
    assert isinstance(strip_metadata(data[:position] + junk + data[position + len(junk) :]), bytes | None)


def test_a_large_picture_leaves_within_its_bounds_and_always_as_the_same_bytes():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 900, 3), np.uint8))
    for form in ("JPEG", "PNG"):
        image = read_image(encode_image(noise, form), Path())
        mime, data = encode_for_sending(image, ImageBounds(300, 3_500_000))
        assert Image.open(io.BytesIO(data)).size == (300, 200) == bounded_size(image.size, 300)
        assert mime == f"image/{form.lower()}"
        assert (mime, data) == encode_for_sending(image, ImageBounds(300, 3_500_000))
        # Noise does not compress, so it must be scaled down.
        mime, data = encode_for_sending(image, ImageBounds(900, 20_000))
        assert mime == "image/jpeg" and len(data) <= 20_000
        width, height = Image.open(io.BytesIO(data)).size
        assert width < 900 and width / height == pytest.approx(1.5, rel=0.02)


def test_a_picture_whose_file_means_something_else_is_encoded_anew():
    """With transparency, 16 bits, CMYK and other formats, the endpoint gets the same image as the student."""
    for data in (
        encode_image(solid_image((0, 0, 0, 128))),
        STILL_IMAGES["a PNG of 16 bits"](),
        STILL_IMAGES["a JPEG in CMYK"](),
        STILL_IMAGES["BMP"](),
        encode_image(Image.new("L", (24, 16), 128), icc_profile=linear_grey_profile()),
    ):
        image = read_image(data, Path())
        sent = Image.open(io.BytesIO(encode_for_sending(image, WIDE)[1]))
        assert sent.mode == "RGB" and sent.info.get("icc_profile") is None
        assert corner_brightness(sent) == pytest.approx(corner_brightness(open_image(image)), abs=4)


def test_thumbnails_are_small_and_pixel_art_is_kept():
    photo = read_image(encode_image(make_image(1200, 800), "JPEG"), Path())
    mime, data = make_thumbnail(photo, 384)
    assert Image.open(io.BytesIO(data)).size == (384, 256) and len(data) < 40_000
    art = read_image(encode_image(make_image(96, 64)), Path())
    mime, data = make_thumbnail(art, 384)
    assert mime == "image/png"
    assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == make_image(96, 64).tobytes()
