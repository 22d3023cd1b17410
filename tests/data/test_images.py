"""Picture files: what is read and how it looks, what is refused and why, and what of it leaves."""

from __future__ import annotations

import base64
import io
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_factory import corners, encoded, picture, save_picture
from PIL import Image, ImageCms

from purld.data.image_metadata import strip_metadata
from purld.data.images import (
    MAX_PIXELS,
    ImageBounds,
    bounded_size,
    encode_for_sending,
    make_thumbnail,
    open_image,
    read_image,
)
from purld.errors import UserError

WIDE = ImageBounds(side=1536, size=3_500_000)
RAMP = np.add.outer(np.arange(16) * 1800, np.arange(24) * 1600).astype(np.uint16)  # up to 63,800 of 65,535


def shown(data: bytes) -> Image.Image:
    """What a model is shown of a file with these bytes."""
    return open_image(read_image(data, Path()))


def exif(orientation: int = 1) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010E] = "patient 4711"
    tags.get_ifd(0x8825)[1] = "N"  # where it was taken
    return tags.tobytes()


def on(colour: tuple[int, int, int, int], mode: str = "RGBA") -> Image.Image:
    return Image.new("RGBA", (24, 16), colour).convert(mode)


STILL = {
    "JPEG": lambda: encoded(picture(), "JPEG"),
    "a progressive JPEG": lambda: encoded(picture(), "JPEG", progressive=True),
    "a JPEG with a preview": lambda: encoded(picture(), "MPO", save_all=True, append_images=[picture(8, 8)]),
    "a JPEG in CMYK": lambda: encoded(picture().convert("CMYK"), "JPEG"),
    "PNG": lambda: encoded(picture()),
    "a PNG with a palette": lambda: encoded(picture().quantize(64)),
    "a PNG of 16 bits": lambda: encoded(Image.fromarray(RAMP)),
    "a PGM of 16 bits": lambda: encoded(Image.fromarray(RAMP), "PPM"),
    "a TIFF of 16 bits": lambda: encoded(Image.fromarray(RAMP), "TIFF"),
    "a TIFF in CMYK": lambda: encoded(picture().convert("CMYK"), "TIFF"),
    "grey": lambda: encoded(picture().convert("L")),
    "GIF": lambda: encoded(picture(), "GIF"),
    "BMP": lambda: encoded(picture(), "BMP"),
    "WebP": lambda: encoded(picture(), "WEBP"),
    "JPEG 2000": lambda: encoded(picture(), "JPEG2000"),
}


@pytest.mark.parametrize("kind", STILL)
def test_every_kind_of_still_is_shown_as_it_looks(kind):
    image = read_image(STILL[kind](), Path())
    found = open_image(image)
    assert (found.mode, found.size, image.size) == ("RGB", (24, 16), (24, 16))
    dark, bright = corners(found)
    # 63,800 / 65,535 of white in 16 bits, about 190 + noise elsewhere; a value that is cut off would be white.
    expected = (0, 63_800 / 257) if "16 bits" in kind else corners(picture())
    assert (dark, bright) == pytest.approx(expected, abs=12)


