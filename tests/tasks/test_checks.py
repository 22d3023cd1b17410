"""Choosing the check of a configuration."""

import pytest

from purld.config.schema import Data
from purld.records import Prompt
from purld.tasks import competition_math, multiple_choice
from purld.tasks.checks import exact_match, find_check, missing_gold


@pytest.mark.parametrize(
    ("data", "check"),
    [
        (Data(prompts="p"), None),
        (Data(prompts="p", check="exact"), exact_match),
        (Data(prompts="p", check="choice"), multiple_choice.is_correct),
        (Data(task="competition_math_counting", path="x"), competition_math.is_correct),
        (Data(task="aokvqa_mc", path="x"), multiple_choice.is_correct),
        (Data(task="aokvqa_rationale", path="x"), None),
        (Data(task="writingprompts_cw", path="x"), None),
        (Data(task="competition_math", path="x", check="none"), None),
    ],
)
def test_a_task_brings_its_check_unless_another_is_named(data, check):
    assert find_check(data) is check


def test_held_out_prompts_without_gold_are_told_before_anything_is_paid_for():
    options = {"choices": ["red", "blue"]}
    gold = Prompt.from_text("a", reference="red", metadata=options)
    for check, other, words in [
        ("exact", Prompt.from_text("b"), "1 of 2 held-out prompts have no reference to check"),
        ("choice", Prompt.from_text("b", reference="red"), "no reference that is one of their choices"),
        ("choice", Prompt.from_text("b", reference="green", metadata=options), "one of their choices"),
    ]:
        data = Data(prompts="p", check=check)
        assert words in (missing_gold(data, [gold, other]) or "")
        assert missing_gold(data, [gold]) is None
        assert missing_gold(Data(prompts="p"), [gold, other]) is None
