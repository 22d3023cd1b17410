"""Choose the limits on tokens of a run, so that what it has to read fits what the student can read.

The longest self-evaluation holds the prompt, the anchor, a candidate and the words of its template. What does not fit
is left out or cut, so the limits follow the data first and the defaults second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from purld.errors import UserError
from purld.pipeline.preflight import TEMPLATE_TOKENS

_STEP = 64  # limits are round numbers
_MOST_PROMPT, _MOST_ANCHOR, _MOST_NEW = 1024, 1024, 512  # the defaults of a configuration
_LEAST = 16  # a limit below it is none
_ROOM = 1.5  # for a candidate, over the longest known answer


@dataclass(frozen=True)
class Lengths:
    """Limits in tokens: `student.max_prompt_tokens`, `student.max_anchor_tokens`, and `max_new_tokens`."""

    prompt: int
    anchor: int
    new: int

    @property
    def total(self) -> int:
        """Return what the longest self-evaluation takes: of a candidate, or of the anchor itself."""
        return self.prompt + self.anchor + max(self.new, self.anchor) + TEMPLATE_TOKENS


def choose_lengths(context: int | None, prompts: Sequence[int], answers: Sequence[int] = ()) -> Lengths:
    """Return limits that fit the data and the student's context.

    Args:
        context: how many tokens the student reads; None if it is not known.
        prompts: the lengths of some prompts, at least one.
        answers: the lengths of some answers; empty if none are known yet.

    Raises:
        UserError: the student's context has no room for prompt, anchor and candidate.
    """
    longest, longest_answer = _rounded(max(prompts)), _rounded(max(answers, default=_MOST_ANCHOR))
    new = min(max(_rounded(_ROOM * max(answers)), _STEP), 2 * _MOST_NEW) if answers else _MOST_NEW
    wanted = Lengths(max(longest, _MOST_PROMPT), max(longest_answer, _MOST_ANCHOR), new)
    if context is None:
        return wanted
    for tighter in (wanted, replace(wanted, prompt=longest), Lengths(longest, longest_answer, new)):
        if tighter.total <= context:
            return tighter
    room = context - TEMPLATE_TOKENS
    prompt = min(longest, room // 2)  # longer prompts are left out, and the plan counts them
    share = min(longest_answer / (longest_answer + new), 0.5)  # the anchor is scored as well, behind itself
    anchor = int((room - prompt) * share) // 8 * 8
    fitted = Lengths(prompt, anchor, min(new, room - prompt - anchor))
    if min(fitted.prompt, fitted.anchor, fitted.new) < _LEAST:
        raise UserError(
            f"the student reads {context:,} tokens, which has no room for a prompt, an anchor, a candidate and "
            f"{TEMPLATE_TOKENS} tokens of instructions; take another student."
        )
    return fitted


def _rounded(length: float) -> int:
    return math.ceil(length / _STEP) * _STEP
