"""Bring rows of the formats that data sets are published in into one form: a prompt, and an answer if there is one.

| format | a row has |
|---|---|
| `columns` | a prompt, and perhaps reference and images, in columns that `data.columns` names |
| `alpaca` | instruction, input and output; perhaps system and history |
| `messages` | messages of {role, content}; a last turn of the assistant is the answer |
| `sharegpt` | conversations of {from, value}; a last turn of the model is the answer; perhaps system |

The format is decided once for a file, by its first row, so that no row is read in another way than its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from purld.config.schema import Columns
from purld.data.files import FILE_KINDS, KIND_NAMES, FileRow, file_kind, iter_rows, json_type_name
from purld.data.text_files import TEXT_COLUMN
from purld.errors import UserError

_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
}  # fmt: skip
_CHAT_COLUMNS = ("messages", "conversations", "conversation")
_ROWS_LOOKED_AT = 100  # for the first that can be read


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a format are read.

    Attributes:
        name: as `data.format` has it.
        title: the format in words.
        convert: returns the prompt cell and the answer cell of a row; raises ValueError with the end of a sentence.
        consumed: the columns that these two are made of.
    """

    name: str
    title: str
    convert: Callable[[Mapping[str, Any]], tuple[Any, Any]]
    consumed: tuple[str, ...]


@dataclass(frozen=True)
class FormattedRows:
    """The rows of a file in one form, and the format that they had in words ("JSONL, Alpaca (…)")."""

    title: str
    rows: Iterator[FileRow]
    prompt_name: str  # what messages about the prompt call its column
    notice: str | None = None  # one sentence if the file looks as if more were meant


def read_formatted(path: str | Path, name: str, columns: Columns, answer: str, key: str = "data") -> FormattedRows:
    """Read a file whose rows hold prompts in any format; columns that the prompt is made of are replaced by it.

    Args:
        path: the file or folder.
        name: `auto`, a format of rows, or a kind of file whose rows' format is found.
        columns: the columns that hold prompt, reference and images; the prompt is put into `columns.prompt`.
        answer: the column to put the answer into, if the format has one.
        key: the section of the configuration that has `format`, for messages.

    Raises:
        UserError: the file cannot be read, or its rows could be in several formats.
    """
    path = Path(path)
    kind = name if name in FILE_KINDS else file_kind(path)
    rows = iter_rows(path, kind)
    first = list(islice(rows, _ROWS_LOOKED_AT))
    if name in _FORMATS:
        row_format: RowFormat | None = _FORMATS[name]
    else:
        row_format = None if name == "columns" else _find_format(first, columns, answer, key)
    rows = chain(first, rows)
    if kind == "text":  # which has no names of columns
        return FormattedRows(KIND_NAMES[kind], _rename_column(rows, TEXT_COLUMN, columns.prompt), columns.prompt)
    if row_format is None:
        title = f"{KIND_NAMES[kind]}, prompts in the column {columns.prompt!r}"
        return FormattedRows(title, rows, columns.prompt, _unread_input(first, columns, key))
    title = f"{KIND_NAMES[kind]}, {row_format.title}"
    return FormattedRows(title, _convert_rows(rows, row_format, columns, answer), row_format.consumed[0])


def _first_cells(rows: Iterable[FileRow]) -> tuple[str, Mapping[str, Any]]:
    """Return location and cells of the first row that can be read."""
    return next(((row.location, row.values) for row in rows if row.values is not None), ("", {}))


def _find_format(rows: Iterable[FileRow], columns: Columns, answer: str, key: str) -> RowFormat | None:
    """Return the format of the first row that can be read; None for one whose prompt has a column of its own."""
    location, cells = _first_cells(rows)
    chats = {name: column for column in _CHAT_COLUMNS if (name := _chat_format(cells, column))}
    if columns.prompt != Columns().prompt:
        return next((_FORMATS[name] for name, column in chats.items() if column == columns.prompt), None)
    found = {"columns": columns.prompt} if columns.prompt in cells else {}
    if key == "teacher" and found and answer in cells:
        return None  # the answer's own column says that the prompt's is meant too
    if "instruction" in cells and ("output" in cells or "input" in cells):
        found["alpaca"] = "instruction"
    found |= chats
    if len(found) > 1:
        named = " and ".join(repr(column) for column in found.values())
        raise UserError(
            f"{location}: the columns {named} could each be the prompt; "
            f"say which it is by {key}.format: {' or '.join(found)}."
        )
    return _FORMATS.get(next(iter(found), ""))


def _unread_input(rows: Iterable[FileRow], columns: Columns, key: str) -> str | None:
    """Return one sentence if the rows are Alpaca's and only the instruction is read."""
    if columns.prompt != "instruction" or not any((row.values or {}).get("input") for row in rows):
        return None
    return (
        f"the column 'input' belongs to the instruction in Alpaca's format and is not read; with {key}.format=alpaca "
        f"and without {key}.columns.prompt it is."
    )


