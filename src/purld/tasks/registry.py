"""The paper's tasks by name (appendix C.3), each with its reader, row parser and answer check.

The published train split is the training pool; the published test split, or else the validation split, is the held-out
pool. The caller splits a source of one split by content, and removes prompts that are in both pools.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from purld.config.schema import Data, TaskName
from purld.data.prompts import LoadedPrompts, RowParser, collect_prompts, load_prompts
from purld.errors import UserError
from purld.tasks import aokvqa, competition_math, writingprompts
from purld.tasks.sources import Splits

_WRITING = "a folder of .wp_source and .wp_target, or a downloaded hub data set"
_MATH = "a folder {train,test}/TYPE/NUMBER.json, .jsonl or .parquet, or a downloaded hub data set"
_IMAGES = "a folder of aokvqa_v1p0_{train,val}.json with COCO's images"


@dataclass(frozen=True)
class Task:
    """A task that `data.task` can name."""

    path: str  # what data.path must name, for the list of tasks
    check: Literal["none", "math", "choice"]
    read_splits: Callable[[str], Splits]
    parse_row: RowParser


TASKS: dict[TaskName, Task] = {
    "writingprompts_cw": Task(
        _WRITING, "none", writingprompts.read_splits, partial(writingprompts.parse_story_prompt, tag="CW")
    ),
    "writingprompts_eu": Task(
        _WRITING, "none", writingprompts.read_splits, partial(writingprompts.parse_story_prompt, tag="EU")
    ),
    "competition_math": Task(_MATH, "math", competition_math.read_splits, competition_math.parse_problem),
    "competition_math_counting": Task(
        _MATH,
        "math",
        competition_math.read_splits,
        partial(competition_math.parse_problem, problem_type=competition_math.COUNTING),
    ),
    "competition_math_geometry": Task(
        _MATH,
        "math",
        competition_math.read_splits,
        partial(competition_math.parse_problem, problem_type=competition_math.GEOMETRY),
    ),
    "aokvqa_mc": Task(_IMAGES, "choice", aokvqa.read_splits, aokvqa.parse_choice),
    "aokvqa_rationale": Task(_IMAGES, "none", aokvqa.read_splits, aokvqa.parse_rationale),
}


def load_task(
    name: TaskName, path: str, bad_rows: Literal["fail", "skip"] = "fail"
) -> tuple[LoadedPrompts, LoadedPrompts | None]:
    """Load a task's training pool and its published held-out pool, which is None if the source is a single split.

    Raises:
        UserError: `path` does not hold the published format, or one of its rows cannot be used.
    """
    task = TASKS[name]
    splits = dict(task.read_splits(path))
    if len(splits) == 1:
        (only_split,) = splits.values()
        return collect_prompts(only_split, task.parse_row, path, bad_rows), None
    held_out_rows = next((splits[split] for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or held_out_rows is None:
        raise UserError(f"{path}: has the splits {', '.join(splits)}; train and one of test or validation are needed.")
    training = collect_prompts(splits["train"], task.parse_row, path, bad_rows)
    return training, collect_prompts(held_out_rows, task.parse_row, path, bad_rows)


def load_data(data: Data) -> tuple[LoadedPrompts, LoadedPrompts | None]:
    """Load the training source, and the held-out prompts if they have a file or split of their own.

    Raises:
        UserError: a file is missing, or a row cannot be used.
    """
    if data.task is not None:
        return load_task(data.task, data.source, data.bad_rows)
    loaded = load_prompts(data.source, data.columns, data.bad_rows, data.format, data.image_folder)
    if data.eval_prompts is None:
        return loaded, None
    return loaded, load_prompts(data.eval_prompts, data.columns, data.bad_rows, data.format, data.image_folder)
