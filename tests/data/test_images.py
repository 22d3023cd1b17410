"""Image files: reading, refusing, and converting for models."""

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
from image_factory import (
    RAMP,
    STILL_IMAGES,
    corner_brightness,
    encode_image,
    exif_block,
    linear_grey_profile,
    make_image,
    save_image,
    solid_image,
)
from PIL import Image, ImageCms

from purld.data.image_encoding import ImageBounds, encode_for_sending, make_thumbnail
from purld.data.images import ImageFolders, open_image, read_image
from purld.data.pil_images import MAX_PIXELS
from purld.errors import UserError

WIDE = ImageBounds(side=1536, size=3_500_000)


def shown(data: bytes) -> Image.Image:
    """Return the image that a model is shown for a file with these bytes."""
    return open_image(read_image(data, Path()))


@pytest.mark.parametrize("kind", STILL_IMAGES)
def test_every_kind_of_still_is_shown_as_it_looks(kind):
    image = read_image(STILL_IMAGES[kind](), Path())
    opened = open_image(image)
    assert (opened.mode, opened.size, image.size) == ("RGB", (24, 16), (24, 16))
    dark, bright = corner_brightness(opened)
    # 63,800 / 65,535 of white in 16 bits, about 190 + noise elsewhere; a clipped value would be white.
    expected = (0, 63_800 / 257) if "16 bits" in kind else corner_brightness(make_image())
    assert (dark, bright) == pytest.approx(expected, abs=12)


