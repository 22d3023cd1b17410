"""Prompts from a plain file: every row becomes a `Prompt`, or one sentence that says why it cannot.

Which file formats there are is `purld.rows`' business; the published formats of named tasks are not read
here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from purld.config import Columns
from purld.errors import UserError
from purld.records import Prompt
from purld.rows import BadRowError, Row, check_text, iter_rows, parse_messages


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
    columns = columns or Columns()
    return gather(iter_rows(path), lambda row: parse_prompt(row, columns), path, bad_rows)


def gather(
    rows: Iterable[Row],
    parse: Callable[[Row], Prompt | None],
    source: str | Path,
    bad_rows: Literal["fail", "skip"] = "fail",
) -> LoadedPrompts:
    """The distinct prompts that `parse` makes of `rows`; None is a row of another task and does not count.

    Raises:
        UserError: a row cannot be used (with `bad_rows="fail"`), or `source` gave no prompt.
    """
    prompts: dict[str, Prompt] = {}
    used, problems = 0, list[str]()
    for row in rows:
        try:
            prompt = parse(row)
        except BadRowError as problem:
            if bad_rows == "fail":
                raise UserError(f"{problem}.") from None
            problems.append(f"{problem}.")
            continue
        if prompt is not None:
            used += 1
            prompts.setdefault(prompt.id, prompt)
    if not prompts:
        found = f"none of its {len(problems)} rows can be used; {problems[0]}" if problems else "it has no rows."
        raise UserError(f"{source}: there are no prompts: {found}")
    total = used + len(problems)
    return LoadedPrompts(list(prompts.values()), total, used - len(prompts), len(problems), next(iter(problems), None))


def parse_prompt(row: Row, columns: Columns) -> Prompt:
    """The prompt in one row; columns that are not mapped become its metadata.

    Raises:
        BadRowError: names the place, the column and what is wrong with it.
        UserError: the row has images.
    """
    cells = row.cells()
    if columns.prompt not in cells:
        held = ", ".join(repr(str(name)[:40]) for name in sorted(cells, key=str)[:8]) or "none"
        raise BadRowError(f"{row.place}: there is no column {columns.prompt!r} (its columns: {held}; see data.columns)")
    column = columns.prompt
    try:
        messages = parse_messages(cells[column])
        column = columns.reference
        reference = _parse_reference(cells.get(column))
        column = columns.images
        images = _parse_images(cells.get(column))
    except ValueError as problem:
        raise BadRowError(f"{row.place}: column {column!r} cannot be used: {problem}") from None
    _refuse_images(images, row.place)
    mapped = {columns.prompt, columns.reference, columns.images}
    metadata = {str(name): _plain(cell) for name, cell in cells.items() if name not in mapped}
    return Prompt(messages, images, reference, metadata)


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


def without(prompts: Iterable[Prompt], held_out: Iterable[Prompt]) -> list[Prompt]:
    """`prompts` less those that are also in `held_out`: what is evaluated on is never trained on."""
    barred = {prompt.id for prompt in held_out}
    return [prompt for prompt in prompts if prompt.id not in barred]


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


def _parse_images(cell: object) -> tuple[str, ...]:
    if cell is None or cell == "":
        return ()
    if isinstance(cell, str):
        return (check_text(cell, "it"),)
    if not isinstance(cell, list | tuple):
        raise ValueError("it is neither a path nor a list of paths")
    return tuple(check_text(path, f"image {number}") for number, path in enumerate(cell, 1))


def _refuse_images(images: tuple[str, ...], place: str) -> None:
    """Until the student encodes images, a prompt that has some must not pass for one that has none."""
    if images:
        raise UserError(f"{place}: the prompt has {len(images)} image(s); image prompts are not supported yet.")


def _plain(cell: Any) -> Any:
    """`cell` as JSON can hold it: dates, decimals and bytes from a parquet file become text."""
    if cell is None or isinstance(cell, str | int | float):
        return cell
    if isinstance(cell, Mapping):
        cell = {str(name): inner for name, inner in cell.items()}
    return json.loads(json.dumps(cell, default=str))
