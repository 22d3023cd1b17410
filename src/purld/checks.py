"""Which check says that an answer is right: the one that `data.check` names, or the task's own."""

from __future__ import annotations

from collections.abc import Sequence

from purld.config import Data
from purld.evaluation.accuracy import exact_match
from purld.evaluation.evaluate import Check
from purld.records import Prompt
from purld.tasks import choice, competition_math
from purld.tasks.paper import TASKS
from purld.testbed.world import check as testbed_check

_CHECKS: dict[str, Check | None] = {
    "none": None,
    "exact": exact_match,
    "testbed": testbed_check,
    "math": competition_math.is_correct,
    "choice": choice.is_correct,
}


def find_check(data: Data) -> Check | None:
    """The check of a run, or None if no accuracy is to be reported.

    Raises:
        UserError: the check needs a library that is not installed.
    """
    name: str = data.check
    if name == "auto":
        name = TASKS[data.task].check if data.task else "none"
    if name == "math":
        competition_math.require_math_verify()
    return _CHECKS[name]


def missing_gold(data: Data, held_out: Sequence[Prompt]) -> str | None:
    """A sentence if the check has nothing to compare some of the held-out answers with: unscored is not wrong."""
    check = find_check(data)
    if check is choice.is_correct:
        lacking, what = [p for p in held_out if not choice.has_gold(p)], "reference that is one of their choices"
    else:
        lacking, what = [p for p in held_out if p.reference is None], "reference"
    if check is None or not lacking:
        return None
    return (
        f"{len(lacking)} of {len(held_out)} held-out prompts have no {what} to check answers against; "
        "give them one, or set data.check=none."
    )