def test_sixteen_bits_are_scaled_and_not_cut_off():
    """257 to a step: 0 is 0, 65,535 is 255, and 32,896 = 128 · 257 is 128."""
    values = np.array([[0, 128, 129, 32_896, 65_535]], np.uint16)
    found = np.asarray(shown(encoded(Image.fromarray(values))))[0, :, 0]
    assert found.tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize(("mode", "form"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP")])
def test_what_is_transparent_is_white(mode, form):
    assert corners(shown(encoded(on((0, 0, 0, 0), mode), form))) == (255, 255)
    assert corners(shown(encoded(on((0, 0, 0, 128), mode), form))) == pytest.approx((127, 127), abs=2)


def test_a_transparent_colour_of_a_palette_is_white():
    image = Image.new("P", (24, 16), 0)
    image.putpalette([0, 0, 0, 200, 200, 200])
    image.putpixel((23, 15), 1)
    assert corners(shown(encoded(image, transparency=0))) == (255, 200)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("orientation", "upright"), [(1, (24, 16)), (3, (24, 16)), (6, (16, 24)), (8, (16, 24))])
def test_a_turned_photograph_is_upright_wherever_it_goes(form, orientation, upright):
    """Orientation 6 means: turn a quarter clockwise. What was upper left is then upper right."""
    image = read_image(encoded(picture(), form, exif=exif(orientation)), Path())
    assert image.size == upright
    turned = picture().rotate({1: 0, 3: 180, 6: 270, 8: 90}[orientation], expand=True)
    for found in (
        open_image(image),
        Image.open(io.BytesIO(encode_for_sending(image, WIDE)[1])),
        Image.open(io.BytesIO(make_thumbnail(image, 96)[1])),
    ):
        assert found.size == upright
        assert corners(found) == pytest.approx(corners(turned), abs=12)


def test_a_colour_profile_is_followed_and_a_broken_one_is_passed_over():
    """In a linear space, half of full light is much brighter than half of sRGB's scale: 188, not 128."""
    linear = ImageCms.ImageCmsProfile(io.BytesIO(_linear_grey())).tobytes()
    grey = Image.new("L", (24, 16), 128)
    assert corners(shown(encoded(grey, icc_profile=linear))) == pytest.approx((188, 188), abs=2)
    assert corners(shown(encoded(grey, icc_profile=b"no profile"))) == (128, 128)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert corners(shown(encoded(picture(), icc_profile=srgb))) == corners(picture())


def _linear_grey() -> bytes:
    """A profile of grey whose values are proportional to light."""
    white = b"XYZ \0\0\0\0" + b"".join(int(v * 65536).to_bytes(4) for v in (0.9642, 1.0, 0.8249))
    curve = b"curv\0\0\0\0\0\0\0\0"  # without entries: the identity
    start = 128 + 4 + 2 * 12
    table = b"\0\0\0\2" + b"wtpt" + start.to_bytes(4) + len(white).to_bytes(4)
    table += b"kTRC" + (start + len(white)).to_bytes(4) + len(curve).to_bytes(4)
    size = start + len(white) + len(curve)
    head = size.to_bytes(4) + bytes(4) + b"\x02\x10\0\0" + b"mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28) + white[8:]
    return head.ljust(128, b"\0") + table + white + curve


NONE = {
    "empty": (b"", "is empty"),
    "a text": (b"hello", "is no picture in a format that is read"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
    "SVG": (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "is a drawing in SVG"),
    "PDF": (b"%PDF-1.7", "is a PDF"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(40), "is in HEIC"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no picture"),
    "floats": (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "has the colour mode F"),
    "32 bits": (encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "has the colour mode I"),
    "too long": (encoded(Image.new("L", (1, 201))), "is 1 x 201 pixels; models take no picture with one side more"),
    **{
        f"animated {form}": (
            encoded(picture(), form, save_all=True, append_images=[picture(seed=n) for n in (1, 2)]),
            "has 3 frames or pages; save the one",
        )
        for form in ("GIF", "WEBP", "PNG", "TIFF")
    },
}


@pytest.mark.parametrize("kind", NONE)
def test_what_is_no_picture_is_a_sentence(kind):
    data, words = NONE[kind]
    with pytest.raises(ValueError, match=f"^image 3 {words}"):
        read_image(data, Path(), "image 3")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_torn_file_is_found_wherever_it_is_torn(form, share):
    data = encoded(picture(200, 150), form)
    with pytest.raises(ValueError, match=r"^image 1 (is truncated|is no picture|is empty)"):
        read_image(data[: int(len(data) * share)], Path(), "image 1")


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_bomb_is_refused_by_its_header(side):
    """A header that promises hundreds of millions of pixels; nothing is unfolded."""
    data = bytearray(encoded(Image.new("1", (8, 8))))
    data[16:24] = side.to_bytes(4) * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    assert side * side > MAX_PIXELS
    with pytest.raises(ValueError, match=r"^image 1 has .* pixels"):
        read_image(data, Path(), "image 1")


def test_one_pixel_is_a_picture():
    image = read_image(encoded(Image.new("RGB", (1, 1), (255, 0, 0))), Path())
    assert open_image(image).getpixel((0, 0)) == (255, 0, 0)
    assert encode_for_sending(image, WIDE)[0] == make_thumbnail(image, 96)[0] == "image/png"


def test_the_content_says_what_a_file_is_and_not_its_name(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(picture(), "JPEG"))
    image = read_image("picture.png", tmp_path)
    assert encode_for_sending(image, WIDE)[0] == "image/jpeg"


def test_every_way_to_name_a_picture_gives_the_same(tmp_path, monkeypatch):
    data = encoded(picture())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(data)
    cells = [
        "a.png", Path("a.png"), str(tmp_path / "sub" / "a.png"), data, bytearray(data), picture(),
        {"bytes": data, "path": "elsewhere.png"}, {"bytes": None, "path": "a.png"}, {"path": "a.png"},
        "data:image/png;base64," + base64.b64encode(data).decode(),
    ]  # fmt: skip
    images = [read_image(cell, tmp_path / "sub") for cell in cells]
    assert len({image.digest for image in images}) == 1
    assert {open_image(image).tobytes() for image in images} == {picture().tobytes()}
    monkeypatch.chdir(tmp_path / "sub")  # where there is none beside the rows, the working directory counts
    assert read_image("a.png", tmp_path) == images[0]


def test_what_names_no_picture_is_a_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    for cell, words in [
        ("a.png", r"image 2 \(a\.png\) is missing"),
        ("link", r"image 2 \(link\) is missing"),
        ("pipe", r"image 2 \(pipe\) is no ordinary file"),
        ("/dev/zero", r"image 2 \(/dev/zero\) is no ordinary file"),
        (".", r"image 2 \(\.\) is a folder"),
        ("x" * 5000, r"image 2 \(x{200}\) cannot be read \(File name too long\)"),
        ("https://example.org/a.png", r"image 2 is an address .* purld fetches nothing: download it"),
        ("data:image/png,abc", "image 2 is a data URL that is not in base64"),
        ("data:image/png;base64,a", "image 2 is a data URL whose base64 is damaged"),
        ("", "image 2 has no path"),
        ("a\0b", "image 2 has no path"),
        (None, "image 2 is missing or null"),
        ({"bytes": "iVBORw0KGgo="}, "image 2 has bytes that are a text; write them as a data URL"),
        ({"bytes": None, "path": None}, "image 2 is missing or null"),
        (7, "image 2 is no path and no bytes"),
    ]:
        with pytest.raises(ValueError, match=f"^{words}"):
            read_image(cell, tmp_path, "image 2")


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as handle:
        handle.truncate(10**12)  # a terabyte that takes no room
    with pytest.raises(ValueError, match=r"image 1 \(a\.png\) has 1,000,000,000,000 bytes; at most 104,857,600"):
        read_image("a.png", tmp_path, "image 1")


def test_a_file_that_changes_or_goes_is_told_when_it_is_opened(tmp_path):
    path = save_picture(tmp_path / "a.png")
    image = read_image("a.png", tmp_path)
    save_picture(path, seed=1)
    for use in (open_image, lambda image: encode_for_sending(image, WIDE), lambda image: make_thumbnail(image, 96)):
        with pytest.raises(UserError, match=r"a\.png: the image has changed since"):
            use(image)
    assert read_image("a.png", tmp_path) != image
    path.unlink()
    with pytest.raises(UserError, match=r"a\.png: the image cannot be read any more \(No such file"):
        open_image(image)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {"comment": b"patient 4711"}),
        ("JPEG", {"progressive": True}),
        ("PNG", {"pnginfo": True}),
        ("WEBP", {"xmp": b"<x>patient 4711</x>"}),
        ("WEBP", {"lossless": True}),
        ("MPO", {"save_all": True, "append_images": [picture(8, 8, seed=5)]}),
    ],
)
def test_what_leaves_is_the_users_own_pixels_and_nothing_else_of_the_file(form, options):
    if "pnginfo" in options:
        from PIL.PngImagePlugin import PngInfo

        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_text("Comment", "patient 4711")
    data = encoded(picture(200, 150), form, exif=exif(), **options) + b"patient 4711, in a video behind the picture"
    image = read_image(data, Path())
    assert b"patient 4711" in data
    mime, sent = encode_for_sending(image, WIDE)
    assert mime == {"JPEG": "image/jpeg", "MPO": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}[form]
    assert b"4711" not in sent and b"Exif" not in sent and b"EXIF" not in sent
    assert Image.open(io.BytesIO(sent)).convert("RGB").tobytes() == open_image(image).tobytes()
    assert dict(Image.open(io.BytesIO(sent)).getexif()) == {}
    assert strip_metadata(sent) == sent


