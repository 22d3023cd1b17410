"""Read Competition Math (Hendrycks et al., 2021) and check answers against its solutions.

Reads the original folders of JSON files and the flat JSONL or parquet files. A problem's reference is its whole
solution (Table C.6 of the paper); its answer is the last `\\boxed{}` in it. Answers are compared by math-verify, as
expressions and not as texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from purld.data.files import BadRowError, FileRow, check_text, parse_json_file
from purld.errors import UserError
from purld.records import Message, Prompt
from purld.tasks.expressions import answer_in_words, gold_in_words, parse_answer
from purld.tasks.sources import Splits, hub_splits, is_hub_data, row_splits, split_name

PREFIX = "Solve the following competition math problem: "
COUNTING = "Counting & Probability"
GEOMETRY = "Geometry"


def read_splits(path: str) -> Splits:
    """Read the splits of `{train,test}/TYPE/NUMBER.json`, of flat files with one row per problem, or of a hub data set.

    Raises:
        UserError: `path` holds none of these.
    """
    if is_hub_data(path):
        return hub_splits(path)
    splits = row_splits(path) or _folder_splits(Path(path))
    if not splits:
        raise UserError(f"{path}: holds neither {{train,test}}/TYPE/NUMBER.json nor .jsonl nor .parquet files.")
    return splits


def parse_problem(row: FileRow, problem_type: str | None = None) -> Prompt | None:
    """Parse a row into a prompt, or return None if its problem type is not `problem_type`.

    Raises:
        BadRowError: the row cannot be used; the message names the problem.
    """
    cells = row.cells()
    row_type = cells.get("type", cells.get("subject"))
    if problem_type is not None and row_type is None:
        raise BadRowError(f"{row.location}: has no type, which is needed to select the {problem_type} problems")
    if problem_type is not None and row_type != problem_type:
        return None
    try:
        problem = check_text(cells.get("problem"), "the problem")
        solution = check_text(cells.get("solution"), "the solution")
    except ValueError as error:
        raise BadRowError(f"{row.location}: {error}") from None
    metadata = {name: cells[name] for name in ("id", "unique_id", "type", "subject", "level") if name in cells}
    return Prompt((Message("user", PREFIX + problem.strip()),), (), solution, metadata)


def require_math_verify() -> None:
    """Raise UserError if math-verify, which checks the answers, is not installed."""
    try:
        import math_verify  # noqa: F401
    except ImportError:
        raise UserError(
            "checking math answers needs math-verify: install purld[math], or set data.check=none."
        ) from None


def is_correct(prompt: Prompt, answer: str) -> bool:
    """Return whether an answer equals the reference's answer, as a mathematical expression or as the same words.

    Raises:
        ValueError: the prompt has no reference.
    """
    from math_verify import verify

    if prompt.reference is None:
        raise ValueError(f"prompt {prompt.id} has no reference to compare an answer with")
    words = gold_in_words(prompt.reference)
    if words is not None and words in answer_in_words(answer):
        return True
    return bool(verify(parse_answer(prompt.reference), parse_answer(answer)))


def _folder_splits(root: Path) -> dict[str, Iterable[FileRow]]:
    return {
        split_name(folder.name): _read_problems(folder)
        for folder in sorted(root.iterdir())
        if folder.is_dir() and any(folder.glob("*/*.json"))
    }


def _read_problems(folder: Path) -> Iterator[FileRow]:
    for path in sorted(folder.glob("*/*.json"), key=lambda path: (path.parent.name, len(path.stem), path.stem)):
        yield _read_problem(path, f"{folder.name}/{path.parent.name}/{path.stem}")


def _read_problem(path: Path, problem_id: str) -> FileRow:
    try:
        values = parse_json_file(path)
    except BadRowError as error:
        return FileRow(str(path), None, str(error).removeprefix(f"{path}: "))
    if not isinstance(values, dict):
        return FileRow(str(path), None, "is not one JSON object, as every problem must be")
    return FileRow(str(path), {"id": problem_id} | values)
