"""Load prompts from a user's file, and split them into training and held-out pools.

Every row becomes a `Prompt`, or one sentence that says why it cannot. File formats are read in `purld.data.files`,
the published data sets of named tasks in `purld.tasks`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from purld.config.base import FormatName
from purld.config.schema import Columns
from purld.data.chat import images_in_column, insert_images, parse_chat
from purld.data.files import BadRowError, FileRow, check_text
from purld.data.formats import read_formatted
from purld.data.images import ImageFolders, read_image
from purld.data.parallel import map_in_order
from purld.errors import UserError
from purld.records import Image, Prompt

RowParser = Callable[[FileRow], Prompt | None]
"""Parses one row; None means that the row belongs to another task."""

ANSWER = "answer"  # the column of answers, in files that hold both
_BATCH = 16  # rows that one thread parses at a time


@dataclass(frozen=True)
class LoadedPrompts:
    """The distinct prompts of a file, in its order, and the counts of duplicate and skipped rows."""

    prompts: list[Prompt]
    rows: int
    duplicates: int = 0
    skipped: int = 0
    first_skipped: str | None = None  # one sentence on the first skipped row
    format: str = ""  # of the file, in words
    notice: str | None = None  # the end of a sentence if the file looks as if more of it were meant
    repeated_ids: int = 0  # rows with the id of another prompt
    first_repeated_id: str | None = None  # the location of the first of them


def load_prompts(
    path: str | Path,
    columns: Columns | None = None,
    bad_rows: Literal["fail", "skip"] = "fail",
    format: FormatName = "auto",
    image_folder: str | None = None,
) -> LoadedPrompts:
    """Load the distinct prompts of a file in any format of `purld.data.formats`, and count the duplicates.

    Raises:
        UserError: a row cannot be used (with `bad_rows="fail"`), no prompt is left, or the format is not clear.
    """
    columns, path = columns or Columns(), Path(path)
    folders = ImageFolders(path if path.is_dir() else path.parent, image_folder)
    formatted = read_formatted(path, format, columns, ANSWER)
    loaded = collect_prompts(
        formatted.rows, lambda row: parse_prompt(row, columns, folders, formatted.prompt_name), path, bad_rows
    )
    return replace(loaded, format=formatted.title, notice=formatted.notice)


def collect_prompts(
    rows: Iterable[FileRow],
    parse: RowParser,
    source: str | Path,
    bad_rows: Literal["fail", "skip"] = "fail",
) -> LoadedPrompts:
    """Parse rows into distinct prompts; rows for which `parse` returns None are not counted.

    Raises:
        UserError: a row cannot be used (with `bad_rows="fail"`), or `source` has no prompt.
    """
    prompts: dict[str, Prompt] = {}
    images: dict[str, Image] = {}  # so that rows with the same image share its bytes
    used, problems = 0, list[str]()
    # Threads help because decoding images releases Python's lock.
    for prompt in map_in_order(lambda row: _prompt_or_error(row, parse), rows, _BATCH):
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
        reason = f"none of its {len(problems)} rows can be used; {problems[0]}" if problems else "it has no rows."
        raise UserError(f"{source}: there are no prompts: {reason}")
    repeated = _repeated_ids(prompts.values())
    return LoadedPrompts(
        list(prompts.values()),
        used + len(problems),
        used - len(prompts),
        len(problems),
        next(iter(problems), None),
        repeated_ids=len(repeated),
        first_repeated_id=next((prompt.location for prompt in repeated), None),
    )


def parse_prompt(row: FileRow, columns: Columns, folder: Path | ImageFolders, prompt_name: str | None = None) -> Prompt:
    """Parse one row into a prompt; columns that are not mapped become its metadata.

    Args:
        row: the row.
        columns: the names of the mapped columns.
        folder: image paths are relative to this folder.
        prompt_name: what messages call the prompt's column; by default its name.

    Raises:
        BadRowError: the row cannot be used; the message names its location, the column and the problem.
    """
    cells = row.cells()
    if columns.prompt not in cells:
        names = ", ".join(repr(str(name)[:40]) for name in sorted(cells, key=str)[:8]) or "none"
        raise BadRowError(
            f"{row.location}: there is no column {columns.prompt!r} (its columns: {names}; see data.columns)"
        )
    column = columns.prompt
    try:
        chat = parse_chat(cells[column])
        chat = insert_images(chat, images_in_column(cells.get(columns.images)))
        column = columns.reference
        reference = _parse_reference(cells.get(column))
        column = columns.images if cells.get(columns.images) else columns.prompt
        images = tuple(read_image(cell, folder, f"image {number}") for number, cell in enumerate(chat.images, 1))
    except ValueError as problem:
        column = prompt_name if prompt_name and column == columns.prompt else column
        raise BadRowError(f"{row.location}: column {column!r} cannot be used: {problem}") from None
    mapped = {columns.prompt, columns.reference, columns.images}
    metadata = {str(name): _to_json_value(cell) for name, cell in cells.items() if name not in mapped}
    return Prompt(chat.messages, images, reference, metadata, row.location)


def split_pool(
    prompts: Sequence[Prompt], fraction: float, seed: int | str = 0, together: Iterable[Sequence[Prompt]] = ()
) -> tuple[list[Prompt], list[Prompt]]:
    """Split prompts into a training pool and a held-out pool of about `fraction` of them.

    A prompt's side depends only on its content and `seed`: the order of the rows and rows added later do not change it.
    The prompts of each group in `together` are on one side, that of the prompt with the lowest id. If one side would be
    empty, the prompt nearest to the threshold is moved there.
    """
    draws = {prompt.id: _uniform_draw(prompt.id, seed) for prompt in prompts}
    for group in together:
        draws |= dict.fromkeys((prompt.id for prompt in group), draws[min(prompt.id for prompt in group)])
    threshold = fraction
    if fraction > 0 and len(draws) > 1:
        lowest, *_, highest = sorted(draws.values())
        threshold = min(max(threshold, lowest + 2**-53), highest)
    training = [prompt for prompt in prompts if draws[prompt.id] >= threshold]
    held_out = [prompt for prompt in prompts if draws[prompt.id] < threshold]
    return training, held_out


def exclude_prompts(prompts: Iterable[Prompt], held_out: Iterable[Prompt]) -> list[Prompt]:
    """Return the prompts that are not in `held_out`, so that no held-out prompt is trained on."""
    held_out_ids = {prompt.id for prompt in held_out}
    return [prompt for prompt in prompts if prompt.id not in held_out_ids]


def _prompt_or_error(row: FileRow, parse: RowParser) -> Prompt | BadRowError | None:
    try:
        return parse(row)
    except BadRowError as problem:
        return problem


def _repeated_ids(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return the prompts whose column `id` holds the id of an earlier prompt."""
    seen: set[str] = set()
    repeated = []
    for prompt in prompts:
        row_id = prompt.metadata.get("id")
        if isinstance(row_id, str | int):
            if str(row_id) in seen:
                repeated.append(prompt)
            seen.add(str(row_id))
    return repeated


def _uniform_draw(prompt_id: str, seed: int | str) -> float:
    """Return a pseudo-random number in [0, 1) that depends only on the prompt and the seed."""
    digest = hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _parse_reference(cell: object) -> str | None:
    if cell is None:
        return None
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        # A table column with missing cells stores whole numbers as floats; the gold answer is 3, not 3.0.
        if isinstance(cell, float) and not math.isfinite(cell):
            raise BadRowError("it is not a finite number")
        whole = isinstance(cell, float) and cell.is_integer() and abs(cell) < 2**53
        return str(int(cell) if whole else cell)
    return check_text(cell, "it")


def _to_json_value(cell: Any) -> Any:
    """Convert a cell to a JSON value; dates, decimals and bytes from a parquet file become text."""
    if cell is None or isinstance(cell, str | int | float):
        return cell
    if isinstance(cell, Mapping):
        cell = {str(name): inner for name, inner in cell.items()}
    return json.loads(json.dumps(cell, default=str))
