"""Read A-OKVQA (Schwenk et al., 2022): `aokvqa_v1p0_{train,val}.json` and the COCO images of its questions.

The image of a question is `{split}2017/{image_id:012}.jpg`. The published test split has no gold answers and is not
used.
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


def read_splits(path: str) -> Splits:
    """Read the splits in a folder that holds the annotations, and the images either directly or in `coco/`.

    Raises:
        UserError: the annotations or the image folder of a split are missing.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{path}: no such folder; A-OKVQA is one with aokvqa_v1p0_train.json and COCO's train2017/.")
    files = {name: root / f"aokvqa_v1p0_{name}.json" for name in ("train", "val")}
    splits = {
        split_name(name): _read_entries(file, _image_folder(root, f"{name}2017"))
        for name, file in files.items()
        if file.exists()
    }
    if not splits:
        raise UserError(f"{path}: holds neither aokvqa_v1p0_train.json nor aokvqa_v1p0_val.json.")
    return splits


def parse_choice(row: FileRow) -> Prompt:
    """Parse a row into a multiple-choice prompt whose reference is the correct option (Table C.7).

    Raises:
        BadRowError: the row cannot be used; the message names the problem.
    """
    cells = row.cells()
    try:
        choices = _parse_texts(cells.get("choices"), "choices")
        correct = cells.get("correct_choice_idx")
        if type(correct) is not int or not 0 <= correct < len(choices):
            raise ValueError("correct_choice_idx names none of the choices")
        options = " ".join(f"({index}) {choice}" for index, choice in enumerate(choices))
        text = f"{IMAGE}Question: {_parse_question(cells)}\nOptions: {options}"
        metadata = _metadata(cells) | {"choices": choices}
        return Prompt((Message("user", text),), _images(cells), f"Answer: {choices[correct]}", metadata, row.location)
    except ValueError as problem:
        raise BadRowError(f"{row.location}: {problem}") from None


def parse_rationale(row: FileRow) -> Prompt:
    """Parse a row into an open question whose reference is the first of the rationales (Table C.7).

    Raises:
        BadRowError: the row cannot be used; the message names the problem.
    """
    cells = row.cells()
    try:
        rationales = _parse_texts(cells.get("rationales"), "rationales")
        metadata = _metadata(cells) | {"rationales": rationales}
        message = Message("user", f"{IMAGE}Question: {_parse_question(cells)}")
        return Prompt((message,), _images(cells), f"Rationale: {rationales[0]}", metadata, row.location)
    except ValueError as problem:
        raise BadRowError(f"{row.location}: {problem}") from None


def _image_folder(root: Path, name: str) -> Path:
    for folder in (root / name, root / "coco" / name):
        if folder.is_dir():
            return folder
    raise UserError(f"{root}: COCO's images are missing: there is neither {name}/ nor coco/{name}/.")


def _read_entries(path: Path, images: Path) -> Iterator[FileRow]:
    try:
        entries = parse_json_file(path)
    except BadRowError as problem:
        raise UserError(f"{problem}.") from None
    if not isinstance(entries, list):
        raise UserError(f"{path}: is not a JSON list, as A-OKVQA is published.")
    for number, entry in enumerate(entries, 1):
        location = f"{path}, entry {number}"
        if isinstance(entry, dict):
            yield FileRow(location, entry | {"folder": images})
        else:
            yield FileRow(location, None, "is not a JSON object")


def _parse_question(cells: Mapping[str, Any]) -> str:
    return check_text(cells.get("question"), "the question").strip()


def _images(cells: Mapping[str, Any]) -> tuple[Image]:
    image_id = cells.get("image_id")
    if type(image_id) is not int:
        raise ValueError("image_id is not a number")
    folder: Path = cells["folder"].absolute()
    return (read_image(folder / f"{image_id:012}.jpg", folder, "its image"),)


def _metadata(cells: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": cells.get("question_id"), "image_id": cells.get("image_id")}


def _parse_texts(cell: object, name: str) -> list[str]:
    if not isinstance(cell, list) or not cell:
        raise ValueError(f"{name} is not a list of texts")
    return [check_text(text, f"one of the {name}") for text in cell]
