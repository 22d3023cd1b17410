"""Look at a file of prompts: its format, which columns hold what, and how its answers could be checked.

Columns are found by the names that published data sets give them, and only where the rows have something in them. What
the file is read as is then decided by the same readers that a run uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from purld.config.base import FormatName
from purld.config.schema import Columns, Data
from purld.data.files import FILE_KINDS, file_kind, iter_rows
from purld.data.formats import read_formatted
from purld.data.prompts import ANSWER, LoadedPrompts, load_prompts
from purld.errors import UserError
from purld.records import Prompt
from purld.tasks.checks import find_check, gold_check
from purld.tasks.multiple_choice import has_gold
from purld.tasks.results import names_number

_ROWS_LOOKED_AT = 100
_REFERENCES_LOOKED_AT = 200
_CHECKED = 20  # references that are compared with themselves, which imports a library for mathematics
_PROMPT_NAMES = ("prompt", "question", "instruction", "query", "problem", "request", "input", "text")
_ANSWER_NAMES = ("answer", "response", "output", "completion", "teacher", "anchor", "chosen", "target", "reply")
_GOLD_NAMES = (
    *("reference", "gold", "ground_truth", "final_answer", "expected", "label", "solution", "correct_answer"),
    *("answer", "target", "output"),
)
_MOST_BAD_ROWS = 0.1  # of all rows; with more, the file was meant to be read in another way


@dataclass(frozen=True)
class FileSurvey:
    """What the first rows of a file hold.

    Attributes:
        title: what the file is read as, in words.
        columns: the names of its columns.
        prompt: the column of the prompts; None if the format knows where they are.
        answer: the column of answers to the prompts, as `teacher.columns.answer` names it; None if there is none.
        gold: the column of gold answers besides that one; None if there is none.
    """

    title: str
    columns: tuple[str, ...]
    prompt: str | None
    answer: str | None
    gold: str | None


@dataclass(frozen=True)
class DataSurvey:
    """The prompts of a file, and how answers to them can be checked.

    Attributes:
        loaded: the distinct prompts, with the counts of other rows.
        reference: the column of gold; None if there is none.
        check: `math` or `choice` if the gold answers look so, else None.
        remark: a sentence on why there is no check where one seems near; empty for nothing.
    """

    loaded: LoadedPrompts
    reference: str | None
    check: str | None
    remark: str = ""


def survey_file(path: Path, name: FormatName = "auto", prompt: str | None = None) -> FileSurvey:
    """Say what the columns of a file hold.

    Args:
        path: the file, or a folder saved by `datasets`.
        name: as `data.format`.
        prompt: the column of the prompts; None to find it.

    Raises:
        UserError: it cannot be read, or it is not clear which column holds the prompts.
    """
    kind = name if name in FILE_KINDS else file_kind(path)
    raw = _first_cells(row.values for row in iter_rows(path, kind))
    if not raw:
        raise UserError(f"{path}: there are no rows that can be read.")
    columns = tuple(dict.fromkeys(column for cells in raw for column in cells))
    formatted = read_formatted(path, name, Columns(prompt=prompt or "prompt"), ANSWER)
    if formatted.prompt_name == (prompt or "prompt"):
        prompt = prompt or _prompt_column(path, columns, raw)
        answer = _find_column(_ANSWER_NAMES, raw, other_than=prompt)
        gold = _find_column(_GOLD_NAMES, raw, other_than=prompt)
        title = read_formatted(path, name, Columns(prompt=prompt), ANSWER).title
        return FileSurvey(title, columns, prompt, answer, gold if gold != answer else _other_gold(raw, prompt, answer))
    converted = _first_cells(row.values for row in formatted.rows)
    answer = _find_column((ANSWER,), converted)
    gold = _find_column(_GOLD_NAMES, [{k: v for k, v in cells.items() if k not in (ANSWER, "output")} for cells in raw])
    return FileSurvey(formatted.title, columns, None, answer, gold)


def survey_data(path: Path, columns: Columns, name: FormatName = "auto", image_folder: str | None = None) -> DataSurvey:
    """Load the prompts of a file and find the check that its gold answers allow.

    Raises:
        UserError: it has no prompts, or more than a tenth of its rows cannot be used.
    """
    loaded = load_prompts(path, columns, "skip", name, image_folder)
    if loaded.skipped > _MOST_BAD_ROWS * loaded.rows:
        raise UserError(f"{path}: {loaded.skipped:,} of {loaded.rows:,} rows cannot be used; {loaded.first_skipped}")
    with_gold = [prompt for prompt in loaded.prompts if prompt.reference is not None]
    if not with_gold:
        return DataSurvey(loaded, None, None)
    check = _fitting_check(with_gold[:_REFERENCES_LOOKED_AT])
    if check and (lacking := len(loaded.prompts) - len(with_gold)):
        remark = f"{lacking:,} prompts have no gold, so no check: held-out prompts without gold end a run"
        return DataSurvey(loaded, columns.reference, None, remark)
    if check == "math" and (missing := _math_problem(path, with_gold)):
        return DataSurvey(loaded, columns.reference, None, missing)
    return DataSurvey(loaded, columns.reference, check)


def _first_cells(rows: Iterable[Mapping[str, Any] | None]) -> list[Mapping[str, Any]]:
    return [cells for cells in islice(rows, _ROWS_LOOKED_AT) if cells]


def _prompt_column(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    if "prompt" in columns:
        return "prompt"
    found = _find_column(_PROMPT_NAMES, rows)
    texts = [column for column in columns if _is_filled(column, rows) and isinstance(rows[0].get(column), str)]
    if found is None and len(texts) != 1:
        raise UserError(
            f"{path}: it is not clear which column holds the prompts; add data.columns.prompt=NAME with one of "
            f"{', '.join(columns)}."
        )
    return found or texts[0]


def _find_column(names: Sequence[str], rows: Sequence[Mapping[str, Any]], other_than: str | None = None) -> str | None:
    """Return the first of the named columns, in whatever case, that most rows fill with a text or a number."""
    present = {column.lower(): column for cells in rows for column in cells if column != other_than}
    return next((present[name] for name in names if name in present and _is_filled(present[name], rows)), None)


def _other_gold(rows: Sequence[Mapping[str, Any]], prompt: str, answer: str | None) -> str | None:
    """Return the column of gold besides that of the prompts and that of the answers."""
    names = [name for name in _GOLD_NAMES if answer is None or name != answer.lower()]
    return _find_column(names, rows, other_than=prompt)


def _is_filled(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    cells = [row.get(column) for row in rows]
    filled = [cell for cell in cells if (isinstance(cell, str) and cell.strip()) or _is_number(cell)]
    chats = [cell for cell in cells if isinstance(cell, list) and cell]
    return len(filled) + len(chats if column.lower() in _PROMPT_NAMES else []) > len(cells) / 2


def _is_number(cell: object) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _fitting_check(prompts: Sequence[Prompt]) -> str | None:
    """Return the check that all of some gold answers allow."""
    if all(has_gold(prompt) for prompt in prompts):
        return "choice"
    return "math" if all(names_number(prompt.reference or "") for prompt in prompts) else None


def _math_problem(path: Path, prompts: Sequence[Prompt]) -> str | None:
    """Return why answers cannot be checked as mathematics although gold looks so; None if they can."""
    try:
        check = find_check(Data(prompts=str(path), check="math"))
    except UserError:
        return "gold looks like numbers: `pip install 'purld[math]'` and data.check=math report accuracy"
    assert check is not None
    agree = [gold_check(check, prompt) for prompt in prompts[:_CHECKED]]
    if all(same is not None and same(prompt.reference or "") for same, prompt in zip(agree, prompts)):
        return None
    return "gold looks like numbers, and some of it cannot be read as mathematics, so no check"
