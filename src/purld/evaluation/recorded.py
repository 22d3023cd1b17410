"""Read what a run recorded of one model's held-out answers.

This is the only reader of the files `generations/<model>.jsonl`, `<model>.greedy.jsonl` and `<model>.verdicts.jsonl`:
the evaluation, comparisons of runs and the report all use it. It loads no model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purld.evaluation.summary import EvaluatedModel
from purld.records import Generation, Verdict
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RecordedAnswers:
    """The rows that a run holds on one model.

    Attributes:
        drawn: answers drawn as the configuration says, prompt by prompt, sample by sample.
        greedy: greedy answers to the same prompts; empty if they were not drawn separately.
        verdicts: the judge's verdicts on the drawn answers.
    """

    drawn: Sequence[Row]
    greedy: Sequence[Row]
    verdicts: Sequence[Row]

    def to_evaluated_model(self) -> EvaluatedModel:
        """Return the answers as arrays, ready for `purld.evaluation.summary`."""
        correct = _correct_array(self.drawn)
        greedy_correct = _correct_array(self.greedy)
        if (
            not self.greedy and correct is not None
        ):  # drawn at temperature 0: all samples of a prompt are the greedy one
            greedy_correct = correct[:, :1]
        return EvaluatedModel(rows_to_generations(self.drawn), correct, greedy_correct, rows_to_verdicts(self.verdicts))


def read_recorded_answers(run: RunDir, model: str) -> RecordedAnswers:
    """Read the rows of one model; a file that is not there gives no rows.

    Args:
        run: the run.
        model: `base`, `sft`, a method, or `opponent`.

    Raises:
        UserError: a file is damaged.
    """
    return RecordedAnswers(
        drawn=read_rows(run.generations(model)),
        greedy=read_rows(run.generations(f"{model}.greedy")),
        verdicts=read_rows(run.verdicts(model)),
    )


def rows_to_generations(rows: Iterable[Row]) -> list[Generation]:
    """Return the generations in rows that also hold the question and whether the answer is right."""
    return [Generation(**_own_fields(Generation, row)) for row in rows]


def rows_to_verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Return the verdicts in rows."""
    return [Verdict(**_own_fields(Verdict, row)) for row in rows]


def _own_fields(record: type[Generation | Verdict], row: Row) -> dict[str, Any]:
    return {field.name: row[field.name] for field in fields(record) if field.name in row}


def _correct_array(rows: Sequence[Row]) -> NDArray[np.bool_] | None:
    """Return (prompts, samples) whether each answer is right; None if that was not checked."""
    if not rows or any("correct" not in row for row in rows):
        return None
    by_prompt: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        by_prompt[row["prompt_id"]].append(row["correct"])
    return np.array(list(by_prompt.values()), dtype=bool)
