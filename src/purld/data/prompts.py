"""Prompts from a plain file: every row becomes a `Prompt`, or one sentence that says why it cannot.

Which file formats there are is `purld.data.files`' business; the published formats of named tasks are not read
here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from purld.config.schema import Columns
from purld.data.chat import images_in_column, parse_chat, place_images
from purld.data.files import BadRowError, FileRow, check_text, iter_rows
from purld.data.images import read_image
from purld.data.parallel import map_in_order
from purld.errors import UserError
from purld.records import Image, Prompt

Parse = Callable[[FileRow], Prompt | None]

_BATCH = 16  # rows that one thread parses at a time


@dataclass(frozen=True)
class LoadedPrompts:
    """The distinct prompts of a file, in its order, and what became of its other rows."""

    prompts: list[Prompt]
    rows: int
    duplicates: int = 0
    skipped: int = 0
    first_skipped: str | None = None  # a sentence about the first row that was skipped


def load_prompts(
    path: str | Path, columns: Columns | None = None, bad_rows: Literal["fail", "skip"] = "fail"
) -> LoadedPrompts:
    """Read `path` (JSONL, parquet or a saved `datasets` folder). A prompt met before is dropped and counted.

    Raises:
        UserError: names the file and the row that cannot be used (with `bad_rows="fail"`), or says that no
            prompt is left.
    """
    columns, path = columns or Columns(), Path(path)
    folder = path if path.is_dir() else path.parent
    return collect_prompts(iter_rows(path), lambda row: parse_prompt(row, columns, folder), path, bad_rows)


def collect_prompts(
    rows: Iterable[FileRow],
    parse: Parse,
    source: str | Path,
    bad_rows: Literal["fail", "skip"] = "fail",
) -> LoadedPrompts:
    """The distinct prompts that `parse` makes of `rows`; None is a row of another task and does not count.

    Raises:
        UserError: a row cannot be used (with `bad_rows="fail"`), or `source` gave no prompt.
    """
    prompts: dict[str, Prompt] = {}
    images: dict[str, Image] = {}  # bytes that rows share are kept once
    used, problems = 0, list[str]()
    for prompt in map_in_order(
        lambda row: _outcome(row, parse), rows, _BATCH
    ):  # images decode outside of Python's lock
        if isinstance(prompt, BadRowError):
            if bad_rows == "fail":
                raise UserError(f"{prompt}.")
            problems.append(f"{prompt}.")
        elif prompt is not None:
            used += 1
            if prompt.id not in prompts:
                shared = tuple(images.setdefault(image.digest, image) for image in prompt.images)
                prompts[prompt.id] = replace(prompt, images=shared) if shared else prompt
    if not prompts:
        found = f"none of its {len(problems)} rows can be used; {problems[0]}" if problems else "it has no rows."
        raise UserError(f"{source}: there are no prompts: {found}")
    total = used + len(problems)
    return LoadedPrompts(list(prompts.values()), total, used - len(prompts), len(problems), next(iter(problems), None))


def parse_prompt(row: FileRow, columns: Columns, folder: Path) -> Prompt:
    """The prompt in one row; columns that are not mapped become its metadata.

    Args:
        row: the row.
        columns: which of its columns hold what.
        folder: what the paths of its images are relative to.

    Raises:
        BadRowError: names the place, the column and what is wrong with it.
    """
    cells = row.cells()
    if columns.prompt not in cells:
        held = ", ".join(repr(str(name)[:40]) for name in sorted(cells, key=str)[:8]) or "none"
        raise BadRowError(f"{row.place}: there is no column {columns.prompt!r} (its columns: {held}; see data.columns)")
    column = columns.prompt
    try:
        chat = parse_chat(cells[column])
        chat = place_images(chat, images_in_column(cells.get(columns.images)))
        column = columns.reference
        reference = _parse_reference(cells.get(column))
        column = columns.images if cells.get(columns.images) else columns.prompt
        images = tuple(read_image(cell, folder, f"image {number}") for number, cell in enumerate(chat.images, 1))
    except ValueError as problem:
        raise BadRowError(f"{row.place}: column {column!r} cannot be used: {problem}") from None
    mapped = {columns.prompt, columns.reference, columns.images}
    metadata = {str(name): _plain(cell) for name, cell in cells.items() if name not in mapped}
    return Prompt(chat.messages, images, reference, metadata, row.place)


def split_pool(prompts: Sequence[Prompt], fraction: float, seed: int | str = 0) -> tuple[list[Prompt], list[Prompt]]:
    """Part `prompts` into a training pool and a held-out set of about `fraction`.

    A prompt's side depends on its content and `seed` alone: neither the order of the rows nor rows added later
    can move it. Only when a side would stay empty is the prompt that is nearest to it moved there.
    """
    position = {prompt.id: _position(prompt.id, seed) for prompt in prompts}
    threshold = fraction
    if fraction > 0 and len(position) > 1:
        lowest, *_, highest = sorted(position.values())
        threshold = min(max(threshold, lowest + 2**-53), highest)
    pool = [prompt for prompt in prompts if position[prompt.id] >= threshold]
    held_out = [prompt for prompt in prompts if position[prompt.id] < threshold]
    return pool, held_out


def exclude_prompts(prompts: Iterable[Prompt], held_out: Iterable[Prompt]) -> list[Prompt]:
    """`prompts` less those that are also in `held_out`: what is evaluated on is never trained on."""
    barred = {prompt.id for prompt in held_out}
    return [prompt for prompt in prompts if prompt.id not in barred]


def _outcome(row: FileRow, parse: Parse) -> Prompt | BadRowError | None:
    try:
        return parse(row)
    except BadRowError as problem:
        return problem


def _position(prompt_id: str, seed: int | str) -> float:
    """A place in [0, 1) that is as good as random and always the same."""
    digest = hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _parse_reference(cell: object) -> str | None:
    if cell is None:
        return None
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        # Tables with a gap hold whole numbers as 3.0; the gold answer is 3.
        whole = isinstance(cell, float) and cell.is_integer() and abs(cell) < 2**53
        return str(int(cell) if whole else cell)
    return check_text(cell, "it")


def _plain(cell: Any) -> Any:
    """`cell` as JSON can hold it: dates, decimals and bytes from a parquet file become text."""
    if cell is None or isinstance(cell, str | int | float):
        return cell
    if isinstance(cell, Mapping):
        cell = {str(name): inner for name, inner in cell.items()}
    return json.loads(json.dumps(cell, default=str))
