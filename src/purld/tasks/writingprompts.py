"""WritingPrompts (Fan et al., 2018): `{train,valid,test}.wp_source` and `.wp_target`, one prompt or story a line.

The published lines are tokenised for a model of 2018. `detokenise` undoes what can be undone without guessing:
it joins punctuation and contractions, turns `<newline>` into a line break and pairs double quotes. What the
tokeniser lost stays lost: "can not" for "cannot", spaces around single quotes and dashes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

from purld.data.files import BadRowError, FileRow, check_text
from purld.errors import UserError
from purld.records import Message, Prompt
from purld.tasks.sources import Splits, find_splits, hub_splits, is_hub_id

_TAG = re.compile(r"\s*\[\s*(\w+)\s*\]\s*")
_BEFORE = re.compile(r" +([.,;:!?%)\]}]|n't\b|'(?:s|re|ve|ll|d|m)\b)", re.IGNORECASE)
_AFTER = re.compile(r"([(\[{$]) +")
_QUOTED = re.compile(r'"[ \t]*([^"\n]*?)[ \t]*"')


def read(path: str) -> Splits:
    """The splits in a folder, of one `.wp_source` file with its `.wp_target` beside it, or of a hub data set.

    Raises:
        UserError: there are none.
    """
    if is_hub_id(path):
        return hub_splits(path)
    splits = find_splits(path, "*.wp_source", _read_pair)
    if not splits:
        raise UserError(f"{path}: holds no .wp_source file, as WritingPrompts is published.")
    return splits


def parse(row: FileRow, tag: str) -> Prompt | None:
    """The prompt in a row with the story as its reference, or None if it has not the tag, such as "CW".

    Raises:
        BadRowError: says what is wrong with the row.
    """
    cells = row.cells()
    try:
        source = check_text(cells.get("prompt"), "the prompt")
        found = _TAG.match(source)
        if found is None or found[1].upper() != tag:
            return None
        text = check_text(detokenise(source[found.end() :]), f"the prompt after [{tag}]")
        story = check_text(cells.get("story"), "the story")
    except ValueError as problem:
        raise BadRowError(f"{row.place}: {problem}") from None
    return Prompt((Message("user", f"[{tag}] {text}"),), (), detokenise(story), {"tag": tag})


def detokenise(text: str) -> str:
    """Plain text from a published line; see the module for what that restores."""
    text = text.replace("<newline>", "\n").replace("``", '"').replace("''", '"')
    text = _AFTER.sub(r"\1", _BEFORE.sub(r"\1", text))
    text = _QUOTED.sub(r'"\1"', text)
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.split("\n"))
    return "\n".join(lines).strip()


def _read_pair(source: Path) -> Iterable[FileRow]:
    target = source.with_suffix(".wp_target")
    if source.suffix != ".wp_source" or not target.is_file():
        raise UserError(f"{source}: is not a .wp_source file with its .wp_target beside it.")
    return _pairs(source, target)


def _pairs(source: Path, target: Path) -> Iterator[FileRow]:
    with source.open("rb") as prompts, target.open("rb") as stories:
        for number, (prompt, story) in enumerate(zip_longest(prompts, stories), 1):
            if prompt is None or story is None:
                raise UserError(
                    f"{source}: has another number of lines than {target.name}, which answers it line by line."
                )
            yield _pair(prompt, story, f"{source}, line {number}")


def _pair(prompt: bytes, story: bytes, place: str) -> FileRow:
    try:
        return FileRow(place, {"prompt": prompt.decode("utf-8").strip(), "story": story.decode("utf-8").strip()})
    except UnicodeDecodeError as error:
        return FileRow(place, None, f"is not UTF-8 (byte 0x{error.object[error.start]:02x})")
