"""Tell whether an answer is right: the check that `data.check` names, or the task's own.

A check is imported when a run asks for it, so that no run loads another's code or libraries.
"""

from __future__ import annotations

import importlib
import unicodedata
from collections.abc import Callable, Sequence

from purld.config.schema import Data
from purld.records import Prompt
from purld.tasks import competition_math, multiple_choice
from purld.tasks.registry import TASKS

Check = Callable[[Prompt, str], bool]
"""Whether a text is a right answer to a prompt."""

# Where each check is defined: module and function.
_CHECKS = {
    "exact": ("purld.tasks.checks", "exact_match"),
    "testbed": ("purld.testbed.world.world", "check"),
    "math": ("purld.tasks.competition_math", "is_correct"),
    "choice": ("purld.tasks.multiple_choice", "is_correct"),
}


def find_check(data: Data) -> Check | None:
    """Find the check of a run; None if no accuracy is to be reported.

    Raises:
        UserError: the check needs a library that is not installed.
    """
    name: str = data.check
    if name == "auto":
        name = TASKS[data.task].check if data.task else "none"
    if name == "none":
        return None
    if name == "math":
        competition_math.require_math_verify()
    module, function = _CHECKS[name]
    check: Check = getattr(importlib.import_module(module), function)
    return check


def missing_gold(data: Data, held_out: Sequence[Prompt]) -> str | None:
    """Say in a sentence how many held-out prompts lack the gold that the check needs; None if all have it."""
    check = find_check(data)
    if check is multiple_choice.is_correct:
        lacking = [p for p in held_out if not multiple_choice.has_gold(p)]
        what = "reference that is one of their choices"
    else:
        lacking, what = [p for p in held_out if p.reference is None], "reference"
    if check is None or not lacking:
        return None
    return (
        f"{len(lacking)} of {len(held_out)} held-out prompts have no {what} to check answers against; "
        "give them one, or set data.check=none."
    )


def exact_match(prompt: Prompt, text: str) -> bool:
    """Whether an answer is the prompt's reference, but for case, white space and wrapping punctuation.

    Raises:
        ValueError: the prompt has no reference.
    """
    if prompt.reference is None:
        raise ValueError(f"prompt {prompt.id} has no reference to compare an answer with")
    return _normal(text) == _normal(prompt.reference)


def _normal(text: str) -> str:
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return words.strip("*_`\"'“”‘’ .")
