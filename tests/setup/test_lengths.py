"""Limits on tokens follow the data, and fit the student."""

import pytest

from purld.errors import UserError
from purld.pipeline.preflight import TEMPLATE_TOKENS
from purld.setup.lengths import Lengths, choose_lengths


@pytest.mark.parametrize(
    ("context", "prompts", "answers", "expected"),
    [
        (None, [50], [], Lengths(1024, 1024, 512)),
        (8192, [50], [], Lengths(1024, 1024, 512)),  # the defaults fit
        (8192, [2000], [300], Lengths(2048, 1024, 512)),  # the longest prompt sets the limit
        (8192, [50], [20, 70], Lengths(1024, 1024, 128)),  # candidates need what answers need, and a half more
        (8192, [50], [1500], Lengths(1024, 1536, 1024)),
        (2500, [100], [], Lengths(128, 1024, 512)),  # room is found in the prompts first
        (2048, [100], [], Lengths(128, 832, 512)),  # an anchor is scored behind itself
        (1024, [100], [80], Lengths(128, 128, 128)),  # then in the answers
    ],
)
def test_limits_by_hand(context, prompts, answers, expected):
    assert choose_lengths(context, prompts, answers) == expected


@pytest.mark.parametrize(("context", "prompt", "answer"), [(512, 100, 900), (600, 5000, 5000), (1024, 700, 0)])
def test_what_does_not_fit_is_shared_out(context, prompt, answer):
    chosen = choose_lengths(context, [prompt], [answer] if answer else [])
    assert chosen.total <= context and chosen.total > context - 8
    assert min(chosen.prompt, chosen.anchor, chosen.new) >= 16


def test_a_student_without_room_is_refused():
    with pytest.raises(UserError, match="reads 300 tokens, which has no room"):
        choose_lengths(TEMPLATE_TOKENS + 44, [100])
