"""Thumbnails of the images in a run's rows."""

import io

import pytest
from image_factory import encode_image, make_image, save_image
from PIL import Image

from purld.data.images import read_image
from purld.errors import UserError
from purld.records import IMAGE, Prompt
from purld.runs.thumbnails import SIDE, prompt_fields, thumbnail_folder


def test_a_row_refers_to_small_copies_that_outlive_the_pictures(tmp_path):
    path = tmp_path / "large.jpg"
    make_image(1200, 800).save(path)
    large, small = read_image("large.jpg", tmp_path), read_image(encode_image(make_image()), tmp_path)
    prompt = Prompt.from_text(f"{IMAGE}Is it like {IMAGE}?", images=(large, small))
    rows = tmp_path / "run" / "generations" / "sft.jsonl"
    assert prompt_fields(prompt, rows) == {"prompt": prompt.question, "images": [large.digest, small.digest]}
    kept = {file.stem: file for file in thumbnail_folder(rows).iterdir()}
    assert set(kept) == {large.digest, small.digest}
    assert Image.open(kept[large.digest]).size == (SIDE, SIDE * 2 // 3)
    assert Image.open(io.BytesIO(kept[small.digest].read_bytes())).size == (24, 16)
    before = kept[large.digest].stat().st_mtime_ns
    path.unlink()
    prompt_fields(prompt, rows)  # existing thumbnails are not made again
    assert kept[large.digest].stat().st_mtime_ns == before


def test_without_pictures_a_row_has_no_field_for_them(tmp_path):
    rows = tmp_path / "generations" / "sft.jsonl"
    assert prompt_fields(Prompt.from_text("q"), rows) == {"prompt": "q"}
    assert not thumbnail_folder(rows).exists()


def test_nothing_is_kept_of_a_picture_that_has_gone(tmp_path):
    path = save_image(tmp_path / "a.png")
    prompt = Prompt.from_text(f"{IMAGE}q", images=(read_image("a.png", tmp_path),))
    path.unlink()
    rows = tmp_path / "generations" / "sft.jsonl"
    with pytest.raises(UserError, match=r"a\.png: the image cannot be read any more"):
        prompt_fields(prompt, rows)
    assert not thumbnail_folder(rows).exists()