def test_sixteen_bits_are_scaled_and_not_cut_off():
    """Values are divided by 257: 0 is 0, 65,535 is 255, and 32,896 = 128 · 257 is 128."""
    values = np.array([[0, 128, 129, 32_896, 65_535]], np.uint16)
    opened = np.asarray(shown(encode_image(Image.fromarray(values))))[0, :, 0]
    assert opened.tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize(("mode", "form"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP")])
def test_what_is_transparent_is_white(mode, form):
    assert corner_brightness(shown(encode_image(solid_image((0, 0, 0, 0), mode), form))) == (255, 255)
    assert corner_brightness(shown(encode_image(solid_image((0, 0, 0, 128), mode), form))) == pytest.approx(
        (127, 127), abs=2
    )


def test_a_transparent_colour_of_a_palette_is_white():
    image = Image.new("P", (24, 16), 0)
    image.putpalette([0, 0, 0, 200, 200, 200])
    image.putpixel((23, 15), 1)
    assert corner_brightness(shown(encode_image(image, transparency=0))) == (255, 200)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("orientation", "upright"), [(1, (24, 16)), (3, (24, 16)), (6, (16, 24)), (8, (16, 24))])
def test_a_turned_photograph_is_upright_wherever_it_goes(form, orientation, upright):
    """Orientation 6 means a quarter turn clockwise: the upper left corner becomes the upper right one."""
    image = read_image(encode_image(make_image(), form, exif=exif_block(orientation)), Path())
    assert image.size == upright
    turned = make_image().rotate({1: 0, 3: 180, 6: 270, 8: 90}[orientation], expand=True)
    for opened in (
        open_image(image),
        Image.open(io.BytesIO(encode_for_sending(image, WIDE)[1])),
        Image.open(io.BytesIO(make_thumbnail(image, 96)[1])),
    ):
        assert opened.size == upright
        assert corner_brightness(opened) == pytest.approx(corner_brightness(turned), abs=12)


def test_a_colour_profile_is_followed_and_a_broken_one_is_passed_over():
    """In a linear colour space, half of full light is 188 on sRGB's scale, not 128."""
    linear = ImageCms.ImageCmsProfile(io.BytesIO(linear_grey_profile())).tobytes()
    grey = Image.new("L", (24, 16), 128)
    assert corner_brightness(shown(encode_image(grey, icc_profile=linear))) == pytest.approx((188, 188), abs=2)
    assert corner_brightness(shown(encode_image(grey, icc_profile=b"no profile"))) == (128, 128)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert corner_brightness(shown(encode_image(make_image(), icc_profile=srgb))) == corner_brightness(make_image())


UNUSABLE = {
    "empty": (b"", "is empty"),
    "a text": (b"hello", "is not an image in a supported format"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
    "SVG": (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "is a drawing in SVG"),
    "PDF": (b"%PDF-1.7", "is a PDF"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(40), "is in HEIC"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
    "floats": (encode_image(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "has the colour mode F"),
    "32 bits": (encode_image(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "has the colour mode I"),
    "too long": (encode_image(Image.new("L", (1, 201))), "is 1 x 201 pixels; models take no image with one side more"),
    **{
        f"animated {form}": (
            encode_image(make_image(), form, save_all=True, append_images=[make_image(seed=n) for n in (1, 2)]),
            "has 3 frames or pages; save the one",
        )
        for form in ("GIF", "WEBP", "PNG", "TIFF")
    },
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_is_no_picture_is_a_sentence(kind):
    data, words = UNUSABLE[kind]
    with pytest.raises(ValueError, match=f"^image 3 {words}"):
        read_image(data, Path(), "image 3")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_torn_file_is_found_wherever_it_is_torn(form, share):
    data = encode_image(make_image(200, 150), form)
    with pytest.raises(ValueError, match=r"^image 1 (is truncated|is not an image|is empty)"):
        read_image(data[: int(len(data) * share)], Path(), "image 1")


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_bomb_is_refused_by_its_header(side):
    """A header declares hundreds of millions of pixels; nothing is decoded."""
    data = bytearray(encode_image(Image.new("1", (8, 8))))
    data[16:24] = side.to_bytes(4) * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    assert side * side > MAX_PIXELS
    with pytest.raises(ValueError, match=r"^image 1 has .* pixels"):
        read_image(data, Path(), "image 1")


def test_one_pixel_is_a_picture():
    image = read_image(encode_image(Image.new("RGB", (1, 1), (255, 0, 0))), Path())
    assert open_image(image).getpixel((0, 0)) == (255, 0, 0)
    assert encode_for_sending(image, WIDE)[0] == make_thumbnail(image, 96)[0] == "image/png"


def test_the_content_says_what_a_file_is_and_not_its_name(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encode_image(make_image(), "JPEG"))
    image = read_image("picture.png", tmp_path)
    assert encode_for_sending(image, WIDE)[0] == "image/jpeg"


def test_every_way_to_name_a_picture_gives_the_same(tmp_path, monkeypatch):
    data = encode_image(make_image())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(data)
    cells = [
        "a.png", Path("a.png"), str(tmp_path / "sub" / "a.png"), data, bytearray(data), make_image(),
        {"bytes": data, "path": "elsewhere.png"}, {"bytes": None, "path": "a.png"}, {"path": "a.png"},
        "data:image/png;base64," + base64.b64encode(data).decode(),
    ]  # fmt: skip
    images = [read_image(cell, tmp_path / "sub") for cell in cells]
    assert len({image.digest for image in images}) == 1
    assert {open_image(image).tobytes() for image in images} == {make_image().tobytes()}
    monkeypatch.chdir(tmp_path / "sub")  # a file that is not next to the rows is read from the working directory
    assert read_image("a.png", tmp_path) == images[0]


def test_what_names_no_picture_is_a_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    for cell, words in [
        ("a.png", r"image 2 \(a\.png\) is missing"),
        ("link", r"image 2 \(link\) is missing"),
        ("pipe", r"image 2 \(pipe\) is not a regular file"),
        ("/dev/zero", r"image 2 \(/dev/zero\) leads out of the data's folder"),
        (".", r"image 2 \(\.\) is a folder"),
        ("x" * 5000, r"image 2 \(x{200}\) cannot be read \(File name too long\)"),
        ("https://example.org/a.png", r"image 2 is a web address .* purld does not download: save the file"),
        ("data:image/png,abc", "image 2 is a data URL that is not in base64"),
        ("data:image/png;base64,a", "image 2 is a data URL whose base64 is damaged"),
        ("", "image 2 has no valid path"),
        ("a\0b", "image 2 has no valid path"),
        (None, "image 2 is missing or null"),
        ({"bytes": "iVBORw0KGgo="}, "image 2 has bytes that are a text; write them as a data URL"),
        ({"bytes": None, "path": None}, "image 2 is missing or null"),
        (7, "image 2 is neither a path nor bytes"),
    ]:
        with pytest.raises(ValueError, match=f"^{words}"):
            read_image(cell, tmp_path, "image 2")


def test_a_path_leads_into_the_folder_of_the_data_or_the_one_that_is_named(tmp_path, monkeypatch):
    data, named, private = (tmp_path / name for name in ("data", "named", "private"))
    for folder in (data, named, private):
        folder.mkdir()
        save_image(folder / "a.png")
    (data / "file.png").symlink_to(private / "a.png")
    (data / "folder").symlink_to(private)
    (data / "photos").symlink_to(named)
    save_image(named / "b.png")
    monkeypatch.chdir(data)
    for cell in ("../private/a.png", str(private / "a.png"), "file.png", "folder/a.png", "../../../../../etc/none.png",
                 {"path": "../private/a.png"}, Path("../private/a.png")):  # fmt: skip
        for folders in (data, ImageFolders(data), ImageFolders(data, str(named))):
            with pytest.raises(
                ValueError, match=r"^image 2 \(.*\) leads out of the data's folder .*data\.image_folder"
            ):
                read_image(cell, folders, "image 2")
    for cell in ("b.png", "photos/b.png", "../named/b.png", str(named / "b.png")):
        assert read_image(cell, ImageFolders(data, "../named")).size == (24, 16)
    (tmp_path / "link").symlink_to(data)
    assert read_image("a.png", tmp_path / "link").size == (24, 16), "the folder itself may be a link"


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as handle:
        handle.truncate(10**12)  # a sparse file of a terabyte
    with pytest.raises(ValueError, match=r"image 1 \(a\.png\) has 1,000,000,000,000 bytes; at most 104,857,600"):
        read_image("a.png", tmp_path, "image 1")


def test_a_file_that_changes_or_goes_is_told_when_it_is_opened(tmp_path):
    path = save_image(tmp_path / "a.png")
    image = read_image("a.png", tmp_path)
    save_image(path, seed=1)
    for use in (open_image, lambda image: encode_for_sending(image, WIDE), lambda image: make_thumbnail(image, 96)):
        with pytest.raises(UserError, match=r"a\.png: the image has changed since"):
            use(image)
    assert read_image("a.png", tmp_path) != image
    path.unlink()
    with pytest.raises(UserError, match=r"a\.png: the image cannot be read any more \(No such file"):
        open_image(image)


@given(st.binary(max_size=40), st.integers(0, 2**16), st.sampled_from(sorted(STILL_IMAGES)))
def test_no_damaged_file_ends_in_a_traceback(junk, position, kind):
    data = STILL_IMAGES[kind]()
    position %= len(data)
    damaged = data[:position] + junk + data[position + len(junk) :]
    try:
        image = read_image(damaged, Path(), "image 1")
    except ValueError as problem:
        assert str(problem).startswith("image 1 ") and "\n" not in str(problem) and not str(problem).endswith(".")
    else:
        try:
            assert open_image(image).mode == "RGB"
            encode_for_sending(image, ImageBounds(64, 10_000))
        except UserError as problem:  # damage that decoding a JPEG at an eighth of its size does not detect
            assert str(problem).endswith(".")
