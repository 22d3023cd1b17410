"""Prompts with images through the real command line: errors, the plan, and the requests sent."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from faulty_server import running_server
from image_factory import encode_image, make_image, save_image
from PIL import Image
from tiny_vlm import write_model

from purld.cli import main
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir


@pytest.fixture(scope="module")
def student(shipped_student, tmp_path_factory) -> Path:
    return write_model("llava", shipped_student, tmp_path_factory.mktemp("student") / "vlm")


@pytest.fixture
def purld(monkeypatch, capsys):
    """Return a function that runs a command and returns its status, stdout and stderr."""

    def purld(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["purld", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        written = capsys.readouterr()
        return stopped.value.code or 0, written.out, written.err

    return purld


@pytest.fixture
def config(student, tmp_path) -> Path:
    """Write a configuration with three training prompts and one held-out prompt, all with images."""
    for seed, name in enumerate(("a", "b", "c", "d")):
        save_image(tmp_path / f"{name}.png", seed=seed)
    write_rows(tmp_path / "pool.jsonl", [{"prompt": "What is it?", "images": f"{name}.png"} for name in "abc"])
    write_rows(tmp_path / "held_out.jsonl", [{"prompt": "What is it?", "images": ["d.png"]}])
    values = {
        "student": {"model": str(student), "max_prompt_tokens": 256, "max_anchor_tokens": 32},
        "data": {"prompts": str(tmp_path / "pool.jsonl"), "eval_prompts": str(tmp_path / "held_out.jsonl")},
        "teacher": {"kind": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "m"},
        "align": {"max_new_tokens": 8},
        "evaluate": {"max_new_tokens": 8},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def bomb() -> bytes:
    """Return a PNG whose header declares 400 million pixels."""
    data = bytearray(encode_image(Image.new("1", (8, 8))))
    data[16:24] = (20_000).to_bytes(4) * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    return bytes(data)


BAD = {
    "missing": (None, "is missing"),
    "truncated": (encode_image(make_image(200, 100), "JPEG")[:-400], "is truncated"),
    "a bomb": (bomb(), "has more than 80,000,000 pixels; scale it down"),
    "animated": (
        encode_image(make_image(), "GIF", save_all=True, append_images=[make_image(seed=1)]),
        "has 2 frames or pages; .*",
    ),
    "a web page": (b"<!DOCTYPE html><title>404</title>", "is a web page, .*"),
    "a drawing": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is a drawing in SVG; convert it to PNG"),
    "empty": (b"", "is empty"),
    "a ribbon": (encode_image(Image.new("L", (2000, 2))), r"is 2,000 x 2 pixels; .*"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_ends_in_one_sentence_that_names_file_and_row(config, tmp_path, purld, kind):
    data, words = BAD[kind]
    if data is not None:
        (tmp_path / "bad.jpg").write_bytes(data)
    rows = [{"prompt": "Q", "images": ["a.png"]}, {"prompt": "Q", "images": ["b.png", "bad.jpg"]}]
    write_rows(tmp_path / "pool.jsonl", rows)
    status, out, err = purld("check", config)
    assert status == 2 and out == ""
    pool = re.escape(str(tmp_path / "pool.jsonl"))
    assert re.fullmatch(
        rf"purld: {pool}, line 2: column 'images' cannot be used: image 2 \(bad\.jpg\) {words}\.\n", err
    ), err
    status, out, _ = purld("check", config, "data.bad_rows=skip")
    assert status == 0 and "1 bad rows were skipped, first: " in " ".join(out.split())


def test_odd_pictures_are_converted(config, tmp_path, purld):
    """CMYK, 16 bits, one pixel, transparent, a wrong file name: all are valid images."""
    sixteen = Image.fromarray(np.full((16, 24), 40_000, np.uint16))
    for name, data in {
        "a.png": encode_image(make_image().convert("CMYK"), "JPEG"),
        "b.png": encode_image(sixteen),
        "c.png": encode_image(Image.new("RGB", (1, 1))),
        "d.png": encode_image(make_image().convert("RGBA"), "WEBP"),
    }.items():
        (tmp_path / name).write_bytes(data)
    status, out, err = purld("check", config)
    assert (status, err) == (0, "")
    assert "3 for training, 1 held out" in out


def test_a_prompt_with_a_picture_that_is_too_long_names_its_row(config, tmp_path, purld):
    rows = [{"prompt": "short", "images": "a.png"}, {"prompt": "long " * 60, "images": "b.png"}, {"prompt": "no " * 99}]
    write_rows(tmp_path / "pool.jsonl", rows)
    status, _, err = purld("check", config, "student.max_prompt_tokens=40")
    assert status == 2
    assert err.startswith(f"purld: {tmp_path}/pool.jsonl, line 2: the prompt has ")
    assert err.endswith(
        " tokens with its 1 image(s), more than 40; raise student.max_prompt_tokens, lower student.max_image_pixels, "
        "or leave such rows out with data.bad_rows=skip.\n"
    )
    status, out, _ = purld("check", config, "student.max_prompt_tokens=40", "data.bad_rows=skip")
    assert status == 0
    assert "2 of 3 training prompts have more than 40 tokens" in " ".join(out.split())
    assert "1 for training, 1 held out" in out


def test_the_plan_and_the_dry_run_count_pictures_and_what_leaves_is_what_they_say(config, tmp_path, purld):
    with running_server() as server:
        there = [f"teacher.base_url={server.url}", "evaluate.opponent=null", "--run-dir", tmp_path / "run"]
        status, out, _ = purld("check", config, *there)
        assert status == 0
        plan = re.search(r"teacher: 3 calls to m at \S+ 3 images, ([\d,]+) bytes", " ".join(out.split()))
        status, dry, err = purld("anchors", config, *there, "--dry-run")
        assert status == 0 and server.bodies == []
        assert f"3 requests of {plan[1]} bytes would be sent" in err
        bodies = [line[line.index('"body": ') + 8 : -1].encode() for line in dry.splitlines()]
        assert sum(map(len, bodies)) == int(plan[1].replace(",", ""))
        assert purld("anchors", config, *there)[0] == 0
        assert sorted(server.bodies) == sorted(bodies)
    sent = {part["image_url"]["url"] for body in bodies for part in json.loads(body)["messages"][0]["content"][:1]}
    expected = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert sent == {"data:image/png;base64," + base64.b64encode(data).decode() for data in expected}
    status, out, _ = purld("ledger", tmp_path / "run", "--export", tmp_path / "audit.jsonl")
    assert status == 0 and "base64" not in out
    assert [row["bytes"] for row in read_rows(tmp_path / "audit.jsonl")] == [len(body) for body in server.bodies]


def test_the_judges_estimate_counts_pictures(config, purld):
    """One held-out prompt, judged in both orders for each of three models; an image counts 3,328 tokens."""
    judge = "{kind: openai, base_url: http://127.0.0.1:9/v1, model: j}"
    status, out, _ = purld("check", config, f"evaluate.judge={judge}", "evaluate.opponent={kind: teacher}")
    assert status == 0 and "judge: at most 6 calls to j" in out
    read = int(re.search(r"about ([\d,]+) tokens in with answers", out)[1].replace(",", ""))
    assert 6 * 3328 < read < 6 * (3328 + 700)


def test_no_metadata_leaves(config, tmp_path, purld):
    tags = Image.Exif()
    tags[0x010E] = "patient 4711"
    for name in "abc":
        save_image(tmp_path / f"{name}.jpg", seed=ord(name), exif=tags)
    write_rows(tmp_path / "pool.jsonl", [{"prompt": "Q", "images": f"{name}.jpg"} for name in "abc"])
    assert b"4711" in (tmp_path / "a.jpg").read_bytes()
    _, dry, _ = purld("anchors", config, "--dry-run")
    urls = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", dry)
    assert len(urls) == 3
    for url in urls:
        data = base64.b64decode(url)
        assert b"4711" not in data and Image.open(io.BytesIO(data)).size == (24, 16)


def test_verdicts_on_pictures_are_asked_for_by_name(config, tmp_path, purld):
    """The questions for a human judge name the files and show the positions of the images."""
    answers = [{"prompt": "What is it?", "images": f"{name}.png", "answer": f"A picture, {name}."} for name in "abcd"]
    write_rows(tmp_path / "answers.jsonl", answers)
    file = f"{{kind: file, path: {tmp_path / 'answers.jsonl'}}}"
    verdicts = f"{{kind: file, path: {tmp_path / 'verdicts.jsonl'}}}"
    run = RunDir(tmp_path / "run")
    status, _, err = purld(
        "run", config, f"teacher={file}", f"evaluate.opponent={file}", f"evaluate.judge={verdicts}",
        "align={method: sft}", "sft.validation_fraction=0.0", "--run-dir", run.path,
    )  # fmt: skip
    assert status == 2 and "has no verdict on" in err
    for row in read_rows(run.to_judge):
        assert "=== Question / Prompt ===\n<image>What is it?" in row["question"]
        assert row["images"] == [str(tmp_path / "d.png")]
    [asked] = {tuple(row["images"]) for row in read_rows(run.generations("sft"))}
    assert [file.name for file in (run.path / "generations" / "images").iterdir()] == [f"{asked[0]}.png"]