@given(st.binary(max_size=60), st.integers(0, 2**16), st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_damaged_containers_end_in_bytes_or_in_none(junk, place, form):
    data = encoded(picture(), form, exif=exif())
    place %= len(data)
    assert isinstance(strip_metadata(data[:place] + junk + data[place + len(junk) :]), bytes | None)


@given(st.binary(max_size=40), st.integers(0, 2**16), st.sampled_from(sorted(STILL)))
def test_no_damaged_file_ends_in_a_traceback(junk, place, kind):
    data = STILL[kind]()
    place %= len(data)
    damaged = data[:place] + junk + data[place + len(junk) :]
    try:
        image = read_image(damaged, Path(), "image 1")
    except ValueError as problem:
        assert str(problem).startswith("image 1 ") and "\n" not in str(problem) and not str(problem).endswith(".")
    else:
        try:
            assert open_image(image).mode == "RGB"
            encode_for_sending(image, ImageBounds(64, 10_000))
        except UserError as problem:  # damage that a JPEG's coarse check does not see
            assert str(problem).endswith(".")


def test_a_large_picture_leaves_within_its_bounds_and_always_as_the_same_bytes():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 900, 3), np.uint8))
    for form in ("JPEG", "PNG"):
        image = read_image(encoded(noise, form), Path())
        mime, data = encode_for_sending(image, ImageBounds(300, 3_500_000))
        assert Image.open(io.BytesIO(data)).size == (300, 200) == bounded_size(image.size, 300)
        assert mime == f"image/{form.lower()}"
        assert (mime, data) == encode_for_sending(image, ImageBounds(300, 3_500_000))
        mime, data = encode_for_sending(
            image, ImageBounds(900, 20_000)
        )  # noise does not compress: it has to be made smaller
        assert mime == "image/jpeg" and len(data) <= 20_000
        width, height = Image.open(io.BytesIO(data)).size
        assert width < 900 and width / height == pytest.approx(1.5, rel=0.02)


def test_a_picture_whose_file_means_something_else_is_encoded_anew():
    """Transparency, 16 bits, CMYK and other formats: what leaves is what the student is shown."""
    for data in (
        encoded(on((0, 0, 0, 128))),
        STILL["a PNG of 16 bits"](),
        STILL["a JPEG in CMYK"](),
        STILL["BMP"](),
        encoded(Image.new("L", (24, 16), 128), icc_profile=_linear_grey()),
    ):
        image = read_image(data, Path())
        sent = Image.open(io.BytesIO(encode_for_sending(image, WIDE)[1]))
        assert sent.mode == "RGB" and sent.info.get("icc_profile") is None
        assert corners(sent) == pytest.approx(corners(open_image(image)), abs=4)


def test_thumbnails_are_small_and_pixel_art_is_kept():
    photo = read_image(encoded(picture(1200, 800), "JPEG"), Path())
    mime, data = make_thumbnail(photo, 384)
    assert Image.open(io.BytesIO(data)).size == (384, 256) and len(data) < 40_000
    art = read_image(encoded(picture(96, 64)), Path())
    mime, data = make_thumbnail(art, 384)
    assert mime == "image/png"
    assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == picture(96, 64).tobytes()
