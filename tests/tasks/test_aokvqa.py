"""A-OKVQA as published: annotations and COCO's images."""

import json

import pytest
from image_factory import save_image

from purld.errors import UserError
from purld.records import IMAGE
from purld.tasks.registry import load_task

ENTRY = {
    "split": "train",
    "image_id": 299207,
    "question_id": "22MexNkBPpdZGX6sxbxVBH",
    "question": "What color is reflected strongly off the metal cabinet cases?",
    "choices": ["purple", "red", "blue", "yellow"],
    "correct_choice_idx": 1,
    "direct_answers": ["red", "red"],
    "difficult_direct_answer": False,
    "rationales": ["The cases shine red.", "Red light falls on them."],
}


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        entry = ENTRY | {"split": split, "image_id": 299207 if split == "train" else 42}
        (tmp_path / f"aokvqa_v1p0_{split}.json").write_text(json.dumps([entry, entry]))
        (tmp_path / f"{split}2017").mkdir()
        save_image(tmp_path / f"{split}2017" / f"{entry['image_id']:012}.jpg", seed=entry["image_id"])
    (tmp_path / "aokvqa_v1p0_test.json").write_text("[]")
    return tmp_path


def test_multiple_choice(folder):
    pool, held_out = load_task("aokvqa_mc", str(folder))
    [prompt] = pool.prompts
    assert prompt.question == (
        f"{IMAGE}Question: What color is reflected strongly off the metal cabinet cases?\n"
        "Options: (0) purple (1) red (2) blue (3) yellow"
    )
    assert prompt.reference == "Answer: red"
    assert [image.path for image in prompt.images] == [str(folder / "train2017" / "000000299207.jpg")]
    assert prompt.location == f"{folder / 'aokvqa_v1p0_train.json'}, entry 1"
    assert prompt.metadata == {
        "id": ENTRY["question_id"], "image_id": 299207, "choices": ["purple", "red", "blue", "yellow"],
    }  # fmt: skip
    assert pool.duplicates == 1
    assert [image.path for image in held_out.prompts[0].images] == [str(folder / "val2017" / "000000000042.jpg")]


def test_rationale_and_images_in_a_folder_of_their_own(folder):
    (folder / "coco").mkdir()
    for split in ("train2017", "val2017"):
        (folder / split).rename(folder / "coco" / split)
    [prompt] = load_task("aokvqa_rationale", str(folder))[0].prompts
    assert prompt.question == f"{IMAGE}Question: {ENTRY['question']}"
    assert prompt.reference == "Rationale: The cases shine red."
    assert [image.path for image in prompt.images] == [str(folder / "coco" / "train2017" / "000000299207.jpg")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": 7}, r"its image \(.*train2017/000000000007\.jpg\) is missing"),
        ({"image_id": "7"}, "image_id is not a number"),
        ({"question": None}, "the question is missing or null, not a text"),
        ({"choices": []}, "choices is not a list of texts"),
        ({"choices": ["a", None]}, "one of the choices is missing or null, not a text"),
        ({"correct_choice_idx": 4}, "correct_choice_idx names none of the choices"),
    ],
)
def test_a_bad_entry(folder, change, words):
    (folder / "aokvqa_v1p0_train.json").write_text(json.dumps([ENTRY, ENTRY | change]))
    with pytest.raises(UserError, match=rf"aokvqa_v1p0_train\.json, entry 2: {words}\.$"):
        load_task("aokvqa_mc", str(folder))
    pool, _ = load_task("aokvqa_mc", str(folder), "skip")
    assert (len(pool.prompts), pool.skipped) == (1, 1)


def test_bad_rationales(folder):
    (folder / "aokvqa_v1p0_train.json").write_text(json.dumps([ENTRY | {"rationales": "one"}]))
    with pytest.raises(UserError, match="entry 1: rationales is not a list of texts"):
        load_task("aokvqa_rationale", str(folder))


@pytest.mark.parametrize(("content", "words"), [("{}", "is not a JSON list"), ("[", "is not valid JSON")])
def test_a_file_that_is_no_list(folder, content, words):
    (folder / "aokvqa_v1p0_val.json").write_text(content)
    with pytest.raises(UserError, match=rf"aokvqa_v1p0_val\.json: {words}"):
        load_task("aokvqa_mc", str(folder), "skip")


def test_what_is_not_there(folder, tmp_path):
    (folder / "val2017" / "000000000042.jpg").unlink()
    (folder / "val2017").rmdir()
    with pytest.raises(UserError, match="there is neither val2017/ nor coco/val2017/"):
        load_task("aokvqa_mc", str(folder))
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds neither aokvqa_v1p0_train\.json"):
        load_task("aokvqa_mc", str(folder / "empty"))
    with pytest.raises(UserError, match="no such folder"):
        load_task("aokvqa_mc", str(folder / "nowhere"))
