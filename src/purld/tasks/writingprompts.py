"""Read WritingPrompts (Fan et al., 2018): `{train,valid,test}.wp_source` and `.wp_target`, one prompt or story a line.

The published lines are tokenised. `restore_plain_text` undoes what can be undone without guessing: it joins punctuation
and contractions, turns `<newline>` into a line break and pairs double quotes. "can not" for "cannot" and spaces around
single quotes and dashes remain.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

from purld.data.files import BadRowError, FileRow, check_text
from purld.data.limits import read_lines
from purld.errors import UserError
from purld.records import Message, Prompt
from purld.tasks.sources import Splits, find_splits, hub_splits, is_hub_data

_TAG = re.compile(r"\s*\[\s*(\w+)\s*\]\s*")
_SPACE_BEFORE = re.compile(r" +([.,;:!?%)\]}]|n't\b|'(?:s|re|ve|ll|d|m)\b)", re.IGNORECASE)
_SPACE_AFTER = re.compile(r"([(\[{$]) +")
_QUOTED = re.compile(r'"[ \t]*([^"\n]*?)[ \t]*"')


def read_splits(path: str) -> Splits:
    """Read the splits in a folder, of one `.wp_source` file with its `.wp_target` next to it, or of a hub data set.

    Raises:
        UserError: `path` holds none of these.
    """
    if is_hub_data(path):
        return hub_splits(path)
    splits = find_splits(path, "*.wp_source", _read_pair)
    if not splits:
        raise UserError(f"{path}: holds no .wp_source file, as WritingPrompts is published.")
    return splits


def parse_story_prompt(row: FileRow, tag: str) -> Prompt | None:
    """Parse a row into a prompt with the story as its reference, or return None if its tag is not `tag` (e.g. "CW").

    Raises:
        BadRowError: the row cannot be used; the message names the problem.
    """
    cells = row.cells()
    try:
        source = check_text(cells.get("prompt"), "the prompt")
        tag_match = _TAG.match(source)
        if tag_match is None or tag_match[1].upper() != tag:
            return None
        text = check_text(restore_plain_text(source[tag_match.end() :]), f"the prompt after [{tag}]")
        story = check_text(cells.get("story"), "the story")
    except ValueError as problem:
        raise BadRowError(f"{row.location}: {problem}") from None
    return Prompt((Message("user", f"[{tag}] {text}"),), (), restore_plain_text(story), {"tag": tag})


def restore_plain_text(text: str) -> str:
    """Restore plain text from a published, tokenised line; see the module docstring."""
    text = text.replace("<newline>", "\n").replace("``", '"').replace("''", '"')
    text = _SPACE_AFTER.sub(r"\1", _SPACE_BEFORE.sub(r"\1", text))
    text = _QUOTED.sub(r'"\1"', text)
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.split("\n"))
    return "\n".join(lines).strip()


def _read_pair(source: Path) -> Iterable[FileRow]:
    target = source.with_suffix(".wp_target")
    if source.suffix != ".wp_source" or not target.is_file():
        raise UserError(f"{source}: is not a .wp_source file with its .wp_target next to it.")
    return _read_lines(source, target)


def _read_lines(source: Path, target: Path) -> Iterator[FileRow]:
    for number, (prompt, story) in enumerate(zip_longest(read_lines(source), read_lines(target)), 1):
        if prompt is None or story is None:
            raise UserError(
                f"{source}: its number of lines differs from that of {target.name}; they must match line by line."
            )
        yield _parse_lines(prompt, story, f"{source}, line {number}")


def _parse_lines(prompt: bytes, story: bytes, location: str) -> FileRow:
    try:
        return FileRow(location, {"prompt": prompt.decode("utf-8").strip(), "story": story.decode("utf-8").strip()})
    except UnicodeDecodeError as error:
        return FileRow(location, None, f"is not UTF-8 (byte 0x{error.object[error.start]:02x})")
