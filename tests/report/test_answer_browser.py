"""Test the data of the answer browser: inert as HTML, complete as JSON, bounded in size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_factory import encode_image, make_image
from synthetic import HOSTILE, REVERSED, REVISITED, Build, picture_run

from purld.data.images import read_image
from purld.records import IMAGE, Prompt
from purld.report import answer_browser as module
from purld.report.answer_browser import MAX_CHARACTERS, answer_browser, safe_json
from purld.report.page import _page
from purld.report.run_data import read_run
from purld.runs.files import append_rows, read_rows, write_rows


@given(st.text(alphabet=st.characters(codec=None)) | st.sampled_from([HOSTILE, REVERSED, "\u2028", "\udfff\ud800"]))
def test_any_text_is_inert_and_survives(text: str) -> None:
    encoded = safe_json({"text": text})
    assert json.loads(encoded) == {"text": text}
    assert not re.search("[<>&\u2028\u2029\u202e]", encoded)
    encoded.encode("utf-8")


def entries(data: str) -> list[dict]:
    return json.loads(data)["entries"]


def test_an_entry_holds_the_whole_group(build: Build) -> None:
    run = build(held_out=0, groups=7)
    row = read_rows(run.groups)[6]
    entry = entries(answer_browser([read_run(run)]).json)[6]
    assert entry["id"] == row["prompt_id"]
    assert entry["anchor"] == row["anchor"]
    assert entry["group"]["step"] == 7
    candidates = entry["group"]["candidates"]
    assert [c["text"] for c in candidates] == row["candidates"]
    assert [c["D"] for c in candidates] == pytest.approx(row["labels"], abs=1e-4)
    assert [c["q"] for c in candidates] == pytest.approx(row["policy_before"], abs=1e-4)
    assert candidates[3]["score"] is None
    assert "after" not in candidates[0]


def test_q_after_is_there_where_it_was_measured(build: Build) -> None:
    run = build(held_out=0, groups=REVISITED + 1)
    row = read_rows(run.revisited)[REVISITED - 1]
    *_, entry, other = entries(answer_browser([read_run(run)]).json)
    candidates = entry["group"]["candidates"]
    assert [c["after"] for c in candidates] == pytest.approx(row["policy_after"], abs=1e-4)
    assert entry["group"]["divergence"] == pytest.approx([0.35, 0.35 / 3], abs=1e-4)
    assert "divergence" not in other["group"]
    assert "after" not in other["group"]["candidates"][0]


def test_a_prompt_seen_again_shows_the_group_that_was_measured_again(build: Build) -> None:
    run = build(held_out=0, groups=2)
    first = read_rows(run.groups)[0]
    append_rows(run.groups, [first | {"step": 99}])
    shown = entries(answer_browser([read_run(run)]).json)
    assert [(e["id"], e["group"]["step"]) for e in shown][:1] == [(first["prompt_id"], 1)]
    assert len(shown) == 2


def test_what_was_measured_again_is_no_models_answer(build: Build) -> None:
    assert list(read_run(build()).answers) == ["base", "sft", "ldl_grpo", "opponent"]


def test_a_prompt_seen_twice_shows_its_last_group(build: Build) -> None:
    run = build(held_out=0, groups=2)
    run.revisited.unlink()
    first = read_rows(run.groups)[0]
    append_rows(run.groups, [first | {"step": 99}])
    steps = {e["id"]: e["group"]["step"] for e in entries(answer_browser([read_run(run)]).json)}
    assert steps[first["prompt_id"]] == 99
    assert len(steps) == 2


def test_answers_stand_side_by_side_with_their_verdicts(build: Build) -> None:
    run = build(held_out=4, groups=0)
    entry = entries(answer_browser([read_run(run)]).json)[2]
    assert [a["model"] for a in entry["answers"]] == ["base", "sft", "ldl_grpo", "opponent"]
    drawn, greedy = entry["answers"][2]["samples"]
    row = read_rows(run.generations("ldl_grpo"))[2]
    assert (drawn["text"], drawn["correct"], drawn["tokens"]) == (row["text"], row["correct"], row["tokens"])
    said = [v for v in read_rows(run.verdicts("ldl_grpo")) if v["prompt_id"] == entry["id"]]
    assert [v["outcome"] for v in drawn["verdicts"]] == [v["outcome"] for v in said]
    assert greedy["greedy"]
    assert "verdicts" not in greedy


def test_a_long_text_is_cut_and_says_so(build: Build) -> None:
    run = build(held_out=1, groups=0)
    write_rows(run.generations("sft"), [row | {"text": "x" * 10_000} for row in read_rows(run.generations("sft"))])
    (entry,) = entries(answer_browser([read_run(run)]).json)
    text = entry["answers"][1]["samples"][0]["text"]
    assert text.startswith("x" * MAX_CHARACTERS + "\n[")
    assert "4,000 more" in text


def test_what_does_not_fit_is_left_out_and_counted(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 20_000)
    data = answer_browser([read_run(build(name)) for name in ("a", "b")])
    assert 0 < data.shown < data.total == 140
    assert len(data.json) < 21_000
    assert len(entries(data.json)) == data.shown
    assert {e["run"] for e in entries(data.json)} == {0, 1}


def test_not_a_number_is_no_number(build: Build) -> None:
    run = build(held_out=0, groups=1)
    write_rows(run.groups, [row | {"labels": [float("nan")] * 8} for row in read_rows(run.groups)])
    (entry,) = entries(answer_browser([read_run(run)]).json)
    assert entry["group"]["candidates"][0]["D"] is None


def test_pictures_are_on_the_page_once_and_within_bounds(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs share three images. With room for only two images, all entries stay."""
    runs = [build(held_out=3, groups=0, seed=seed, logged=False) for seed in (0, 1)]
    images = [read_image(encode_image(make_image(seed=n)), Path()) for n in range(3)]
    prompts = {f"{n:016x}": Prompt.from_text(f"{IMAGE}Q{n}", images=(image,)) for n, image in enumerate(images)}
    for run in runs:
        picture_run(run, prompts)
    data = answer_browser([read_run(run) for run in runs])
    urls = json.loads(data.json)["images"]
    assert set(urls) == {image.digest for image in images} and data.images_left_out == 0
    assert [entry["images"] for entry in entries(data.json)] == [[i.digest] for i in images for _ in runs]
    lengths = [len(urls[image.digest]) for image in images]
    monkeypatch.setattr(module, "MAX_IMAGE_BYTES", sum(lengths[:2]))
    less = answer_browser([read_run(run) for run in runs])
    assert set(json.loads(less.json)["images"]) == {image.digest for image in images[:2]}
    assert (less.images_left_out, less.shown) == (1, 6)
    assert "1 images are left out" in _page([read_run(run) for run in runs])


def test_what_a_run_does_not_have_is_no_picture(build: Build) -> None:
    run = build(held_out=1, groups=0, logged=False)
    path = run.generations("sft")
    write_rows(path, [row | {"prompt": f"{IMAGE}Q", "images": ["../../../etc/passwd"]} for row in read_rows(path)])
    write_rows(run.generations("base"), [])
    data = answer_browser([read_run(run)])
    assert json.loads(data.json)["images"] == {}
