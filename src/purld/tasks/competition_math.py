"""Competition Math (Hendrycks et al., 2021): the original folders of JSON, the flat forms, and the gold check.

A problem's reference is its whole solution, as in Table C.6 of the paper; what counts as its answer is the
last `\\boxed{}` of it. Two answers are compared by math-verify, as expressions and not as texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from purld.data.files import BadRowError, FileRow, check_text, parse_json_file
from purld.errors import UserError
from purld.records import Message, Prompt
from purld.tasks.sources import Splits, hub_splits, is_hub_id, row_splits, split_name

PREFIX = "Solve the following competition math problem: "
COUNTING = "Counting & Probability"
GEOMETRY = "Geometry"


def read(path: str) -> Splits:
    """The splits of `{train,test}/TYPE/NUMBER.json`, of flat files of one row a problem, or of a hub data set.

    Raises:
        UserError: there are none.
    """
    if is_hub_id(path):
        return hub_splits(path)
    splits = row_splits(path) or _folders(Path(path))
    if not splits:
        raise UserError(f"{path}: holds neither {{train,test}}/TYPE/NUMBER.json nor .jsonl nor .parquet files.")
    return splits


def parse(row: FileRow, type_: str | None = None) -> Prompt | None:
    """The problem in a row, or None if it is of another type than `type_`.

    Raises:
        BadRowError: says what is wrong with the row.
    """
    cells = row.cells()
    found = cells.get("type", cells.get("subject"))
    if type_ is not None and found is None:
        raise BadRowError(f"{row.place}: has no type, by which {type_} is told from the other problems")
    if type_ is not None and found != type_:
        return None
    try:
        problem = check_text(cells.get("problem"), "the problem")
        solution = check_text(cells.get("solution"), "the solution")
    except ValueError as wrong:
        raise BadRowError(f"{row.place}: {wrong}") from None
    metadata = {name: cells[name] for name in ("id", "unique_id", "type", "subject", "level") if name in cells}
    return Prompt((Message("user", PREFIX + problem.strip()),), (), solution, metadata)


def require_math_verify() -> None:
    """See that answers can be checked.

    Raises:
        UserError: math-verify is not installed.
    """
    try:
        import math_verify  # noqa: F401
    except ImportError:
        raise UserError(
            "checking math answers needs math-verify: install purld[math], or set data.check=none."
        ) from None


def is_correct(prompt: Prompt, answer: str) -> bool:
    """Whether an answer equals the reference's as a mathematical expression.

    Raises:
        ValueError: the prompt has no reference.
    """
    from math_verify import verify

    if prompt.reference is None:
        raise ValueError(f"prompt {prompt.id} has no reference to compare an answer with")
    return bool(verify(_gold(prompt.reference), _expressions(answer)))


@lru_cache(maxsize=4096)
def _gold(reference: str) -> list[Any]:
    return _expressions(reference)


def _expressions(text: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # A box is the answer wherever there is one, also where "the answer is" stands beside another number.
    return list(parse(text, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]))


def _folders(root: Path) -> dict[str, Iterable[FileRow]]:
    return {
        split_name(folder.name): _problems(folder)
        for folder in sorted(root.iterdir())
        if folder.is_dir() and any(folder.glob("*/*.json"))
    }


def _problems(folder: Path) -> Iterator[FileRow]:
    for path in sorted(folder.glob("*/*.json"), key=lambda p: (p.parent.name, len(p.stem), p.stem)):
        yield _problem(path, f"{folder.name}/{path.parent.name}/{path.stem}")


def _problem(path: Path, name: str) -> FileRow:
    try:
        values = parse_json_file(path)
    except BadRowError as problem:
        return FileRow(str(path), None, str(problem).removeprefix(f"{path}: "))
    if not isinstance(values, dict):
        return FileRow(str(path), None, "is not one JSON object, as every problem is")
    return FileRow(str(path), {"id": name} | values)
