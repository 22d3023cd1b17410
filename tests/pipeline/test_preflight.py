"""What is checked before anything is paid for: that the longest self-evaluation fits the student's context."""

from __future__ import annotations

import pytest

from purld.config.load import load_config
from purld.errors import UserError
from purld.pipeline.preflight import TEMPLATE_TOKENS, check_context

CONTEXT = 2048  # of the random student
LIMITS = ["student.max_prompt_tokens=200", "align.max_new_tokens=44", "evaluate.max_new_tokens=30"]


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ([], "anchor"),  # scored by the student, behind itself
        (["data.check=math", "align.score=auto"], "candidate"),  # results are compared
        (["data.check=math", "align.score=in_context"], "anchor"),
        (["data.check=math", "align.score=auto", "align.validate_by=score"], "anchor"),
        (["data.check=math", "align.score=auto", "evaluate.max_new_tokens=90"], "longer candidate"),
    ],
)
def test_the_longest_self_evaluation_fits_to_the_token(settings, answer, tiny_config):
    room = CONTEXT - TEMPLATE_TOKENS - 200
    anchor = {"anchor": room // 2, "candidate": room - 44, "longer candidate": room - 90}[answer]
    check_context(load_config(tiny_config, [*LIMITS, f"student.max_anchor_tokens={anchor}", *settings]))
    with pytest.raises(UserError, match="or the anchor itself, add up to"):
        check_context(load_config(tiny_config, [*LIMITS, f"student.max_anchor_tokens={anchor + 1}", *settings]))
