"""The paper's tasks by name (appendix C.3): how each reads its published data, and which check holds its gold.

A published train split is the training pool; the held-out set is the published test split, or else the
validation split. A source of one split is left to be split by content, and what is in both to its caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from purld.config.schema import TaskName
from purld.data.files import FileRow
from purld.data.prompts import LoadedPrompts, collect_prompts
from purld.errors import UserError
from purld.records import Prompt
from purld.tasks import aokvqa, competition_math, writingprompts
from purld.tasks.sources import Splits

_WRITING = "a folder of .wp_source and .wp_target, or a hub id"
_MATH = "a folder {train,test}/TYPE/NUMBER.json, .jsonl or .parquet, or a hub id"
_IMAGES = "a folder of aokvqa_v1p0_{train,val}.json with COCO's images"


@dataclass(frozen=True)
class Task:
    """What a name in `data.task` stands for."""

    path: str  # what data.path names, in words
    check: Literal["none", "math", "choice"]
    read: Callable[[str], Splits]
    parse: Callable[[FileRow], Prompt | None]


TASKS: dict[TaskName, Task] = {
    "writingprompts_cw": Task(_WRITING, "none", writingprompts.read, partial(writingprompts.parse, tag="CW")),
    "writingprompts_eu": Task(_WRITING, "none", writingprompts.read, partial(writingprompts.parse, tag="EU")),
    "competition_math": Task(_MATH, "math", competition_math.read, competition_math.parse),
    "competition_math_counting": Task(
        _MATH, "math", competition_math.read, partial(competition_math.parse, type_=competition_math.COUNTING)
    ),
    "competition_math_geometry": Task(
        _MATH, "math", competition_math.read, partial(competition_math.parse, type_=competition_math.GEOMETRY)
    ),
    "aokvqa_mc": Task(_IMAGES, "choice", aokvqa.read, aokvqa.parse_choice),
    "aokvqa_rationale": Task(_IMAGES, "none", aokvqa.read, aokvqa.parse_rationale),
}


def load_task(
    name: TaskName, path: str, bad_rows: Literal["fail", "skip"] = "fail"
) -> tuple[LoadedPrompts, LoadedPrompts | None]:
    """The training pool of a task and its published held-out set, None if the source is a single split.

    Raises:
        UserError: nothing in the published format is at `path`, or a row of it cannot be used.
    """
    task = TASKS[name]
    splits = dict(task.read(path))
    if len(splits) == 1:
        (only,) = splits.values()
        return collect_prompts(only, task.parse, path, bad_rows), None
    held_out = next((splits[split] for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or held_out is None:
        raise UserError(f"{path}: has the splits {', '.join(splits)}; train and one of test or validation are needed.")
    return collect_prompts(splits["train"], task.parse, path, bad_rows), collect_prompts(
        held_out, task.parse, path, bad_rows
    )
