"""A-OKVQA (Schwenk et al., 2022): `aokvqa_v1p0_{train,val}.json` and the COCO images that they ask about.

The image of a question is `{split}2017/{image_id:012}.jpg`. The published test split has no gold and is not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from purld.data.files import BadRowError, FileRow, check_text, parse_json_file
from purld.data.images import read_image
from purld.errors import UserError
from purld.records import IMAGE, Image, Message, Prompt
from purld.tasks.sources import Splits, split_name


def read(path: str) -> Splits:
    """The splits in a folder that holds the annotations, and the images there or in `coco/`.

    Raises:
        UserError: there are no annotations, or no folder with the images of a split.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{path}: no such folder; A-OKVQA is one with aokvqa_v1p0_train.json and COCO's train2017/.")
    files = {name: root / f"aokvqa_v1p0_{name}.json" for name in ("train", "val")}
    splits = {
        split_name(name): _rows(file, _images(root, f"{name}2017")) for name, file in files.items() if file.exists()
    }
    if not splits:
        raise UserError(f"{path}: holds neither aokvqa_v1p0_train.json nor aokvqa_v1p0_val.json.")
    return splits


def parse_choice(row: FileRow) -> Prompt:
    """The multiple-choice question of a row; its reference is the right option (Table C.7).

    Raises:
        BadRowError: says what is wrong with the row.
    """
    cells = row.cells()
    try:
        choices = _texts(cells.get("choices"), "choices")
        right = cells.get("correct_choice_idx")
        if type(right) is not int or not 0 <= right < len(choices):
            raise ValueError("correct_choice_idx names none of the choices")
        options = " ".join(f"({place}) {choice}" for place, choice in enumerate(choices))
        text = f"{IMAGE}Question: {_question(cells)}\nOptions: {options}"
        metadata = _metadata(cells) | {"choices": choices}
        return Prompt((Message("user", text),), _image(cells), f"Answer: {choices[right]}", metadata, row.place)
    except ValueError as problem:
        raise BadRowError(f"{row.place}: {problem}") from None


def parse_rationale(row: FileRow) -> Prompt:
    """The question of a row; its reference is the first of the rationales (Table C.7).

    Raises:
        BadRowError: says what is wrong with the row.
    """
    cells = row.cells()
    try:
        rationales = _texts(cells.get("rationales"), "rationales")
        metadata = _metadata(cells) | {"rationales": rationales}
        message = Message("user", f"{IMAGE}Question: {_question(cells)}")
        return Prompt((message,), _image(cells), f"Rationale: {rationales[0]}", metadata, row.place)
    except ValueError as problem:
        raise BadRowError(f"{row.place}: {problem}") from None


def _images(root: Path, name: str) -> Path:
    for folder in (root / name, root / "coco" / name):
        if folder.is_dir():
            return folder
    raise UserError(f"{root}: COCO's images are missing: there is neither {name}/ nor coco/{name}/.")


def _rows(path: Path, images: Path) -> Iterator[FileRow]:
    try:
        entries = parse_json_file(path)
    except BadRowError as problem:
        raise UserError(f"{problem}.") from None
    if not isinstance(entries, list):
        raise UserError(f"{path}: is not a JSON list, as A-OKVQA is published.")
    for number, entry in enumerate(entries, 1):
        place = f"{path}, entry {number}"
        if isinstance(entry, dict):
            yield FileRow(place, entry | {"folder": images})
        else:
            yield FileRow(place, None, "is not a JSON object")


def _question(cells: Mapping[str, Any]) -> str:
    return check_text(cells.get("question"), "the question").strip()


def _image(cells: Mapping[str, Any]) -> tuple[Image]:
    number = cells.get("image_id")
    if type(number) is not int:
        raise ValueError("image_id is not a number")
    path: Path = cells["folder"] / f"{number:012}.jpg"
    return (read_image(path, Path(), "its image"),)


def _metadata(cells: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": cells.get("question_id"), "image_id": cells.get("image_id")}


def _texts(cell: object, name: str) -> list[str]:
    if not isinstance(cell, list) or not cell:
        raise ValueError(f"{name} is not a list of texts")
    return [check_text(text, f"one of the {name}") for text in cell]
