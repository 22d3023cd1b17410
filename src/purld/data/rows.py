"""A row of a file with its location in words, and the check of a text in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from purld.records import IMAGE

MAX_CHARACTERS = 1_000_000  # of one text; far above any context window


class BadRowError(ValueError):
    """A row that cannot be used; the message names its location and the problem, without a full stop."""


@dataclass(frozen=True)
class FileRow:
    """One row and its location in words; if it could not be read, `values` is None and `problem` says why."""

    location: str
    values: Mapping[str, Any] | None
    problem: str = ""

    def cells(self) -> Mapping[str, Any]:
        """Return the row's values.

        Raises:
            BadRowError: the row could not be read.
        """
        if self.values is None:
            raise BadRowError(f"{self.location}: {self.problem}")
        return self.values


def check_text(cell: object, name: str) -> str:
    """Return `cell` if it is a text that a model can be shown, with every IMAGE character replaced by a space.

    Converted documents contain that character in place of their images.

    Raises:
        ValueError: it is not a text, is blank, holds a NUL or a lone surrogate, or is longer than MAX_CHARACTERS.
    """
    if not isinstance(cell, str):
        raise ValueError(f"{name} is {json_type_name(cell)}, not a text")
    cell = cell.replace(IMAGE, " ")
    if not cell.strip():
        raise ValueError(f"{name} is empty")
    if "\0" in cell:
        raise ValueError(f"{name} contains a NUL character")
    if len(cell) > MAX_CHARACTERS:
        raise ValueError(f"{name} has {len(cell):,} characters; at most {MAX_CHARACTERS:,} are accepted")
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} contains a lone surrogate at character {error.start + 1}") from None
    return cell


def json_type_name(value: object) -> str:
    """Return the JSON name of a value's type, for use in a sentence."""
    match value:
        case None:
            return "missing or null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case list() | tuple():
            return "a list"
        case Mapping():
            return "an object"
        case _:
            return f"a {type(value).__name__}"