def _chat_format(cells: Mapping[str, Any], column: str) -> str | None:
    """Return the format of a column of turns, `messages` or `sharegpt`; None if it holds none."""
    turns = cells.get(column)
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], Mapping):
        return None
    return "sharegpt" if "from" in turns[0] else "messages" if "role" in turns[0] else None


def _rename_column(rows: Iterable[FileRow], old: str, new: str) -> Iterator[FileRow]:
    for row in rows:
        yield row if row.values is None else FileRow(row.location, {new: row.values[old]})


def _convert_rows(rows: Iterable[FileRow], row_format: RowFormat, columns: Columns, answer: str) -> Iterator[FileRow]:
    kept = (columns.reference, columns.images)
    for row in rows:
        if row.values is None:
            yield row
            continue
        try:
            prompt, answered = row_format.convert(row.values)
        except ValueError as problem:
            yield FileRow(row.location, None, str(problem))
            continue
        others = {n: c for n, c in row.values.items() if n in kept or n not in row_format.consumed}
        yield FileRow(row.location, others | {columns.prompt: prompt, answer: answered})


def _convert_alpaca(cells: Mapping[str, Any]) -> tuple[Any, Any]:
    instruction, extra = _text(cells, "instruction"), _text(cells, "input", optional=True)
    if not instruction.strip():
        raise ValueError("column 'instruction' is empty")
    text = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    system, history = _text(cells, "system", optional=True), cells.get("history") or []
    turns: list[dict[str, Any]] = [{"role": "system", "content": system}] if system.strip() else []
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"turn {number} of column 'history' is not a pair of question and answer")
        turns += [{"role": role, "content": content} for role, content in zip(("user", "assistant"), pair)]
    return ([*turns, {"role": "user", "content": text}] if turns else text), _answer(cells.get("output"))


def _convert_messages(cells: Mapping[str, Any]) -> tuple[Any, Any]:
    column = next((name for name in _CHAT_COLUMNS if isinstance(cells.get(name), list)), "messages")
    return _split_chat(_turns(cells, column), column)


def _convert_sharegpt(cells: Mapping[str, Any]) -> tuple[Any, Any]:
    column = next((name for name in _CHAT_COLUMNS[::-1] if isinstance(cells.get(name), list)), "conversations")
    system = _text(cells, "system", optional=True)
    turns: list[dict[str, Any]] = []
    if system.strip():
        turns.append({"role": "system", "content": system})
    for number, turn in enumerate(_turns(cells, column), 1):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if not isinstance(turn, Mapping) or speaker not in _SPEAKERS:
            names = ", ".join(_SPEAKERS)
            raise ValueError(f"turn {number} of column {column!r} is from {str(speaker)[:40]!r}; it can be {names}")
        turns.append({"role": _SPEAKERS[speaker], "content": turn.get("value")})
    return _split_chat(turns, column)


def _turns(cells: Mapping[str, Any], column: str) -> list[Any]:
    turns = cells.get(column)
    if column not in cells:
        raise ValueError(f"there is no column {column!r}, which the rows before have")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"column {column!r} is {'an empty list' if turns == [] else json_type_name(turns)}, not turns")
    return turns


def _split_chat(turns: list[Any], column: str) -> tuple[list[Any], Any]:
    """Return the turns up to the last one of the user, and the assistant's answer to it if there is one."""
    last = turns[-1]
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        return turns, None
    if len(turns) == 1:
        raise ValueError(f"column {column!r} has no turn of the user")
    return turns[:-1], _answer(_joined_text(last.get("content")))


def _joined_text(content: Any) -> Any:
    """Return a turn's content as a text; its parts of text are joined."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text") or "") for part in content)
    return content


def _answer(cell: Any) -> Any:
    return None if isinstance(cell, str) and not cell.strip() else cell


def _text(cells: Mapping[str, Any], column: str, optional: bool = False) -> str:
    cell = cells.get(column)
    if cell is None and optional:
        return ""
    if not isinstance(cell, str):
        raise ValueError(f"column {column!r} is {json_type_name(cell)}, not a text")
    return cell


_FORMATS = {
    row_format.name: row_format
    for row_format in (
        RowFormat(
            "alpaca",
            "Alpaca (the prompt is instruction and input, the answer output)",
            _convert_alpaca,
            ("instruction", "input", "output", "system", "history"),
        ),
        RowFormat(
            "messages", "messages (the answer is a last turn of the assistant)", _convert_messages, _CHAT_COLUMNS
        ),
        RowFormat(
            "sharegpt",
            "ShareGPT (the answer is a last turn of the model)",
            _convert_sharegpt,
            (*_CHAT_COLUMNS, "system"),
        ),
    )
}
