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


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("Paris", "**Paris**", True), ("Paris", '"paris".', True), ("Paris", " PARIS\n", True),
        ("Paris", "The answer is Paris", False), ("Paris", "Parish", False), ("St. Louis", "st. louis", True),
        ("0.5", ".5", False), (".5", ".5", True), (".5", "5", False), ("5", "5.", True), ("-5", "5", False),
        ("102", "10²", False), ("10²", "10²", True), ("21/2", "2½", False), ("１２", "12", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("1,000", "1000", False), ("50%", "50", False), ("7", "The answer is not 5 but 7", False),
    ],
)  # fmt: skip
def test_an_exact_answer_has_the_same_characters_and_numbers(reference, answer, right):
    assert exact_match(Prompt.from_text("q", reference=reference), answer) is right
