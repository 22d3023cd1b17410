"""Find the check that decides whether an answer is correct: the one in `data.check`, or the task's default.

A check is imported only when a run uses it, so that a run does not load the libraries of other checks.
"""

from __future__ import annotations

import importlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from purld.config.schema import Data
from purld.records import Prompt
from purld.tasks import competition_math, multiple_choice
from purld.tasks.registry import TASKS

Check = Callable[[Prompt, str], bool]
"""Returns whether a text is a correct answer to a prompt; a ValueError says that its reference cannot be read."""

_CHECKS = {  # module and function
    "exact": ("purld.tasks.checks", "exact_match"),
    "testbed": ("purld.testbed.world.world", "check_answer"),
    "math": ("purld.tasks.competition_math", "is_correct"),
    "choice": ("purld.tasks.multiple_choice", "is_correct"),
}

_READS_RESULTS = ("math", "choice")  # find the result in a whole answer, also in the reference
_KNOWS_THE_TRUTH = "testbed"  # judges by the question, whatever the reference


def find_check(data: Data) -> Check | None:
    """Return the check of a run, or None if the run reports no accuracy.

    Raises:
        UserError: the check needs a library that is not installed.
    """
    name = _check_name(data)
    if name == "none":
        return None
    if name == "math":
        competition_math.require_math_verify()
    module, function = _CHECKS[name]
    check: Check = getattr(importlib.import_module(module), function)
    return check


def find_comparison(data: Data) -> Check | None:
    """Return the check of a run if it judges by the reference alone, so that the anchor can stand in gold's place.

    None without a check, and for the testbed's, which knows the truth: training must not see it.

    Raises:
        UserError: the check needs a library that is not installed.
    """
    return None if _check_name(data) == _KNOWS_THE_TRUTH else find_check(data)


def reads_results(data: Data) -> bool:
    """Return whether the run's check finds the result in a whole answer, so that two answers can be compared."""
    return _check_name(data) in _READS_RESULTS


def result_check(check: Check, prompt: Prompt, reference: str) -> Callable[[str], bool] | None:
    """Return a function that tells whether a text has the result of `reference`, or None if that has no result.

    `reference` stands in the place of the prompt's own, which is not read. An anchor that gives no result, such as a
    refusal, is no reference to compare with.
    """
    referenced = replace(prompt, reference=reference)
    try:
        has_result = check(referenced, reference)
    except ValueError:
        has_result = False
    return partial(check, referenced) if has_result else None


def gold_check(check: Check, prompt: Prompt) -> Callable[[str], bool] | None:
    """Return a function that tells whether a text has the gold answer; None if the prompt has none that can be read."""
    if prompt.reference is None:
        return None
    try:
        check(prompt, "")
    except ValueError:
        return None
    return partial(check, prompt)


def _check_name(data: Data) -> str:
    if data.check == "auto":
        return TASKS[data.task].check if data.task else "none"
    return data.check


def missing_gold(data: Data, held_out: Sequence[Prompt]) -> str | None:
    """Return one sentence if held-out prompts lack the reference that the check needs, or None if all have it."""
    check = find_check(data)
    if check is multiple_choice.is_correct:
        lacking = [prompt for prompt in held_out if not multiple_choice.has_gold(prompt)]
        needed = "reference that is one of their choices"
    else:
        lacking, needed = [prompt for prompt in held_out if prompt.reference is None], "reference"
    if check is None or not lacking:
        return None
    return (
        f"{len(lacking)} of {len(held_out)} held-out prompts have no {needed} to check answers against; "
        "give them one (data.eval_prompts may name a file of its own), or set data.check=none."
    )


def exact_match(prompt: Prompt, text: str) -> bool:
    """Return whether an answer equals the prompt's reference, ignoring case, white space and wrapping punctuation.

    Raises:
        ValueError: the prompt has no reference.
    """
    if prompt.reference is None:
        raise ValueError(f"prompt {prompt.id} has no reference to compare an answer with")
    return _normalise(text) == _normalise(prompt.reference)


def _normalise(text: str) -> str:
    folded = "".join(
        character if _is_raised(character) else unicodedata.normalize("NFKC", character) for character in text
    )
    words = " ".join(unicodedata.normalize("NFC", folded).casefold().split())
    words = words.strip("*_`\"'“”‘’ ").rstrip(". ")
    return words.strip("*_`\"'“”‘’ ")


def _is_raised(character: str) -> bool:
    """Return whether folding a character would change its meaning: "10²" is not "102", and "2½" not "21/2"."""
    return unicodedata.decomposition(character).startswith(("<super>", "<sub>", "<fraction>"))
